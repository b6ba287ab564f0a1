"""Block DCT of images, and the operators that act on its coefficients exactly.

An image [..., h, w, c] becomes a map [..., h/b, w/b, c*b*b] whose channel b*b*component + b*u + v
holds frequency u vertically and v horizontally: JPEG's transform, one channel per frequency.
Floating dtypes are kept (sums in float32, or float64 for float64); integers become float32 where
arithmetic is needed.
"""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np

from fqjax.ops._dct import _basis, accumulator, contract, floating

# Up to here one product with the [b*b, b*b] Kronecker basis is faster than one per axis.
_LARGEST_KRONECKER = 8
# Rows of blocks against columns of blocks, vertical frequencies against horizontal ones.
_TRANSPOSED = (-4, -5, -3, -1, -2)


@functools.partial(jax.jit, static_argnames='size', inline=True)
def block_dct(x: jax.Array, size: int = 8) -> jax.Array:
  """Orthonormal DCT-II of every size x size block of an image; no level shift.

  Args:
    x: image [..., h, w, c], h and w multiples of `size`; floating dtypes are kept, integers
      become float32.
    size: side of a block in pixels.

  Returns:
    Coefficients [..., h/size, w/size, c*size*size], channel size*size*component + size*u + v.

  Raises:
    ValueError: fewer than 3 axes, or h or w not a multiple of `size`.

  Example:
    >>> block_dct(jnp.full((16, 8, 3), 72.0))[1, 0, ::64].tolist()
    [576.0, 576.0, 576.0]

  References:
    Wallace, "The JPEG Still Picture Compression Standard", 1991, section 4.1.
  """
  _check_image('block_dct', x, size)
  *lead, h, w, c = x.shape
  dtype = floating(x.dtype)
  x = x.astype(accumulator(dtype))
  x = x.reshape(*lead, h // size, size, w // size, size, c)
  x = _move_blocks(x, (-5, -3, -1, -4, -2))
  return _flat(_both_axes(x, _basis(2, size, 'ortho'))).astype(dtype)


@functools.partial(jax.jit, static_argnames='size', inline=True)
def block_idct(coef: jax.Array, size: int = 8) -> jax.Array:
  """Inverse of `block_dct`: the image whose blocks have these coefficients.

  Args:
    coef: coefficients [..., bh, bw, c*size*size]; floating dtypes are kept, integers become
      float32.
    size: side of a block in pixels.

  Returns:
    Image [..., bh*size, bw*size, c].

  Raises:
    ValueError: fewer than 3 axes, or channels not a multiple of size*size.

  Example:
    >>> x = jnp.arange(64.0).reshape(8, 8, 1)
    >>> bool(jnp.allclose(block_idct(block_dct(x)), x, atol=1e-4))
    True
  """
  x = _blocks('block_idct', coef, size)
  dtype = floating(coef.dtype)
  x = _both_axes(x.astype(accumulator(dtype)), _basis(3, size, 'ortho'))
  *lead, bh, bw, c, _, _ = x.shape
  x = _move_blocks(x, (-5, -2, -4, -1, -3))
  return x.reshape(*lead, bh * size, bw * size, c).astype(dtype)


def zigzag(size: int = 8) -> np.ndarray:
  """The row-major index b*u + v of each entry of the zig-zag scan, int [size*size].

  Raises:
    ValueError: `size` below 1.

  Example:
    >>> zigzag()[:6].tolist()
    [0, 1, 8, 16, 9, 2]

  References:
    ITU-T T.81, figure 5.
  """
  _check_size(size)
  u, v = np.divmod(np.arange(size * size), size)
  # Along diagonals u + v; odd ones run downwards, even ones upwards.
  return np.lexsort((np.where((u + v) % 2, u, v), u + v))


def zigzag_rank(size: int = 8) -> np.ndarray:
  """The zig-zag number of each row-major index, int [size*size]: inverse of `zigzag`.

  Raises:
    ValueError: `size` below 1.

  Example:
    >>> zigzag_rank()[:8].tolist()
    [0, 1, 5, 6, 14, 15, 27, 28]
  """
  return np.argsort(zigzag(size))


def to_zigzag(coef: jax.Array, *, size: int = 8) -> jax.Array:
  """Reorders each component's channels from row-major to zig-zag; any dtype, [..., c*size*size].

  Raises:
    ValueError: channels not a multiple of size*size.

  Example:
    >>> to_zigzag(jnp.arange(64).reshape(1, 1, 64))[0, 0, :4].tolist()
    [0, 1, 8, 16]
  """
  return _reorder('to_zigzag', coef, zigzag(size), size)


def from_zigzag(coef: jax.Array, *, size: int = 8) -> jax.Array:
  """Reorders each component's channels from zig-zag to row-major: inverse of `to_zigzag`.

  Raises:
    ValueError: channels not a multiple of size*size.

  Example:
    >>> from_zigzag(jnp.arange(64).reshape(1, 1, 64))[0, 0, :4].tolist()
    [0, 1, 5, 6]
  """
  return _reorder('from_zigzag', coef, zigzag_rank(size), size)


def pad_to(x: jax.Array, size: int) -> jax.Array:
  """Repeats the last row and column until height and width are multiples of `size`.

  Args:
    x: image [..., h, w, c], any dtype (kept).
    size: block side in pixels.

  Returns:
    Image [..., ceil(h/size)*size, ceil(w/size)*size, c].

  Raises:
    ValueError: fewer than 3 axes or an empty image.

  Example:
    >>> pad_to(jnp.ones((375, 500, 3)), 8).shape
    (376, 504, 3)
  """
  _check_size(size)
  if x.ndim < 3 or 0 in x.shape[-3:-1]:
    raise ValueError(f'pad_to needs an image [..., h, w, c] with pixels, got x: {list(x.shape)}.')
  after = [(0, 0)] * (x.ndim - 3) + [(0, -x.shape[a] % size) for a in (-3, -2)] + [(0, 0)]
  return jnp.pad(x, after, mode='edge')


def block_flip_left_right(coef: jax.Array, *, size: int = 8) -> jax.Array:
  """The coefficients of the image mirrored left to right; exact, any signed dtype (kept).

  Args:
    coef: coefficients [..., bh, bw, c*size*size].
    size: side of a block in pixels.

  Returns:
    Coefficients of the same shape: block columns reversed, odd v negated.

  Raises:
    ValueError: fewer than 3 axes, or channels not a multiple of size*size.

  Example:
    >>> x = jnp.arange(128.0).reshape(8, 16, 1)
    >>> flipped = block_flip_left_right(block_dct(x))
    >>> bool(jnp.allclose(flipped, block_dct(x[:, ::-1]), atol=1e-3))
    True
  """
  x = _blocks('block_flip_left_right', coef, size)
  return _flat(_mirror(x, -1))


def block_flip_up_down(coef: jax.Array, *, size: int = 8) -> jax.Array:
  """The coefficients of the image mirrored top to bottom; exact, any signed dtype (kept).

  Args:
    coef: coefficients [..., bh, bw, c*size*size].
    size: side of a block in pixels.

  Returns:
    Coefficients of the same shape: block rows reversed, odd u negated.

  Raises:
    ValueError: fewer than 3 axes, or channels not a multiple of size*size.

  Example:
    >>> block_flip_up_down(jnp.arange(4.0).reshape(1, 1, 4), size=2).ravel().tolist()
    [0.0, 1.0, -2.0, -3.0]
  """
  x = _blocks('block_flip_up_down', coef, size)
  return _flat(_mirror(x, -2))


def block_transpose(coef: jax.Array, *, size: int = 8) -> jax.Array:
  """The coefficients of the transposed image (rows become columns); exact, any dtype (kept).

  Args:
    coef: coefficients [..., bh, bw, c*size*size].
    size: side of a block in pixels.

  Returns:
    Coefficients [..., bw, bh, c*size*size].

  Raises:
    ValueError: fewer than 3 axes, or channels not a multiple of size*size.

  Example:
    >>> block_transpose(jnp.arange(4).reshape(1, 1, 4), size=2).ravel().tolist()
    [0, 2, 1, 3]
  """
  return _flat(_move_blocks(_blocks('block_transpose', coef, size), _TRANSPOSED))


def block_rot90(coef: jax.Array, k: int = 1, *, size: int = 8) -> jax.Array:
  """The coefficients of the image rotated by k * 90 degrees counter-clockwise, as `np.rot90`.

  Args:
    coef: coefficients [..., bh, bw, c*size*size], any signed dtype (kept); exact.
    k: number of quarter turns; negative turns clockwise.
    size: side of a block in pixels.

  Returns:
    Coefficients [..., bh, bw, c*size*size], bh and bw exchanged for odd `k`.

  Raises:
    ValueError: fewer than 3 axes, or channels not a multiple of size*size.

  Example:
    >>> block_rot90(jnp.arange(4.0).reshape(1, 1, 4), size=2).ravel().tolist()
    [0.0, 2.0, -1.0, -3.0]
  """
  x = _blocks('block_rot90', coef, size)
  if k % 2:
    x = _move_blocks(x, _TRANSPOSED)
  if k % 4 in (1, 2):
    x = _mirror(x, -2)
  if k % 4 in (2, 3):
    x = _mirror(x, -1)
  return _flat(x)


def block_merge(coef: jax.Array, factor: int = 2, *, size: int = 8) -> jax.Array:
  """Joins neighbouring blocks into one larger block: the same image, another block size.

  Args:
    coef: coefficients [..., bh, bw, c*size*size]; floating dtypes are kept, integers become
      float32.
    factor: blocks joined per axis.
    size: side of the given blocks in pixels.

  Returns:
    Coefficients [..., bh/factor, bw/factor, c*(size*factor)**2] of blocks of size*factor.

  Raises:
    ValueError: bh or bw not a multiple of `factor`, or channels not a multiple of size*size.

  Example:
    >>> x = jnp.arange(256.0).reshape(16, 16, 1)
    >>> bool(jnp.allclose(block_merge(block_dct(x)), block_dct(x, 16), atol=1e-3))
    True

  References:
    Z = A [B00 B01; B10 B11] A^T with A = D_16 blockdiag(D_8^T, D_8^T): Park and Johnson, "RGB no
    more", CVPR 2023.
  """
  _check_factors('block_merge', factor)
  matrix = _merge_matrix(size, factor).reshape(1, size * factor, factor, size)
  return _regroup('block_merge', coef, size, ((matrix, matrix),))


def block_split(coef: jax.Array, factor: int = 2, *, size: int = 16) -> jax.Array:
  """Cuts every block into factor x factor smaller ones: inverse of `block_merge`.

  Args:
    coef: coefficients [..., bh, bw, c*size*size]; floating dtypes are kept, integers become
      float32.
    factor: pieces per axis, a divisor of `size`.
    size: side of the given, large blocks in pixels.

  Returns:
    Coefficients [..., bh*factor, bw*factor, c*(size/factor)**2] of blocks of size/factor.

  Raises:
    ValueError: `factor` does not divide `size`, or channels not a multiple of size*size.

  Example:
    >>> block_split(jnp.zeros((2, 3, 256)), size=16).shape
    (4, 6, 64)
  """
  _check_factors('block_split', factor)
  if size % factor:
    raise ValueError(f'block_split: blocks of {size} cannot be cut into {factor} equal pieces.')
  matrix = _merge_matrix(size // factor, factor).T.reshape(factor, size // factor, 1, size)
  return _regroup('block_split', coef, size, ((matrix, matrix),))


def block_resize(
  coef: jax.Array,
  up: int | tuple[int, int] = 1,
  down: int | tuple[int, int] = 1,
  *,
  size: int = 8,
) -> jax.Array:
  """Resizes the image by up/down per axis in the DCT domain, keeping the block size.

  Enlarging puts each block into the low frequencies of a block `up` times as large and splits
  it; reducing merges `down` blocks and keeps the low frequencies. Both scale by the square root
  of the area, so grey levels stay. Enlarging first, then reducing: cost grows with up and down,
  and reducing by what was enlarged is the identity.

  Args:
    coef: coefficients [..., bh, bw, c*size*size]; floating dtypes are kept, integers become
      float32.
    up: factor of enlargement, one number or (vertical, horizontal).
    down: factor of reduction, likewise.
    size: side of a block in pixels, before and after.

  Returns:
    Coefficients [..., bh*up/down, bw*up/down, c*size*size].

  Raises:
    ValueError: a factor below 1, bh*up or bw*up not a multiple of `down`, or channels not a
      multiple of size*size.

  Example:
    >>> grey = block_dct(jnp.full((16, 16, 1), 5.0))
    >>> block_resize(grey, up=3, down=2)[..., 0].tolist()
    [[40.0, 40.0, 40.0], [40.0, 40.0, 40.0], [40.0, 40.0, 40.0]]

  References:
    Dugad and Ahuja, "A fast scheme for image size change in the compressed domain", 2001; Park
    and Johnson, "RGB no more", CVPR 2023.
  """

  def enlarge(p):
    matrix = _merge_matrix(size, p).T[:, :size] * math.sqrt(p)
    return matrix.reshape(p, size, 1, size)

  def reduce(q):
    return (_merge_matrix(size, q)[:size] / math.sqrt(q)).reshape(1, size, q, size)

  up_v, up_h = (up, up) if isinstance(up, int) else up
  down_v, down_h = (down, down) if isinstance(down, int) else down
  _check_factors('block_resize', up_v, up_h, down_v, down_h)
  steps = []
  if up_v > 1 or up_h > 1:
    steps.append((enlarge(up_v), enlarge(up_h)))
  if down_v > 1 or down_h > 1:
    steps.append((reduce(down_v), reduce(down_h)))
  return _regroup('block_resize', coef, size, steps)


def _both_axes(x: jax.Array, basis: np.ndarray) -> jax.Array:
  """Applies a [b, b] matrix along each of the last two axes."""
  b = len(basis)
  if b > _LARGEST_KRONECKER:
    return contract(contract(x, basis, -1), basis, -2)
  kronecker = jnp.asarray(np.kron(basis, basis).T, x.dtype)
  y = jnp.matmul(x.reshape(*x.shape[:-2], b * b), kronecker, precision='highest')
  return y.reshape(x.shape)


def _move_blocks(x: jax.Array, last_five: tuple[int, ...]) -> jax.Array:
  """Permutes the last five axes, leaves those before them."""
  return x.transpose(*range(x.ndim - 5), *(x.ndim + a for a in last_five))


def _mirror(x: jax.Array, axis: int) -> jax.Array:
  """Mirrors the image along -2 (vertically) or -1: blocks change places, odd cosines their sign."""
  odd = (np.arange(x.shape[axis]) % 2 == 1).reshape((-1, 1) if axis == -2 else -1)
  x = jnp.flip(x, axis - 3)
  return jnp.where(jnp.broadcast_to(odd, x.shape), -x, x)


def _reorder(name: str, coef: jax.Array, order: np.ndarray, size: int) -> jax.Array:
  components = _components(name, coef, size)
  channels = np.concatenate([order + size * size * i for i in range(components)])
  return jnp.take(coef, channels, axis=-1)


@functools.lru_cache(maxsize=64)
def _merge_matrix(size: int, factor: int) -> np.ndarray:
  """A = D_{LN} blockdiag(D_N^T, ...): L stacked blocks of N coefficients to one of L*N."""
  small, large = _basis(2, size, 'ortho'), _basis(2, size * factor, 'ortho')
  return large @ np.kron(np.eye(factor), small.T)


@functools.partial(jax.jit, static_argnums=(0, 2), inline=True)
def _regroup(name, coef, size, steps):
  """Applies pairs of [out block, out frequency, in block, in frequency] to rows and columns."""
  dtype = floating(coef.dtype)
  x = _blocks(name, coef, size).astype(accumulator(dtype))
  for rows, columns in steps:
    *lead, bh, bw, c, s, _ = x.shape
    p, t, k, _ = rows.shape
    q, _, m, _ = columns.shape
    if bh % k or bw % m:
      raise ValueError(
        f'{name} joins {k} x {m} blocks, which does not divide the grid of {bh} x {bw} blocks; '
        'crop or pad it by whole blocks first.'
      )
    x = x.reshape(*lead, bh // k, k, bw // m, m, c, s, s)
    rows, columns = rows.astype(x.dtype), columns.astype(x.dtype)
    x = jnp.einsum('...ykxmcuv,ptku->...ypxmctv', x, rows, precision='highest')
    x = jnp.einsum('...ypxmctv,qsmv->...ypxqcts', x, columns, precision='highest')
    x = x.reshape(*lead, bh // k * p, bw // m * q, c, t, t)
  return _flat(x).astype(dtype)


def _flat(x: jax.Array) -> jax.Array:
  """[..., bh, bw, c, b, b] -> [..., bh, bw, c*b*b]."""
  return x.reshape(*x.shape[:-3], math.prod(x.shape[-3:]))


def _blocks(name: str, coef: jax.Array, size: int) -> jax.Array:
  """[..., bh, bw, c*b*b] -> [..., bh, bw, c, b, b]."""
  components = _components(name, coef, size)
  if coef.ndim < 3:
    raise ValueError(
      f'{name} needs coefficients [..., bh, bw, channels], got coef: {list(coef.shape)}.'
    )
  return jnp.asarray(coef).reshape(*coef.shape[:-1], components, size, size)


def _components(name: str, coef: jax.Array, size: int) -> int:
  _check_size(size)
  if coef.ndim < 1 or coef.shape[-1] % (size * size):
    raise ValueError(
      f'{name}(size={size}) needs a multiple of {size * size} channels, got coef: '
      f'{list(coef.shape)}. A channel subset must be put back among its zeros first.'
    )
  return coef.shape[-1] // (size * size)


def _check_image(name: str, x: jax.Array, size: int) -> None:
  _check_size(size)
  if x.ndim < 3:
    raise ValueError(f'{name} needs an image [..., h, w, c], got x: {list(x.shape)}.')
  h, w = x.shape[-3:-1]
  if h % size or w % size:
    raise ValueError(
      f'{name}(size={size}) needs height and width divisible by {size}, got x: {list(x.shape)}.\n'
      f'  Pad first (fqjax.ops.pad_to(x, {size})) or crop to {h - h % size} x {w - w % size}.'
    )


def _check_size(size: int) -> None:
  if size < 1:
    raise ValueError(f'a block has at least 1 pixel a side, got size={size}.')


def _check_factors(name: str, *factors: int) -> None:
  if min(factors) < 1:
    raise ValueError(f'{name}: factors are whole numbers of at least 1, got {factors}.')
