"""The notebooks run from top to bottom; long training is shortened by one constant."""

import os
import pathlib

import nbformat
import pytest

COLABS = pathlib.Path(__file__).parent.parent / 'colabs'


@pytest.mark.parametrize(
  'name', ['quickstart', 'frequency', 'prune_your_model', 'quantize_your_model']
)
@pytest.mark.filterwarnings('default')  # the kernel's own; cells run in a process of theirs
def test_notebook_runs(name, tmp_path, monkeypatch):
  nbclient = pytest.importorskip('nbclient')
  notebook = nbformat.read(COLABS / f'{name}.ipynb', as_version=4)
  replaced = 0
  for cell in notebook.cells:
    if cell.cell_type == 'code':
      assert not cell.outputs, 'commit notebooks without outputs'
      replaced += cell.source.count('SMOKE = False')
      cell.source = cell.source.replace('SMOKE = False', 'SMOKE = True')
  assert replaced == 1, 'the constant that shortens the notebook has disappeared'
  monkeypatch.setenv('PYTHONPATH', os.fspath(COLABS.parent))
  monkeypatch.setenv('XLA_FLAGS', '')
  nbclient.NotebookClient(
    notebook, timeout=900, kernel_name='python3', resources={'metadata': {'path': str(tmp_path)}}
  ).execute()
  figures = sum(
    'image/png' in output.get('data', {})
    for cell in notebook.cells
    if cell.cell_type == 'code'
    for output in cell.outputs
  )
  assert figures >= 1
