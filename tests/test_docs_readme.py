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
  # Those of pruning and what goes on from there stand alone.
  others = ('make_plan', 'integer_graph', 'fq.export', 'fqjax.runtime')
  found = [b for b in blocks() if not any(word in b for word in others)]
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
def test_pruning_and_what_follows_need_nothing_before_them(capsys, tmp_path, monkeypatch):
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

  # And the one of activations from there.
  (block,) = [block for block in blocks() if 'integer_graph' in block]
  assert len([line for line in block.splitlines() if 'fq.' in line]) == 3
  exec(compile(block, 'README.md, integers', 'exec'), names)
  ops = [node.op for node in names['integers'].nodes]
  assert ops == ['quantize', 'qdot', 'qdot', 'qdot', 'dequantize']
  assert float(capsys.readouterr().out.split()[-1]) > dense - 0.02
  in_float = re.search(r"`in_float='(.*?)'`", README.read_text())[1]
  assert 'Dense_2' in fq.quantize.float_layers(names['graph'], in_float)[0]

  # The file and what NumPy makes of it.
  monkeypatch.chdir(tmp_path)
  (block,) = [block for block in blocks() if 'fq.export' in block]
  exec(compile(block, 'README.md, export', 'exec'), names)
  assert 'bytes, all of the file' in capsys.readouterr().out
  (block,) = [block for block in blocks() if 'fqjax.runtime.load' in block]
  exec(compile(block, 'README.md, runtime', 'exec'), names)
  want = names['net'].apply({'params': names['quantized']}, names['x'][1200:])
  np.testing.assert_allclose(names['scores'], want, atol=1e-4)
