"""The two views of a leaf, against loops over its indices."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fqjax.sparsity import _layout

SIZES = {'O': 5, 'I': 3, 'H': 2, 'W': 4, 'D': 2}
LAYOUTS = ('HWIO', 'OIHW', 'IO', 'OI', 'HIO', 'OHWI', 'DHWIO', 'WOHI')


def _leaf(layout):
  shape = tuple(SIZES[letter] for letter in layout)
  return np.arange(np.prod(shape), dtype=np.float32).reshape(shape)


@pytest.mark.parametrize('layout', LAYOUTS)
def test_every_weight_is_where_the_definition_says(layout):
  w = _leaf(layout)
  kernels, rows = _layout.to_kernels(w, layout), _layout.to_rows(w, layout)
  taps = [letter for letter in layout if letter not in 'OI']
  m = int(np.prod([SIZES[t] for t in taps]))
  assert kernels.shape == _layout.kernel_shape(w.shape, layout) == (5, 3, m)
  for index in itertools.product(*map(range, w.shape)):
    at = dict(zip(layout, index, strict=True))
    t = 0
    for tap in taps:
      t = t * SIZES[tap] + at[tap]
    assert kernels[at['O'], at['I'], t] == w[index] == rows[at['O'], t * 3 + at['I']]


@pytest.mark.parametrize('layout', LAYOUTS)
def test_views_go_back_also_as_jax_arrays(layout):
  w = jnp.asarray(_leaf(layout))
  there = jax.jit(_layout.to_kernels, static_argnums=1)(w, layout)
  np.testing.assert_array_equal(_layout.from_kernels(there, layout, w.shape), w)
  rows = _layout.to_rows(w, layout)
  np.testing.assert_array_equal(_layout.from_rows(rows, layout, w.shape), w)
  stacked = jax.vmap(lambda x: _layout.to_kernels(x, layout))(jnp.stack([w, 2 * w]))
  np.testing.assert_array_equal(stacked, jnp.stack([there, 2 * there]))
  grad = jax.grad(lambda x: jnp.vdot(_layout.to_rows(x, layout), rows))(w)
  np.testing.assert_array_equal(grad, w)


def test_repeated_letters_merge_row_major():
  w = np.arange(24).reshape(2, 3, 4)  # an attention projection [in, heads, head size]
  np.testing.assert_array_equal(_layout.to_kernels(w, 'IOO')[..., 0], w.reshape(2, 12).T)
  np.testing.assert_array_equal(_layout.to_rows(w, 'IIO'), w.reshape(6, 4).T)


@pytest.mark.parametrize(
  ('layout', 'shape', 'message'),
  [
    ('hwio', (3, 3, 1, 2), "'hwio' must be capitals"),
    ('HWI', (3, 3, 2), 'with an O'),
    ('HWIO', (3, 2), 'names 4 axes, the leaf has 2'),
    ('', (), 'must be capitals'),
  ],
)
def test_a_layout_that_does_not_fit_is_named(layout, shape, message):
  with pytest.raises(ValueError, match=message):
    _layout.to_kernels(np.zeros(shape), layout)


def test_a_view_of_another_leaf_is_refused():
  with pytest.raises(ValueError, match=r'\[2, 3, 1\] are not the view of a IO leaf \[2, 3\]'):
    _layout.from_kernels(np.zeros((2, 3, 1)), 'IO', (2, 3))
  with pytest.raises(ValueError, match=r'which is \[3, 2\]'):
    _layout.from_rows(np.zeros((2, 3)), 'IO', (2, 3))
