"""Encoded images: open, decode, encode, and say exactly what is wrong with a damaged one."""

from collections.abc import Iterator
import contextlib
import io
import re
import struct
from typing import Any
import zlib

import numpy as np
from PIL import Image, UnidentifiedImageError

# A header may promise any size; beyond this it is an attack or a mistake, not a photograph.
MAX_PIXELS = 2**27
MAX_BYTES = 2**29

EXTENSIONS = ('.jpg', '.jpeg', '.png', '.bmp', '.webp', '.ppm', '.tif', '.tiff', '.gif')


class CorruptImageError(ValueError):
  """An image that cannot be decoded.

  Attributes:
    name: file (for a member of a container: `container!member` or `container[record]`).
    offset: byte at which decoding stopped, counted from the start of that file or member;
      None if unknown.
    reason: what the decoder said.
  """

  def __init__(self, name: str, reason: str, offset: int | None = None):
    where = '' if offset is None else f' at byte {offset}'
    super().__init__(f'cannot decode {name}{where}: {reason}')
    self.name, self.reason, self.offset = name, reason, offset

  def __reduce__(self):
    return CorruptImageError, (self.name, self.reason, self.offset)


@contextlib.contextmanager
def _decoding(name: str, stream: io.BytesIO) -> Iterator[None]:
  """Turns what Pillow raises on damaged bytes into a `CorruptImageError`."""
  try:
    yield
  except CorruptImageError:
    raise
  except UnidentifiedImageError as e:
    raise CorruptImageError(name, 'not an image in any known format', 0) from e
  # Pillow's plugins let these through on hostile bytes; anything else is a mistake of ours.
  except (OSError, SyntaxError, ValueError, EOFError, IndexError, TypeError, OverflowError,
          struct.error, zlib.error, Image.DecompressionBombError) as e:  # fmt: skip
    unread = re.search(r'\((\d+) bytes not processed\)', str(e))
    offset = stream.tell() - (int(unread[1]) if unread else 0)
    raise CorruptImageError(name, str(e) or type(e).__name__, offset) from e


def open_image(data: bytes, name: str = 'image') -> Image.Image:
  """Opens an encoded image: its header is read and checked, no pixel is decoded yet.

  Args:
    data: the bytes of a JPEG, PNG or any other format Pillow knows.
    name: what errors call it.

  Returns:
    A Pillow image; its pixels are decoded by `load_rgb`.

  Raises:
    CorruptImageError: unknown format, or more pixels than a photograph has.
  """
  stream = io.BytesIO(data)
  with _decoding(name, stream):
    image = Image.open(stream)
    if image.width * image.height > MAX_PIXELS:
      reason = f'{image.width} x {image.height} pixels is more than the limit of {MAX_PIXELS}'
      raise CorruptImageError(name, reason, 0)
  return image


def load_rgb(image: Image.Image, name: str = 'image', draft: tuple[int, int] | None = None):
  """Decodes an opened image to RGB.

  Args:
    image: from `open_image`.
    name: what errors call it.
    draft: (width, height) the result must at least have; a JPEG may then be decoded at 1/2, 1/4
      or 1/8 of its size, which is faster and changes pixel values.

  Returns:
    A Pillow image of mode RGB. Grey becomes three equal channels, alpha is dropped, and an EXIF
    rotation is not applied (published ImageNet pipelines do not apply it either).

  Raises:
    CorruptImageError: truncated or damaged data.
  """
  stream = image.fp if isinstance(image.fp, io.BytesIO) else io.BytesIO()  # type: ignore[attr-defined]
  with _decoding(name, stream):
    if draft is not None:
      image.draft('RGB', draft)
    return image.convert('RGB')


def decode_image(data: bytes, name: str = 'image') -> np.ndarray:
  """Decodes JPEG, PNG, ... bytes to pixels.

  Args:
    data: the encoded image.
    name: what errors call it.

  Returns:
    uint8 [height, width, 3].

  Raises:
    CorruptImageError: with name and byte offset.

  Example:
    >>> decode_image(encode_jpeg(np.full((8, 16, 3), 200, np.uint8)))[0, 0]
    array([200, 200, 200], dtype=uint8)
  """
  return np.asarray(load_rgb(open_image(data, name), name))


def encode_jpeg(image: np.ndarray, quality: int = 95, subsampling: str = '4:4:4') -> bytes:
  r"""Encodes uint8 [height, width, 3] pixels as JPEG.

  Example:
    >>> encode_jpeg(np.zeros((8, 8, 3), np.uint8))[:2]
    b'\xff\xd8'
  """
  out = io.BytesIO()
  Image.fromarray(image).save(out, 'JPEG', quality=quality, subsampling=subsampling)
  return out.getvalue()


def pixels(example: dict[str, Any]) -> np.ndarray:
  """The decoded image of an example, uint8 [height, width, 3].

  Raises:
    ValueError: the example holds stored coefficients instead.
    CorruptImageError: the image cannot be decoded.
  """
  image = example.get('image')
  if image is None:
    raise ValueError(
      f'this example holds {sorted(example)} and no pixels. Stored coefficients are cropped and '
      'flipped on the device: fqjax.data.InputSpec(flip=True, crop_blocks=...).'
    )
  if isinstance(image, bytes):
    return decode_image(image, example.get('name', 'image'))
  return image
