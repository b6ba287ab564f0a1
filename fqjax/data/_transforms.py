"""Augmentation on the host: functions (example, rng) -> example, on pixels or encoded bytes."""

from collections.abc import Callable
import math
from typing import Any, Literal

import numpy as np
from PIL import Image

from fqjax.data import _images

Example = dict[str, Any]
Transform = Callable[[Example, np.random.Generator], Example]
Box = tuple[int, int, int, int]

_FILTERS = {
  'nearest': Image.Resampling.NEAREST,
  'bilinear': Image.Resampling.BILINEAR,
  'bicubic': Image.Resampling.BICUBIC,
  'lanczos': Image.Resampling.LANCZOS,
}


def _filter(name: str) -> Image.Resampling:
  if name not in _FILTERS:
    raise ValueError(f'resample={name!r} is unknown; choose from {", ".join(_FILTERS)}.')
  return _FILTERS[name]


def _opened(example: Example) -> tuple[Image.Image, str]:
  """The example's image as a Pillow image whose pixels need not be decoded yet."""
  image, name = example.get('image'), example.get('name', 'image')
  if isinstance(image, bytes):
    return _images.open_image(image, name), name
  image = _images.pixels(example)
  return Image.fromarray(image[..., 0] if image.shape[-1] == 1 else image), name


def _resized(
  example: Example, box: Box, size: tuple[int, int], resample: Image.Resampling, draft: bool,
  opened: tuple[Image.Image, str],
) -> Example:  # fmt: skip
  """Cuts `box` = (left, top, width, height) out and resizes it to `size` = (width, height)."""
  image, name = opened
  left, top, width, height = box
  if isinstance(example['image'], bytes):
    full = image.size
    target = None
    if draft:
      # The smallest decoded size in which the box still has the pixels we need.
      scale = min(1.0, max(size[0] / width, size[1] / height))
      target = (math.ceil(full[0] * scale), math.ceil(full[1] * scale))
    image = _images.load_rgb(image, name, target)
    if image.size != full:
      sx, sy = image.size[0] / full[0], image.size[1] / full[1]
      left, width = round(left * sx), max(1, round(width * sx))
      top, height = round(top * sy), max(1, round(height * sy))
  # Cut before resizing: with `resize(box=...)` the filter would look beyond the box.
  image = image.crop((left, top, left + width, top + height))
  if image.size != size:
    image = image.resize(size, resample)
  out = np.asarray(image)
  return {**example, 'image': out if out.ndim == 3 else out[..., None]}


def crop_box(
  rng: np.random.Generator,
  height: int,
  width: int,
  scale: tuple[float, float] = (0.08, 1.0),
  ratio: tuple[float, float] = (3 / 4, 4 / 3),
  rule: Literal['log_uniform', 'uniform'] = 'log_uniform',
) -> Box:
  """Draws the box of a random-resized crop: (left, top, width, height).

  The area is uniform in `scale` times the image's. 'log_uniform' draws the aspect ratio uniformly
  in its logarithm and falls back to the largest central crop within `ratio`; 'uniform', the older
  rule of the published DCT runs, draws it uniformly, swaps the sides half of the time, and falls
  back to the central square.

  Example:
    >>> left, top, width, height = crop_box(np.random.default_rng(0), 60, 80)
    >>> left + width <= 80 and top + height <= 60
    True

  Source: Szegedy et al. 2015, section 6, in the two versions torchvision has had.
  """
  area = height * width
  for _ in range(10):
    target = area * rng.uniform(*scale)
    if rule == 'log_uniform':
      aspect = math.exp(rng.uniform(math.log(ratio[0]), math.log(ratio[1])))
    else:
      aspect = rng.uniform(*ratio)
    w, h = round(math.sqrt(target * aspect)), round(math.sqrt(target / aspect))
    if rule == 'uniform' and rng.random() < 0.5:
      w, h = h, w
    if 0 < w <= width and 0 < h <= height:
      return int(rng.integers(width - w + 1)), int(rng.integers(height - h + 1)), w, h
  if rule == 'uniform':
    w = h = min(width, height)
  else:
    aspect = min(max(width / height, ratio[0]), ratio[1])
    w = min(width, max(1, round(height * aspect)))
    h = min(height, max(1, round(width / aspect)))
  return (width - w) // 2, (height - h) // 2, w, h


def random_resized_crop(
  size: int,
  scale: tuple[float, float] = (0.08, 1.0),
  ratio: tuple[float, float] = (3 / 4, 4 / 3),
  rule: Literal['log_uniform', 'uniform'] = 'log_uniform',
  *,
  resample: str = 'bilinear',
  draft: bool = False,
) -> Transform:
  """Cuts a random box and resizes it to `size` x `size` (see `crop_box` for the rules).

  Args:
    size: side of the result in pixels.
    scale: range of the box's area as a fraction of the image's.
    ratio: range of width / height of the box.
    rule: 'log_uniform' (default) or 'uniform' (the published DCT runs).
    resample: 'nearest', 'bilinear' (with anti-aliasing), 'bicubic' or 'lanczos'.
    draft: let the JPEG decoder work at reduced size where the box allows; faster, other pixels.

  Returns:
    A transform; the image becomes uint8 [size, size, 3].

  Raises:
    ValueError: an unknown rule or filter.

  Example:
    >>> rng = np.random.default_rng(0)
    >>> example = {'image': np.zeros((40, 60, 3), np.uint8), 'label': 0}
    >>> random_resized_crop(32)(example, rng)['image'].shape
    (32, 32, 3)
  """
  if rule not in ('log_uniform', 'uniform'):
    raise ValueError(f"rule={rule!r} is unknown; choose 'log_uniform' or 'uniform'.")
  resampling = _filter(resample)

  def apply(example: Example, rng: np.random.Generator) -> Example:
    opened = _opened(example)
    width, height = opened[0].size
    box = crop_box(rng, height, width, scale, ratio, rule)
    return _resized(example, box, (size, size), resampling, draft, opened)

  return apply


def _shorter_side(width: int, height: int, size: int) -> tuple[int, int]:
  if width <= height:
    return size, int(size * height / width)
  return int(size * width / height), size


def resize(
  size: int | tuple[int, int], *, resample: str = 'bilinear', draft: bool = False
) -> Transform:
  """Resizes the shorter side to `size`, or to exactly `size` = (height, width).

  Example:
    >>> example = {'image': np.zeros((40, 60, 3), np.uint8), 'label': 0}
    >>> resize(20)(example, np.random.default_rng(0))['image'].shape
    (20, 30, 3)
  """
  resampling = _filter(resample)

  def apply(example: Example, rng: np.random.Generator) -> Example:
    del rng
    opened = _opened(example)
    width, height = opened[0].size
    target = _shorter_side(width, height, size) if isinstance(size, int) else (size[1], size[0])
    return _resized(example, (0, 0, width, height), target, resampling, draft, opened)

  return apply


def center_crop(size: int) -> Transform:
  """Cuts the central `size` x `size` pixels.

  Raises (when applied):
    ValueError: the image is smaller than that.

  Example:
    >>> example = {'image': np.arange(5 * 5 * 3).reshape(5, 5, 3), 'label': 0}
    >>> center_crop(1)(example, np.random.default_rng(0))['image'].ravel()
    array([36, 37, 38])
  """

  def apply(example: Example, rng: np.random.Generator) -> Example:
    del rng
    image = _images.pixels(example)
    height, width = image.shape[:2]
    if size > height or size > width:
      raise ValueError(
        f'center_crop({size}) of {example.get("name", "an image")}, which has {height} x {width} '
        f'pixels: resize first (fqjax.data.resize_crop({size}, {size})).'
      )
    top, left = round((height - size) / 2), round((width - size) / 2)
    return {**example, 'image': image[top : top + size, left : left + size]}

  return apply


def resize_crop(
  resize_to: int, crop: int, *, resample: str = 'bilinear', draft: bool = False
) -> Transform:
  """Resizes the shorter side, then cuts the centre: the usual evaluation view.

  Example:
    >>> example = {'image': np.zeros((40, 60, 3), np.uint8), 'label': 0}
    >>> resize_crop(36, 32)(example, np.random.default_rng(0))['image'].shape
    (32, 32, 3)
  """
  if crop > resize_to:
    raise ValueError(f'resize_crop({resize_to}, {crop}): the crop is larger than the image left.')
  return chain(resize(resize_to, resample=resample, draft=draft), center_crop(crop))


def random_flip(p: float = 0.5) -> Transform:
  """Mirrors left and right with probability `p`.

  Example:
    >>> example = {'image': np.arange(6, dtype=np.uint8).reshape(1, 2, 3), 'label': 0}
    >>> random_flip(1.0)(example, np.random.default_rng(0))['image'].ravel()
    array([3, 4, 5, 0, 1, 2], dtype=uint8)
  """

  def apply(example: Example, rng: np.random.Generator) -> Example:
    if rng.random() >= p:
      return example
    return {**example, 'image': _images.pixels(example)[:, ::-1]}

  return apply


def pad_crop(pad: int) -> Transform:
  """Pads with zeros (black) on all sides and cuts the original size at a random place.

  Source: He et al. 2016, section 4.2 (CIFAR).

  Example:
    >>> example = {'image': np.ones((4, 4, 3), np.uint8), 'label': 0}
    >>> pad_crop(2)(example, np.random.default_rng(0))['image'].shape
    (4, 4, 3)
  """

  def apply(example: Example, rng: np.random.Generator) -> Example:
    image = _images.pixels(example)
    height, width = image.shape[:2]
    # How far the picture moves; only the part that stays inside is copied.
    dy, dx = (rng.integers(-pad, pad + 1, 2)).tolist()
    out = np.zeros_like(image)
    out[max(0, dy) : height + min(0, dy), max(0, dx) : width + min(0, dx)] = image[
      max(0, -dy) : height + min(0, -dy), max(0, -dx) : width + min(0, -dx)
    ]
    return {**example, 'image': out}

  return apply


def chain(*transforms: Transform) -> Transform:
  """Applies transforms one after the other, with one random stream.

  Example:
    >>> example = {'image': np.ones((4, 4, 3), np.uint8), 'label': 0}
    >>> chain(pad_crop(1), random_flip())(example, np.random.default_rng(0))['image'].shape
    (4, 4, 3)
  """

  def apply(example: Example, rng: np.random.Generator) -> Example:
    for transform in transforms:
      example = transform(example, rng)
    return example

  return apply
