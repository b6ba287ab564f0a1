"""Block DCT and wavelets against jax.scipy, SciPy, PyWavelets and jaxwt, on one batch of images.

  python -m benchmarks.transforms [--keep-memory] [--small] [--json PATH] [--record]

64 x 224 x 224 x 3, float32 in and out. All contenders of a row see the same values in the same
memory layout, transform the same axes and return the same shapes; a library with several ways of
doing so (workers, compiled or not, axes moved by hand) stands in the row with its fastest one.
Rows against `plain copy` say how much of the memory's bandwidth is left unused: a ratio of 0.5 is
twice the time it takes to copy the batch with all cores.

With `--keep-memory` the C library keeps freed memory for the next call, for all contenders (see
`common.keep_memory`); NumPy keeps part of its own either way, JAX does not.
"""

from collections.abc import Callable, Mapping
import functools

import jax
import jax.numpy as jnp
import jax.scipy.fft
import numpy as np

from benchmarks import common
from experiments import ledger
from fqjax import ops

SHAPE = (64, 224, 224, 3)
SMALL = (2, 64, 64, 3)
# How far float32 routes may differ, as a share of the largest coefficient.
TOLERANCE = 1e-5

Contenders = Mapping[str, Callable[[], object]]


def worker_counts() -> list[int]:
  """1, 2, 4, ... and all cores."""
  most = ledger.core_count()
  return sorted({2**i for i in range(most.bit_length()) if 2**i <= most} | {most})


def call(function: Callable, *args) -> Callable[[], object]:
  return functools.partial(function, *args)


def dct_contenders(x: np.ndarray, axes: tuple[int, int]) -> dict[str, Contenders]:
  """The DCT of two axes of an array whose axes already separate blocks from what is in them."""
  scipy_fft = common.import_peer('scipy.fft')
  device = jnp.asarray(x)
  settings = dict(axes=axes, norm='ortho')
  return {
    'fqjax': {'fqjax': call(jax.jit(functools.partial(ops.dctn, **settings)), device)},
    'jax.scipy': {
      'jax.scipy.fft.dctn': call(jax.jit(functools.partial(jax.scipy.fft.dctn, **settings)), device)
    },
    'SciPy': {
      f'scipy.fft.dctn, {n} workers': call(
        functools.partial(scipy_fft.dctn, workers=n, **settings), x
      )
      for n in worker_counts()
    },
  }


def channel_contenders(x: np.ndarray, size: int = 8) -> dict[str, Contenders]:
  """Image in, one channel per frequency out: what a network reads."""
  scipy_fft = common.import_peer('scipy.fft')
  n, h, w, c = x.shape
  device = jnp.asarray(x)

  def blocks_to_channels(transform):
    def function(x):
      x = x.reshape(n, h // size, size, w // size, size, c)
      x = transform(x, axes=(2, 4), norm='ortho')
      return x.transpose(0, 1, 3, 5, 2, 4).reshape(n, h // size, w // size, c * size * size)

    return function

  return {
    'fqjax': {'fqjax': call(jax.jit(ops.block_dct), device)},
    'jax.scipy': {
      'jax.scipy.fft.dctn': call(jax.jit(blocks_to_channels(jax.scipy.fft.dctn)), device)
    },
    'SciPy': {
      f'scipy.fft.dctn, {k} workers': call(
        blocks_to_channels(functools.partial(scipy_fft.dctn, workers=k)), x
      )
      for k in worker_counts()
    },
  }


def wavelet_contenders(
  x: np.ndarray, axes: tuple[int, int], wavelet: str, level: int
) -> dict[str, Contenders]:
  """Several levels over two axes; jaxwt also with the axes moved and the rest folded by hand."""
  pywt, jaxwt = common.import_peer('pywt'), common.import_peer('jaxwt')
  device = jnp.asarray(x)
  settings = dict(level=level, axes=axes)

  def folded(x):
    moved = jnp.moveaxis(x, axes, (-2, -1))
    coeffs = jaxwt.wavedec2(moved.reshape(-1, *moved.shape[-2:]), wavelet, level=level)
    back = lambda c: jnp.moveaxis(c.reshape(*moved.shape[:-2], *c.shape[-2:]), (-2, -1), axes)
    return jax.tree.map(back, coeffs)

  return {
    'fqjax': {'fqjax': call(jax.jit(lambda x: ops.wavedec2(x, wavelet, **settings)), device)},
    'PyWavelets': {'PyWavelets': lambda: pywt.wavedec2(x, wavelet, **settings)},
    'jaxwt': {
      'jaxwt': lambda: jaxwt.wavedec2(device, wavelet, **settings),
      'jaxwt, axes folded by hand, jit': call(jax.jit(folded), device),
    },
  }


def check(title: str, groups: Mapping[str, Contenders]) -> None:
  """Stops unless all contenders compute the same."""
  results = {}
  for contenders in groups.values():
    for name, function in contenders.items():
      results[name] = [np.asarray(leaf) for leaf in jax.tree.leaves(function())]
  reference = results.pop('fqjax')
  scale = max(np.abs(leaf).max() for leaf in reference)
  for name, leaves in results.items():
    if [leaf.shape for leaf in leaves] != [leaf.shape for leaf in reference]:
      raise RuntimeError(f'{title}: {name} returns other shapes than fqjax.')
    error = max(np.abs(a - b).max() for a, b in zip(leaves, reference, strict=True)) / scale
    if not error < TOLERANCE:
      raise RuntimeError(f'{title}: {name} differs from fqjax by {error:.2g} of the largest value.')


def contest(
  title: str, groups: Mapping[str, Contenders], x: np.ndarray, goals: Mapping[str, float], repeats
) -> list[common.Row]:
  """One row per peer, with its fastest variant, and one against a plain copy."""
  check(title, groups)
  contenders = {name: f for group in groups.values() for name, f in group.items()}
  seconds = common.compare({**contenders, common.COPY: common.copier(x)}, repeats)
  rows = []
  for group, variants in groups.items():
    if group != 'fqjax':
      peer = common.fastest(seconds, list(variants))
      name = f'{title}, against {group}'
      rows.append(common.speedup_row(name, seconds, 'fqjax', peer, goals.get(group)))
  rows.append(common.speedup_row(f'{title}, bandwidth', seconds, 'fqjax', common.COPY))
  return rows


def parse_command(argv=None):
  """Arguments of a command line; raises where the program would not run."""
  parser = common.parser(__doc__, repeats=15)
  parser.add_argument('--small', action='store_true', help='tiny images, to try the program')
  parser.add_argument('--keep-memory', action='store_true', help='reuse freed memory')
  return parser.parse_args(argv)


def main(argv=None) -> None:
  args = parse_command(argv)
  if args.keep_memory and not common.keep_memory():
    raise SystemExit('--keep-memory needs glibc; load an allocator that keeps memory instead.')
  n, h, w, c = shape = SMALL if args.small else SHAPE
  x = np.random.default_rng(0).standard_normal(shape, np.float32)
  nchw = np.ascontiguousarray(x.transpose(0, 3, 1, 2))
  blocks = x.reshape(n, h // 8, 8, w // 8, 8, c)
  blocks_last = np.ascontiguousarray(blocks.transpose(0, 1, 3, 5, 2, 4))
  # SciPy: no slower; 1.5 is what we would like.
  dct_goals = {'jax.scipy': 4.0, 'SciPy': 1.0}
  wavelet_goals = {1: {'jaxwt': 4.0, 'PyWavelets': 4.0}, 3: {'jaxwt': 2.0, 'PyWavelets': 2.0}}
  contests = [
    ('DCT of 8x8 blocks, NHWC', dct_contenders(blocks, (2, 4)), dct_goals),
    ('DCT of 8x8 blocks, blocks last', dct_contenders(blocks_last, (4, 5)), dct_goals),
    ('DCT of 8x8 blocks, NHWC to channels', channel_contenders(x), dct_goals),
  ]
  for wavelet, level in (('haar', 1), ('db4', 3)):
    for layout, array, axes in (('NHWC', x, (1, 2)), ('NCHW', nchw, (2, 3))):
      groups = wavelet_contenders(array, axes, wavelet, level)
      contests.append((f'{wavelet} level {level}, {layout}', groups, wavelet_goals[level]))
  rows = []
  for title, groups, goals in contests:
    title += ', memory kept' * args.keep_memory
    rows += contest(title, groups, x, goals, args.repeats)
  common.finish(args, rows, data='x'.join(map(str, shape)))


if __name__ == '__main__':
  main()
