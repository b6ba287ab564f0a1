"""The README's Python: each block runs, on shapes that a test can afford."""

import pathlib
import re

import jax
import numpy as np
import pytest

import fqjax as fq

README = pathlib.Path(__file__).resolve().parents[1] / 'README.md'


def test_python_blocks_run_from_top_to_bottom(capsys):
  blocks = re.findall(r'^```python\n(.*?)^```', README.read_text(), re.MULTILINE | re.DOTALL)
  assert len(blocks) >= 2
  # What a reader has before the first line: photographs, and the network's variables.
  images = np.zeros((2, 64, 64, 3), np.uint8)
  model = fq.create_model('resnet50_dct', channels=24)
  inputs = jax.ShapeDtypeStruct((2, 8, 8, 24), np.float32)
  names = {'images': images, 'variables': jax.eval_shape(model.init, jax.random.key(0), inputs)}
  for i, block in enumerate(blocks):
    exec(compile(block, f'README.md, Python block {i + 1}', 'exec'), names)
  assert names['coefficients'].shape == (2, 8, 8, 192)
  assert names['inputs'].shape == inputs.shape
  assert names['model'] == model
  # Black: every sample is -128, all of it in the mean of luma.
  assert float(names['inputs'][0, 0, 0, 0]) == pytest.approx(-1024)
  assert 'layer4_2' in capsys.readouterr().out
