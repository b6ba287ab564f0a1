"""The runtime works where jax is not installed."""

import pathlib
import subprocess
import sys

ROOT = pathlib.Path(__file__).resolve().parents[2]
CODE = """
import sys
blocked = ('jax', 'jaxlib', 'flax', 'optax', 'ml_dtypes', 'scipy', 'orbax')
for name in blocked:
  sys.modules[name] = None  # importing it raises ImportError
import numpy as np
import fqjax.runtime
from fqjax.runtime import codecs, reference
assert reference.quantize(np.float32([1.5]), 1.0, 3).tolist() == [5]
w = np.zeros((2, 4, 9), np.float32)
w[:, ::2, [0, 1, 3, 4]] = 1
for name, codec in codecs.CODECS.items():
  settings = {'nm': {'n': 9, 'm': 9}, 'bank': {'size': 9}, 'punched': {'rows': 2}}.get(name, {})
  x = w if name in ('punched', 'pcnn', 'patterns', 'fkw') else w.reshape(2, 36)
  assert (codec.decode(codec.from_bytes(codec.to_bytes(codec.encode(x, **settings)))) == x).all()
ours = {m.partition('.')[0] for m, v in sys.modules.items() if v is not None}
print(len(codecs.CODECS), sorted(ours & set(blocked)))
"""


def test_codecs_need_numpy_only():
  out = subprocess.run(
    [sys.executable, '-c', CODE], capture_output=True, text=True, check=True, cwd=ROOT
  )
  assert out.stdout.strip() == '14 []'
