"""Purification: input channels and filters that are almost empty are emptied."""

from collections.abc import Mapping
import math
from typing import Any

import jax
import jax.numpy as jnp

from fqjax.sparsity._layout import from_kernels, to_kernels
from fqjax.sparsity._rules import LAYOUTS
from fqjax.tracing import leaf_name


def purify(
  params: Any,
  masks: Any,
  layouts: Mapping[int, str] = LAYOUTS,
  *,
  empty: float = 8 / 9,
  weak: float = 0.05,
  sides: str = 'IO',
) -> Any:
  """Masks out channels that hold next to nothing, so that they can be removed.

  A channel goes if at least the share `empty` of its taps has no weight left in any of its kernels,
  and its norm is at most `weak` times the median norm of the channels that are not empty. The
  strongest channel of a leaf always stays. Lossy: train on with the new masks, then remove what they
  leave unused (`remove_unused`). Products and 1x1 convolutions have one tap and do not change.

  Args:
    params: tree of weights.
    masks: tree of bool arrays over the same paths, True lives; leaves that are None, or not there,
      are not touched.
    layouts: rank -> layout of the masked leaves of that rank; others are left alone. Flax's by
      default.
    empty: emptiness from which a channel counts as almost empty, 0..1.
    weak: norm up to which it counts as weak, in medians.
    sides: 'I' input channels, 'O' filters, 'IO' both.

  Returns:
    Masks like `masks`, with whole channels of False added.

  Raises:
    ValueError: a threshold or a side that cannot be, a mask whose weights are not there or of
      another shape.

  Example:
    >>> w = jnp.ones((3, 3, 2, 4)).at[:, :, 1].set(0).at[1, 1, 1].set(0.01)
    >>> masks = purify({'conv': w}, {'conv': w != 0})
    >>> print(masks['conv'].any((0, 1, 3)))
    [ True False]

  Source: Ma et al. 2020 (arXiv 1905.00136), purification: emptiness ratio and importance score; the
  defaults are ours.
  """
  if not 0 < empty <= 1 or weak < 0:
    raise ValueError(f'purify needs 0 < empty <= 1 and weak >= 0, got {empty} and {weak}.')
  if not sides or set(sides) - {'I', 'O'}:
    raise ValueError(f"sides are 'I', 'O' or 'IO', got {sides!r}.")
  weights = {leaf_name(path): w for path, w in jax.tree_util.tree_leaves_with_path(params)}

  def one(path, mask):
    name = leaf_name(path)
    if name not in weights or weights[name].shape != mask.shape:
      shape = list(weights[name].shape) if name in weights else 'no such weights'
      raise ValueError(f'{name}: a mask {list(mask.shape)}, but {shape} among the params.')
    if mask.ndim not in layouts:
      return mask
    return _purify(weights[name], mask, layouts[mask.ndim], empty, weak, sides)

  return jax.tree_util.tree_map_with_path(one, masks)


def _purify(w, mask, layout: str, empty: float, weak: float, sides: str):
  kernels = to_kernels(jnp.where(mask, w, jnp.zeros_like(w)), layout).astype(jnp.float32)
  taps = kernels.shape[2]
  keep = jnp.ones((1, 1, 1), bool)
  for side, axis in (('I', 0), ('O', 1)):
    if side not in sides:
      continue
    bare = jnp.sum(jnp.all(kernels == 0, axis), -1)  # taps without a weight, per channel
    norms = jnp.sqrt(jnp.sum(jnp.square(kernels), (axis, 2)))
    median = jnp.nanmedian(jnp.where(norms > 0, norms, jnp.nan))
    # The last tap counts whatever rounding makes of empty * taps.
    gone = (bare >= math.ceil(empty * taps - 1e-6)) & (norms <= weak * median)
    gone = gone & (jnp.arange(norms.size) != jnp.argmax(norms))
    keep = keep & ~jnp.expand_dims(gone, (axis, 2))
  full = jnp.broadcast_to(keep, kernels.shape)
  return mask & from_kernels(full, layout, mask.shape)
