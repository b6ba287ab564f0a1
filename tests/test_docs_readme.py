"""The README's Python: each block runs, on shapes that a test can afford."""

import pathlib
import re

import jax
import numpy as np
import pytest

import fqjax as fq

README = pathlib.Path(__file__).resolve().parents[1] / 'README.md'


def blocks():
  return re.findall(r'^```python\n(.*?)^```', README.read_text(), re.MULTILINE | re.DOTALL)


def test_python_blocks_run_from_top_to_bottom(capsys):
  found = [block for block in blocks() if 'make_plan' not in block]  # those stand alone
  assert len(found) >= 2
  # What a reader has before the first line: photographs, and the network's variables.
  images = np.zeros((2, 64, 64, 3), np.uint8)
  model = fq.create_model('resnet50_dct', channels=24)
  inputs = jax.ShapeDtypeStruct((2, 8, 8, 24), np.float32)
  names = {'images': images, 'variables': jax.eval_shape(model.init, jax.random.key(0), inputs)}
  for i, block in enumerate(found):
    exec(compile(block, f'README.md, Python block {i + 1}', 'exec'), names)
  assert names['coefficients'].shape == (2, 8, 8, 192)
  assert names['inputs'].shape == inputs.shape
  assert names['model'] == model
  # Black: every sample is -128, all of it in the mean of luma.
  assert float(names['inputs'][0, 0, 0, 0]) == pytest.approx(-1024)
  assert 'layer4_2' in capsys.readouterr().out


@pytest.mark.promotes('Adam of optax')
def test_pruning_and_quantizing_in_three_lines_need_nothing_before_them(capsys):
  pytest.importorskip('sklearn')
  (block,) = [block for block in blocks() if 'fq.make_plan' in block]
  assert len(block.splitlines()) < 40
  assert len([line for line in block.splitlines() if 'fq.' in line]) == 3
  names = {}
  exec(compile(block, 'README.md, pruning', 'exec'), names)
  kept = {name: int((names['pruned'][name]['kernel'] != 0).sum()) for name in names['pruned']}
  assert kept == {'Dense_0': 64 * 300 // 10, 'Dense_1': 300 * 100 // 10, 'Dense_2': 1000}
  dense, pruned = map(float, capsys.readouterr().out.split())
  assert dense > 0.85 and pruned > dense - 0.03

  # The block below it goes on from here.
  (block,) = [block for block in blocks() if 'fq.quantize.make_plan' in block]
  assert len([line for line in block.splitlines() if 'fq.' in line]) == 3
  exec(compile(block, 'README.md, quantization', 'exec'), names)
  for layer in names['quantized'].values():
    assert len(np.unique(layer['kernel'])) <= 8
  assert float(capsys.readouterr().out.split()[-1]) > dense - 0.03
