"""Convolutions computed from the stored arrays alone, against XLA's of the masked dense kernel."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fqjax import sparsity as sp
from fqjax.runtime.codecs import fkw, patterns, pcnn
from tests.sparsity.structures import oracle

ELOG = sp.pattern_set('elog4')


def _fkw_kernels(e):
  """(output, input, taps, values) of every kernel, as a loop over the five arrays meets them."""
  for position, output in enumerate(e.reorder):
    for p, pattern in enumerate(e.table):
      taps = [t for t in range(e.shape[2]) if int(pattern) >> t & 1]
      run = slice(*(e.offset[position] + e.stride[position, p : p + 2]))
      for i, values in zip(e.index[run], e.values[run], strict=True):
        yield output, i, taps, values


def _pcnn_kernels(e):
  """The same where every kernel has n values and a code: no pointers at all."""
  o, i, n = e.values.shape
  flat = e.values.ravel()
  for g in range(o * i):
    mask = int(e.table[e.codes.ravel()[g]])
    taps = [t for t in range(mask.bit_length()) if mask >> t & 1]
    yield g // i, g % i, taps, flat[g * n : (g + 1) * n]


def _pattern_kernels(e):
  for (o, i), code, values in zip(np.argwhere(e.kept), e.codes, e.values, strict=True):
    mask = int(e.table[code])
    yield o, i, [t for t in range(mask.bit_length()) if mask >> t & 1], values


def _convolve(kernels, x, shape, stride, padding):
  """NHWC float64: every tap of every kernel adds one shifted image."""
  kh, kw, inputs, outputs = shape
  n, h, w, channels = x.shape
  per_group = outputs * inputs // channels
  if padding == 'SAME':
    out = [-(-s // stride) for s in (h, w)]
    need = [max(0, (o - 1) * stride + k - s) for o, k, s in zip(out, (kh, kw), (h, w), strict=True)]
    x = np.pad(x, ((0, 0), *((p // 2, p - p // 2) for p in need), (0, 0)))
  else:
    out = [(s - k) // stride + 1 for s, k in zip((h, w), (kh, kw), strict=True)]
  y = np.zeros((n, *out, outputs))
  for o, i, taps, values in kernels:
    channel = o // per_group * inputs + i
    for t, value in zip(taps, values, strict=True):
      r, c = divmod(t, kw)
      rows = slice(r, r + (out[0] - 1) * stride + 1, stride)
      columns = slice(c, c + (out[1] - 1) * stride + 1, stride)
      y[..., o] += float(value) * x[:, rows, columns, channel]
  return y


FORMS = {
  'fkw': (sp.Patterns(ELOG, keep=0.4), fkw.encode, _fkw_kernels),
  'patterns': (sp.Patterns(ELOG, keep=0.4), patterns.encode, _pattern_kernels),
  'pcnn': (sp.Patterns(ELOG), pcnn.encode, _pcnn_kernels),
}


@pytest.mark.parametrize('form', FORMS)
def test_a_convolution_of_the_stored_arrays_is_that_of_the_masked_kernel(form):
  structure, encode, kernels = FORMS[form]
  rng = np.random.default_rng(0)
  # Inputs that fill no vector, odd images, several of them.
  for groups, channels, outputs in ((1, 5, 6), (2, 6, 4)):
    shape = (3, 3, channels // groups, outputs)
    w = rng.standard_normal(shape).astype(np.float32)
    x = rng.standard_normal((2, 7, 9, channels)).astype(np.float32)
    z = oracle.project(structure, jnp.asarray(w), 'HWIO')[0]
    encoded = encode(sp.to_kernels(np.asarray(z), 'HWIO'), table=ELOG)
    for stride, padding in itertools.product((1, 2), ('SAME', 'VALID')):
      want = jax.lax.conv_general_dilated(
        x, z, (stride, stride), padding, feature_group_count=groups,
        dimension_numbers=('NHWC', 'HWIO', 'NHWC'), precision='highest',
      )  # fmt: skip
      got = _convolve(kernels(encoded), x.astype(np.float64), shape, stride, padding)
      np.testing.assert_allclose(want, got, rtol=0, atol=1e-5 * np.abs(got).max())


def test_pointwise_layers_are_left_alone_by_patterns():
  params = {'a': {'kernel': jnp.ones((3, 3, 4, 4))}, 'b': {'kernel': jnp.ones((1, 1, 4, 4))}}
  rules = [('.*/kernel', sp.Patterns(ELOG))]
  with pytest.raises(ValueError, match="'b/kernel' .*1-tap kernels .* leave it dense"):
    sp.make_plan(params, rules)
  plan = sp.make_plan(params, rules, unfit='dense')
  pruned, masks = sp.project(plan, params)
  assert pruned['b']['kernel'] is params['b']['kernel'] and masks['b']['kernel'] is None
  assert int(masks['a']['kernel'].sum()) == 4 * 16
