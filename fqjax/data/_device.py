"""From what the host sends (uint8 pixels or int16 coefficients) to the network's input, on device."""

from collections.abc import Iterable, Mapping
import dataclasses
import functools
import math
from typing import Any, Literal, cast

import jax
import jax.numpy as jnp
import numpy as np

from fqjax import ops

# A channel that varies less than this, in grey levels, is constant: there is nothing to scale.
_CONSTANT = 1e-3


@dataclasses.dataclass(frozen=True)
class InputSpec:
  """What arrives on the device and what the network gets; hashable, so that jit takes it static.

  Attributes:
    kind: 'rgb': pixels. 'dct': block-DCT coefficients of YCbCr, computed on the device or sent.
      'rgb_half_idct': RGB of half the size from the low-frequency corner of each block, as a
      decoder with scaled inverse DCT gives it.
    size: side of the square image that arrives, in pixels, or (height, width).
    block: side of a block in pixels.
    channels: DCT channels to keep, in this order; a name or number for `channel_subset` works too;
      None keeps all.
    chroma: 'filtered' or 'full', see `fqjax.ops.rgb_to_coefficients`; 'dct' from pixels only.
    rounding: round as a JPEG codec does.
    mean: subtracted per output channel; grey levels or coefficient units. None is 0.
    std: divided by, after the mean. None is 1.
    flip: in training, mirror each image with probability 1/2.
    crop_blocks: side of the crop in blocks: at a random place in training (a block for coefficients,
      any pixel for 'rgb'), central otherwise. None takes everything.

  Raises:
    ValueError: when the parts do not fit together.

  Example:
    >>> spec = InputSpec('dct', 64, channels='square24')
    >>> spec.output_shape, spec.input_bytes
    ((8, 8, 24), 3072)
  """

  kind: Literal['rgb', 'dct', 'rgb_half_idct']
  size: int | tuple[int, int]
  block: int = 8
  channels: tuple[int, ...] | str | int | None = None
  chroma: Literal['filtered', 'full'] = 'filtered'
  rounding: bool = True
  mean: tuple[float, ...] | None = None
  std: tuple[float, ...] | None = None
  flip: bool = False
  crop_blocks: int | None = None

  def __post_init__(self):
    if self.kind not in ('rgb', 'dct', 'rgb_half_idct'):
      raise ValueError(f"kind is 'rgb', 'dct' or 'rgb_half_idct', got {self.kind!r}.")
    if self.chroma not in ('filtered', 'full'):
      raise ValueError(f"chroma is 'filtered' or 'full', got {self.chroma!r}.")
    height, width = self._sides
    if (self.kind != 'rgb' or self.crop_blocks) and (height % self.block or width % self.block):
      raise ValueError(
        f'{height} x {width} pixels are not divisible into blocks of {self.block}; '
        f'resize or crop to {height - height % self.block} x {width - width % self.block}.'
      )
    if self.kind == 'rgb_half_idct' and self.block % 2:
      raise ValueError(f'a block of {self.block} has no half: rgb_half_idct needs an even block.')
    if self.crop_blocks is not None and not (
      1 <= self.crop_blocks <= min(height, width) // self.block
    ):
      raise ValueError(
        f'crop_blocks={self.crop_blocks} does not fit into '
        f'{height // self.block} x {width // self.block} blocks.'
      )
    self._freeze_channels()
    for name in ('mean', 'std'):
      self._freeze_vector(name)
    if self.std is not None and min(self.std) <= 0:
      raise ValueError(
        f'std must be positive, channel {int(np.argmin(self.std))} is {min(self.std)}.'
      )

  def _freeze_channels(self):
    channels = self.channels
    if channels is None:
      return
    if self.kind != 'dct':
      raise ValueError(f'kind={self.kind!r} has no DCT channels to choose from: channels=None.')
    if isinstance(channels, (str, int)):
      channels = ops.channel_subset(channels, self.block)
    channels = tuple(int(c) for c in channels)
    count = 3 * self.block**2
    wrong = [c for c in channels if not 0 <= c < count]
    if wrong or not channels or len(set(channels)) < len(channels):
      raise ValueError(
        f'channels are distinct numbers in 0..{count - 1} for blocks of {self.block}, '
        f'got {wrong or channels}.'
      )
    object.__setattr__(self, 'channels', channels)

  def _freeze_vector(self, name: str):
    vector = getattr(self, name)
    if vector is None:
      return
    vector = tuple(float(v) for v in np.asarray(vector).ravel())
    if len(vector) != self.num_channels:
      raise ValueError(
        f'{name} has {len(vector)} numbers, the network gets {self.num_channels} channels.'
      )
    object.__setattr__(self, name, vector)

  @property
  def _sides(self) -> tuple[int, int]:
    return (self.size, self.size) if isinstance(self.size, int) else self.size

  @property
  def _kept(self) -> tuple[int, ...]:
    """Coefficient channels that are used, for the kinds that have any."""
    if self.kind == 'rgb_half_idct':
      b, half = self.block, range(self.block // 2)
      return tuple(b * b * i + b * u + v for i in range(3) for u in half for v in half)
    return tuple(range(3 * self.block**2)) if self.channels is None else cast(tuple, self.channels)

  @property
  def num_channels(self) -> int:
    """Channels the network gets."""
    return len(self._kept) if self.kind == 'dct' else 3

  @property
  def output_shape(self) -> tuple[int, int, int]:
    """Height, width and channels the network gets, per image."""
    height, width = self._sides
    if self.crop_blocks is not None:
      height = width = self.crop_blocks * self.block
    scale = {'rgb': 1, 'dct': self.block, 'rgb_half_idct': 2}[self.kind]
    return height // scale, width // scale, self.num_channels

  @property
  def values(self) -> int:
    """Numbers the network gets per image."""
    return math.prod(self.output_shape)

  @property
  def input_bytes(self) -> int:
    """Bytes per image as sent: int16 coefficients that are kept, uint8 pixels otherwise.

    Before a crop on the device; 'rgb_half_idct' counts the pixels a decoder would send.
    """
    height, width = self._sides
    if self.kind == 'dct':
      return 2 * (height // self.block) * (width // self.block) * self.num_channels
    scale = 2 if self.kind == 'rgb_half_idct' else 1
    return (height // scale) * (width // scale) * 3


@functools.partial(jax.jit, static_argnames=('spec', 'train'))
def preprocess(
  spec: InputSpec, images: jax.Array, key: jax.Array | None = None, *, train: bool = False
) -> jax.Array:
  """The network's input: colour, block DCT, random flip and crop, channels, normalisation.

  Flip and crop happen to the coefficients, exactly: a mirrored image has its blocks in reverse order
  and its odd horizontal frequencies negated. Sample i draws from `fold_in(key, i)`, so neither the
  sharding of the batch nor its length changes what happens to a sample.

  Args:
    spec: what arrives and what is wanted; static.
    images: uint8 [n, height, width, 3]; or, unless the kind is 'rgb', int16 or floating
      coefficients [n, height/block, width/block, c] with all channels or those of the spec.
    key: for `train` with flip or crop.
    train: whether flip and crop are random; without it nothing is flipped and the crop is central.

  Returns:
    float32 [n, *spec.output_shape].

  Raises:
    TypeError: for another dtype.
    ValueError: for another shape, or a missing key.

  Example:
    >>> import jax.numpy as jnp
    >>> spec = InputSpec('dct', 16, channels=(0, 64, 128))
    >>> preprocess(spec, jnp.full((1, 16, 16, 3), 200, jnp.uint8))[0, 0, 0].tolist()
    [576.0, 0.0, 0.0]

  References:
    Xu et al., "Learning in the Frequency Domain", CVPR 2020; flips as in Park and Johnson, "RGB no
    more", CVPR 2023.
  """
  x = _pixels(spec, images) if spec.kind == 'rgb' else _coefficients(spec, images)
  if train and (spec.flip or spec.crop_blocks is not None):
    if key is None:
      raise ValueError(
        'random flip and crop need a key: preprocess(spec, images, key, train=True).'
      )
    x = _augment(spec, x, key)
  elif spec.crop_blocks is not None:
    side = _crop_side(spec)
    top, left = (x.shape[1] - side) // 2, (x.shape[2] - side) // 2
    x = x[:, top : top + side, left : left + side]
  x = x.astype(jnp.float32)
  if spec.kind == 'rgb_half_idct':
    x = _half_size_rgb(spec, x)
  if spec.mean is not None:
    x = x - jnp.asarray(spec.mean, jnp.float32)[None, None, None]
  if spec.std is not None:
    x = x * jnp.asarray(1 / np.asarray(spec.std), jnp.float32)[None, None, None]
  return x


def _pixels(spec: InputSpec, images: jax.Array) -> jax.Array:
  height, width = spec._sides
  if images.dtype != jnp.uint8:
    raise TypeError(
      f'kind={spec.kind!r} takes uint8 pixels 0..255, got {images.dtype} {list(images.shape)}.'
    )
  if images.ndim != 4 or images.shape[1:] != (height, width, 3):
    raise ValueError(
      f'the spec says pixels [n, {height}, {width}, 3], got {list(images.shape)}; '
      f'resize on the host or change InputSpec.size.'
    )
  return images


def _coefficients(spec: InputSpec, images: jax.Array) -> jax.Array:
  """Coefficients of the kept channels, from pixels or as sent."""
  b, kept = spec.block, spec._kept
  if images.dtype == jnp.uint8:
    # A decoder with scaled inverse DCT meets the chroma of the file, not a filtered one.
    x = ops.rgb_to_coefficients(
      _pixels(spec, images),
      size=b,
      chroma=spec.chroma if spec.kind == 'dct' else 'full',
      rounding=spec.rounding,
    )
  elif images.dtype == jnp.int16 or jnp.issubdtype(images.dtype, jnp.floating):
    x = images
    height, width = spec._sides
    grid = (height // b, width // b)
    if x.ndim != 4 or x.shape[1:3] != grid or x.shape[3] not in (3 * b * b, len(kept)):
      counts = ' or '.join(str(c) for c in sorted({3 * b * b, len(kept)}))
      raise ValueError(
        f'the spec says coefficients [n, {grid[0]}, {grid[1]}, {counts}], got {list(x.shape)}.'
      )
  else:
    raise TypeError(
      f'kind={spec.kind!r} takes uint8 pixels or int16 or floating coefficients, got '
      f'{images.dtype} {list(images.shape)}; convert with astype(np.int16) if they are coefficients.'
    )
  # Whoever sends fewer than all channels sends those of the spec.
  if x.shape[-1] < 3 * b * b or kept == tuple(range(3 * b * b)):
    return x
  return x[..., np.array(kept)]


def _crop_side(spec: InputSpec) -> int:
  assert spec.crop_blocks is not None
  return spec.crop_blocks * (spec.block if spec.kind == 'rgb' else 1)


def _augment(spec: InputSpec, x: jax.Array, key: jax.Array) -> jax.Array:
  """Random flip, then random crop, per sample."""
  n, rows, columns, c = x.shape
  side = None if spec.crop_blocks is None else _crop_side(spec)
  choices = (2, 1, 1) if side is None else (2, rows - side + 1, columns - side + 1)
  keys = jax.vmap(jax.random.fold_in, (None, 0))(key, jnp.arange(n))
  draw = lambda k: jax.random.randint(k, (3,), 0, jnp.array(choices))
  flip, top, left = jax.vmap(draw)(keys).T
  if spec.flip:
    mirrored = x[:, :, ::-1]
    if spec.kind != 'rgb':
      signs = np.array([1 - 2 * (i % spec.block % 2) for i in spec._kept])
      mirrored = mirrored * jnp.asarray(signs, x.dtype)[None, None, None]
    x = jnp.where((flip == 1)[:, None, None, None], mirrored, x)
  if side is not None:
    cut = lambda image, i, j: jax.lax.dynamic_slice(image, (i, j, 0), (side, side, c))
    x = jax.vmap(cut)(x, top, left)
  return x


def _half_size_rgb(spec: InputSpec, x: jax.Array) -> jax.Array:
  """Inverse DCT of the corners at half size."""
  pixels = (lambda v: jnp.clip(jnp.round(v), 0, 255)) if spec.rounding else (lambda v: v)
  # Orthonormal coefficients of a constant block grow with its side: half the side, half the size.
  ycbcr = ops.block_idct(x / 2, spec.block // 2) + 128
  return pixels(ops.ycbcr_to_rgb(pixels(ycbcr)))


@functools.partial(jax.jit, static_argnames='spec')
def _update(spec, state, images, mask):
  return ops.update_statistics(state, preprocess(spec, images), mask)


def estimate_statistics(spec: InputSpec, batches: Iterable[Any]) -> ops.ChannelStatistics:
  """Mean and pooled standard deviation of the channels a spec gives, in one pass.

  Args:
    spec: its own mean and std are ignored.
    batches: batches as `preprocess` takes them, or dicts with 'image' or 'coefficients' and
      optionally 'mask' (0 leaves an image out). Must end.

  Returns:
    mean, within, between and std, each [spec.num_channels]; see `fqjax.ops.finalize_statistics`.

  Raises:
    ValueError: when there is no image.

  Example:
    >>> import numpy as np
    >>> batches = [np.full((2, 8, 8, 3), level, np.uint8) for level in (10, 30)]
    >>> estimate_statistics(InputSpec('rgb', 8), batches).std.tolist()
    [10.0, 10.0, 10.0]
  """
  spec = dataclasses.replace(spec, mean=None, std=None)
  state = ops.init_statistics(spec.num_channels)
  for batch in batches:
    mask = None
    if isinstance(batch, Mapping):
      mask = batch.get('mask')
      batch = batch['image'] if 'image' in batch else batch['coefficients']
    state = _update(spec, state, batch, mask)
  if int(state.count) == 0:
    raise ValueError('no image to take statistics from: the batches were empty.')
  return ops.finalize_statistics(state)


def spec_with_statistics(
  spec: InputSpec, statistics: ops.ChannelStatistics | Literal['released', 'none']
) -> InputSpec:
  """The spec with its mean and std filled in.

  Args:
    spec: any.
    statistics: from `estimate_statistics` (pooled: what to train with); 'released': the vectors the
      published weights expect, see `fqjax.ops.released_statistics`; 'none': no normalisation.

  Returns:
    The spec; the std of a channel that never varies is 1.

  Raises:
    ValueError: for 'released' with anything but 8x8 DCT blocks, or an unknown name.

  Example:
    >>> spec = spec_with_statistics(InputSpec('dct', 448, channels='square6'), 'released')
    >>> spec.std[:2]
    (260.0, 2.7780001163482666)
  """
  if isinstance(statistics, str):
    if statistics == 'none':
      return dataclasses.replace(spec, mean=None, std=None)
    if statistics != 'released':
      raise ValueError(
        f"statistics are 'released', 'none' or the result of estimate_statistics(spec, batches) "
        f'(pooled), got {statistics!r}.'
      )
    if spec.kind != 'dct' or spec.block != 8:
      raise ValueError(
        f'the released vectors belong to 8x8 DCT blocks, not to kind={spec.kind!r} with '
        f'block={spec.block}; use estimate_statistics.'
      )
    kept = np.array(spec._kept)
    mean, std = (vector[kept] for vector in ops.released_statistics())
  else:
    mean, std = np.asarray(statistics.mean), np.asarray(statistics.std)
    std = np.where(std < _CONSTANT, 1.0, std)
  return dataclasses.replace(spec, mean=tuple(mean.tolist()), std=tuple(std.tolist()))
