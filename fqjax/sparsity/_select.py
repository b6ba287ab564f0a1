"""Which entries are the k largest: exact, without sorting or gathering.

The k-th largest value is built bit by bit from counts of "how many are at least this", so every
step is a sum: it shards, it maps over batches, and no number of devices changes the result.
"""

from collections.abc import Sequence
import math

import jax
from jax import lax
import jax.numpy as jnp
import numpy as np

# Up to here one pass that ranks by comparing all pairs beats a pass per bit.
_RANKED = 64


def keep_count(keep: float, n: int, rounding: str = 'nearest') -> int:
  """How many of n a kept fraction leaves: at least one.

  Args:
    keep: kept fraction, 0 < keep <= 1.
    n: how many there are.
    rounding: 'nearest' (Python's, half to even) or 'up'.

  Raises:
    ValueError: for a fraction outside (0, 1], nothing to keep, or another rounding.

  Example:
    >>> keep_count(0.3, 9), keep_count(0.3, 9, 'up'), keep_count(0.01, 9)
    (3, 3, 1)
  """
  if not 0 < keep <= 1:
    raise ValueError(f'keep={keep} must be in (0, 1]; a pruning ratio r is keep=1/r.')
  if n < 1:
    raise ValueError(f'nothing to keep a fraction of: {n} groups.')
  if rounding not in ('nearest', 'up'):
    raise ValueError(f"rounding={rounding!r} must be 'nearest' or 'up'.")
  # 0.1 * 30 is a little above 3: not a reason to keep a fourth.
  count = round(keep * n) if rounding == 'nearest' else math.ceil(keep * n - 1e-9 * n)
  return max(1, count)


def wide(*dtypes) -> jnp.dtype:
  """In which type scores of these dtypes are compared: float64 if one has 64 bits, else float32."""
  return jnp.dtype('float64' if any(jnp.dtype(d).itemsize == 8 for d in dtypes) else 'float32')


def _keys(scores: jax.Array) -> jax.Array:
  """Unsigned integers in the order of the scores, float32 or float64; both zeros are one."""
  unsigned = jnp.uint64 if scores.dtype.itemsize == 8 else jnp.uint32
  bits = lax.bitcast_convert_type(lax.stop_gradient(scores), unsigned)
  sign = jnp.array(1, unsigned) << (bits.dtype.itemsize * 8 - 1)
  bits = jnp.where(bits == sign, jnp.zeros_like(bits), bits)  # -0; by bits, as 0 == subnormal
  return jnp.where(bits & sign, ~bits, bits | sign)


def _count(marked: jax.Array) -> jax.Array:
  if marked.ndim > 1:
    # In two steps: lines of the last axis add up in vector registers, whatever the rank.
    longest = max(range(marked.ndim - 1), key=lambda a: marked.shape[a])
    marked = lax.optimization_barrier(jnp.sum(marked, longest, dtype=jnp.int32))
  return jnp.sum(marked, dtype=jnp.int32)


def _threshold(keys: Sequence[jax.Array], k, axis: int | None) -> jax.Array:
  """Largest key that at least k keys reach, over all arrays, or per line along the axis."""
  dtype = keys[0].dtype
  bits = dtype.itemsize * 8

  def reach(t):
    if axis is None:
      return sum(_count(x >= t) for x in keys)
    return sum(jnp.sum(x >= t, axis, dtype=jnp.int32, keepdims=True) for x in keys)

  def settle(i, t):
    higher = t | (jnp.array(1, dtype) << (bits - 1 - i).astype(dtype))
    return jnp.where(reach(higher) >= k, higher, t)

  shape = () if axis is None else (*keys[0].shape[:-1], 1)
  return lax.fori_loop(0, bits, settle, jnp.zeros(shape, dtype))


def _first(marked: jax.Array, need: jax.Array, order: Sequence[int]) -> jax.Array:
  """The first `need` marked entries, row-major in `order` (axes, the slowest first)."""
  kept = jnp.zeros_like(marked)
  for axis in order:
    others = tuple(a for a in range(marked.ndim) if a != axis)
    counts = jnp.sum(marked, others, dtype=jnp.int32)
    upto = jnp.cumsum(counts, dtype=jnp.int32)
    whole = upto <= need
    split = ~whole & (upto - counts < need)  # at most one slice
    kept |= marked & jnp.expand_dims(whole, others)
    marked &= jnp.expand_dims(split, others)
    need = need - jnp.sum(jnp.where(split, upto - counts, 0), dtype=jnp.int32)
  return kept


def _check_k(k, n: int) -> None:
  if isinstance(k, int | np.integer) and not 0 <= k <= n:
    raise ValueError(f'cannot keep k={k} of {n} entries; k is 0..{n}.')


def top_k_masks(
  scores: Sequence[jax.Array], k, orders: Sequence[Sequence[int]] | None = None
) -> list[jax.Array]:
  """Marks the k largest entries of several arrays taken together.

  Args:
    scores: arrays of any shapes and real dtypes; compared in at least float32. No NaN.
    k: how many in total, a Python int or a traced int32 scalar (clipped to what there is).
    orders: for each array its axes, the slowest first, in which equal scores are counted; row-major
      by default. Earlier arrays come first.

  Returns:
    bool arrays of the same shapes with exactly k True; of equal scores the first.

  Raises:
    ValueError: for a Python k outside 0..number of entries, or no arrays.

  Example:
    >>> a, b = top_k_masks([jnp.array([3.0, 1.0]), jnp.array([2.0, 3.0])], 2)
    >>> print(a, b)
    [ True False] [False  True]
  """
  if not scores:
    raise ValueError('top_k_masks needs at least one array.')
  scores = [jnp.asarray(s) for s in scores]
  total = sum(s.size for s in scores)
  _check_k(k, total)
  k = jnp.clip(jnp.asarray(k, jnp.int32), 0, total)
  orders = orders or [range(s.ndim) for s in scores]
  dtype = wide(*(s.dtype for s in scores))
  keys = [_keys(s.astype(dtype)) for s in scores]
  t = _threshold(keys, k, None)
  need = k - sum(_count(x > t) for x in keys)
  masks = []
  for x, order in zip(keys, orders, strict=True):
    ties = x == t
    found = _count(ties)
    first = lax.cond(
      found <= need,
      lambda ties, _: ties,
      lambda ties, need, order=order: _first(ties, need, order),
      ties,
      need,
    )
    masks.append((x > t) | first)
    need = jnp.maximum(need - found, 0)
  return masks


def top_k_mask(
  scores: jax.Array, k, *, axis: int | None = None, order: Sequence[int] | None = None
) -> jax.Array:
  """Marks the k largest entries, of the whole array or of every line along the last axis.

  Exact: built from counts of the scores' integer view (one halving a bit), not from a sort; ties go
  to the lowest index. Works under jit, vmap and any sharding, with the same result.

  Args:
    scores: any shape and real dtype, compared in at least float32; magnitudes, energies, or any
      saliency (negative ones too). No NaN.
    k: how many, a Python int or traced int32: a scalar, or with `axis=-1` also an array of
      `scores.shape[:-1]`. Traced values are clipped to what there is.
    axis: None for the whole array, -1 for each line.
    order: axes, the slowest first, in which ties of the whole array are counted; row-major by
      default.

  Returns:
    bool, like `scores`, with exactly k True.

  Raises:
    ValueError: for a Python k out of range, or another axis.

  Example:
    >>> print(top_k_mask(jnp.array([0.3, 1.2, 0.3, 0.8]), 3))
    [ True  True False  True]
    >>> print(top_k_mask(jnp.array([[1, 2, 3], [6, 5, 4]]), 1, axis=-1))
    [[False False  True]
     [ True False False]]
  """
  scores = jnp.asarray(scores)
  if axis is None:
    return top_k_masks([scores], k, None if order is None else [order])[0]
  if axis != -1 or order is not None:
    raise ValueError(f'axis={axis}: choose None or -1 (then without order); move the axis first.')
  n = scores.shape[-1]
  _check_k(k, n)
  k = jnp.clip(jnp.asarray(k, jnp.int32), 0, n)
  k = jnp.broadcast_to(k, scores.shape[:-1])[..., None]
  keys = _keys(scores.astype(wide(scores.dtype)))
  if n <= _RANKED:
    return _ranks(keys) < k
  t = _threshold([keys], k, -1)
  above, ties = keys > t, keys == t
  need = k - jnp.sum(above, -1, dtype=jnp.int32, keepdims=True)
  ties = lax.cond(
    jnp.all(jnp.sum(ties, -1, dtype=jnp.int32, keepdims=True) <= need),
    lambda ties: ties,
    lambda ties: ties & (jnp.cumsum(ties, -1, dtype=jnp.int32) <= need),
    ties,
  )
  return above | ties


def _ranks(keys: jax.Array) -> jax.Array:
  """int32 place of each entry of its line, 0 for the largest; of equal ones the first is ahead."""
  place = lax.broadcasted_iota(jnp.int32, keys.shape, keys.ndim - 1)
  ranks = jnp.zeros(keys.shape, jnp.int32)
  for i in range(keys.shape[-1]):
    other = keys[..., i : i + 1]
    ahead = (other > keys) | ((other == keys) & (i < place))
    ranks += ahead.astype(jnp.int32)
  return ranks


def kth_largest(scores: jax.Array, k) -> jax.Array:
  """The k-th largest value of an array.

  Args:
    scores: any shape and real dtype. No NaN.
    k: 1 for the largest; a Python int or a traced int32 scalar.

  Returns:
    A scalar, float64 for scores of 64 bits, else float32.

  Raises:
    ValueError: for a Python k outside 1..number of entries.

  Example:
    >>> print(kth_largest(jnp.array([4.0, -1.0, 3.0, 3.0]), 3))
    3.0
  """
  scores = jnp.asarray(scores)
  if isinstance(k, int | np.integer) and k < 1:
    raise ValueError(f'k={k} counts from 1, the largest.')
  _check_k(k, scores.size)
  keys = _keys(scores.astype(wide(scores.dtype)))
  t = _threshold([keys], jnp.asarray(k, jnp.int32), None)
  sign = jnp.array(1, t.dtype) << (t.dtype.itemsize * 8 - 1)
  bits = jnp.where(t & sign, t ^ sign, ~t)
  return lax.bitcast_convert_type(bits, wide(t.dtype))
