import jax
import jax.numpy as jnp
import numpy as np

from fqjax.nn import init_selection, merge_selections, selection_frequency, update_selection


def test_frequency_over_batches_with_padding():
  on = (np.random.default_rng(0).uniform(size=(3, 8, 5)) < 0.4).astype(np.float32)
  mask = np.ones((3, 8), np.float32)
  mask[2, 5:] = 0
  states = [jax.jit(update_selection)(init_selection(5), o, m) for o, m in zip(on, mask)]
  state = merge_selections(merge_selections(states[2], states[0]), states[1])
  in_order = init_selection(5)
  for o, m in zip(on, mask):
    in_order = update_selection(in_order, o, m)
  for a, b in zip(state, in_order):
    np.testing.assert_array_equal(a, b)
  assert state.count == 21
  np.testing.assert_allclose(selection_frequency(state), on[mask > 0].mean(0), rtol=1e-6)
  no_mask = update_selection(init_selection(5), on[2])
  np.testing.assert_allclose(selection_frequency(no_mask), on[2].mean(0), rtol=1e-6)


def test_counts_stay_exact_where_float32_would_stop():
  state = init_selection(1)._replace(chosen=jnp.array([2**24]), count=jnp.array(2**24))
  state = update_selection(state, jnp.ones((1, 1)))
  assert state.chosen[0] == state.count == 2**24 + 1


def test_before_any_image():
  assert (selection_frequency(init_selection(3)) == 0).all()
