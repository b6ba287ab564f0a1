"""How fast one core fills a batch: JPEG to pixels, JPEG to coefficients, stored coefficients.

  python -m benchmarks.input [--images 200] [--json PATH] [--record]

Every route ends in a batch ready to be sent: pixels decoded, cut by a random-resized crop to
224 x 224 and normalised (float32), or int16 coefficients of 56 x 56 blocks and 24 channels. The
pixel routes see the same random boxes. Photographs are the ImageNet sample below FQJAX_DATA_DIR, or
those inside scikit-image, encoded anew, where there is none. Coefficients stored once cannot be
cropped at a random place and scale before they are stored: block-aligned crops and flips happen on
the device.
"""

from collections.abc import Callable
import io
import math
import pathlib
import tempfile

import numpy as np
from PIL import Image

from benchmarks import common
from fqjax import data
from fqjax.data import prepare
from fqjax.ops import channel_subset

SIZE = 224
BLOCKS = 56
CHANNELS = channel_subset('square24', 8)
MEAN = np.array([0.485, 0.456, 0.406], np.float32) * 255
STD = np.array([0.229, 0.224, 0.225], np.float32) * 255


def photographs(n: int) -> tuple[str, list[bytes]]:
  """Encoded photographs and what to call them."""
  try:
    source = data.load_source('imagenet_samples', 'test')
    return 'imagenet_samples', [source.read(i)['image'] for i in range(min(n, len(source)))]
  except FileNotFoundError:
    from fqjax.data import _photo_patches

    encoded = []
    for k, photo in enumerate(_photo_patches._photographs()):
      image = Image.fromarray(photo)
      image.thumbnail((500, 500))
      encoded.append(data.encode_jpeg(np.asarray(image), 92, '4:2:0' if k % 4 == 0 else '4:4:4'))
    return 'photographs of scikit-image', encoded * max(1, n // len(encoded))


def normalise(image: np.ndarray, out: np.ndarray) -> None:
  """uint8 RGB to the float32 a network takes, in place of `out`."""
  np.subtract(image, MEAN, out=out, dtype=np.float32)
  np.divide(out, STD, out=out)


def boxes(images: list[bytes]) -> list[tuple[int, int, int, int]]:
  rng = np.random.default_rng(0)
  sizes = [Image.open(io.BytesIO(b)).size for b in images]
  return [data.crop_box(rng, height, width) for width, height in sizes]


def pillow(encoded: bytes, box, draft: bool) -> np.ndarray:
  left, top, width, height = box
  image = Image.open(io.BytesIO(encoded))
  full = image.size
  if draft:
    scale = min(1.0, max(SIZE / width, SIZE / height))
    image.draft('RGB', (math.ceil(full[0] * scale), math.ceil(full[1] * scale)))
  image = image.convert('RGB')
  f = image.size[0] / full[0]
  part = image.crop(tuple(round(v * f) for v in (left, top, left + width, top + height)))
  return np.asarray(part.resize((SIZE, SIZE), Image.Resampling.BILINEAR))


def _cut(image: np.ndarray, box, full_width: int) -> np.ndarray:
  import cv2

  f = image.shape[1] / full_width
  left, top, width, height = (round(v * f) for v in box)
  part = image[top : top + max(1, height), left : left + max(1, width)]
  # Averaging where it shrinks by much, as anti-aliasing does.
  mode = cv2.INTER_AREA if part.shape[0] > 2 * SIZE else cv2.INTER_LINEAR
  return cv2.resize(part, (SIZE, SIZE), interpolation=mode)


def opencv(encoded: bytes, box, reduced: bool) -> np.ndarray:
  import cv2

  width = Image.open(io.BytesIO(encoded)).size[0]
  half = reduced and min(box[2:]) >= 2 * SIZE
  flag = cv2.IMREAD_REDUCED_COLOR_2 if half else cv2.IMREAD_COLOR
  image = cv2.imdecode(np.frombuffer(encoded, np.uint8), flag)
  return cv2.cvtColor(_cut(image, box, width), cv2.COLOR_BGR2RGB)


def simple(encoded: bytes, box, fast: bool) -> np.ndarray:
  import simplejpeg

  height, width, *_ = simplejpeg.decode_jpeg_header(encoded)
  scale = min(1.0, max(SIZE / box[2], SIZE / box[3])) if fast else 1.0
  image = simplejpeg.decode_jpeg(
    encoded,
    'RGB',
    fastdct=fast,
    fastupsample=fast,
    min_height=math.ceil(height * scale) if fast else 0,
    min_width=math.ceil(width * scale) if fast else 0,
  )
  return _cut(image, box, width)


def pixel_routes(images: list[bytes]) -> dict[str, Callable[[], np.ndarray]]:
  """One call reads all images into one batch."""
  places = boxes(images)
  out = np.empty((len(images), SIZE, SIZE, 3), np.float32)

  def whole(route: Callable, option: bool) -> Callable[[], np.ndarray]:
    def run() -> np.ndarray:
      for i, (encoded, box) in enumerate(zip(images, places, strict=True)):
        normalise(route(encoded, box, option), out[i])
      return out

    return run

  routes = {'pillow': whole(pillow, False), 'pillow, draft': whole(pillow, True)}
  try:
    import cv2

    cv2.setNumThreads(1)
    routes |= {'opencv': whole(opencv, False), 'opencv, reduced': whole(opencv, True)}
    import simplejpeg  # noqa: F401

    routes |= {
      'simplejpeg + opencv': whole(simple, False),
      'simplejpeg + opencv, fast': whole(simple, True),
    }
  except ImportError as e:
    print(f'{e.name} is not installed: its routes are left out (pip install fqjax[bench])')
  return routes


def file_routes(images: list[bytes], folder: pathlib.Path) -> dict[str, Callable[[], int]]:
  """Coefficients straight from JPEG files, dequantised, at the size of the file."""
  try:
    import jpeglib
  except ImportError:
    print('jpeglib is not installed: its route is left out (pip install fqjax[bench])')
    return {}
  paths = []
  for i, encoded in enumerate(images):
    paths.append(folder / f'{i:04d}.jpg')
    paths[-1].write_bytes(encoded)

  def whole(version: str) -> Callable[[], int]:
    def run() -> int:
      total = 0
      with jpeglib.version(version):
        for path in paths:
          file = jpeglib.read_dct(str(path))
          planes = [file.Y] + ([file.Cb, file.Cr] if file.has_chrominance else [])
          for i, plane in enumerate(planes):
            total += (plane * file.get_component_qt(i)).astype(np.int16).size
      return total

    return run

  return {'jpeglib 6b': whole('6b'), 'jpeglib turbo': whole('turbo210')}


def stored_routes(
  images: list[bytes], folder: pathlib.Path
) -> tuple[dict[str, Callable[[], np.ndarray]], dict[str, int]]:
  """Coefficients stored by `prepare`, read back in random order into one batch."""
  (folder / 'in' / 'all').mkdir(parents=True)
  for i, encoded in enumerate(images):
    (folder / 'in' / 'all' / f'{i:04d}.jpg').write_bytes(encoded)
  out = np.empty((len(images), BLOCKS, BLOCKS, len(CHANNELS)), np.int16)
  routes, sizes = {}, {}
  for compression in ('none', 'zstd'):
    plan = prepare.Plan(
      f'folder:{folder}/in', 'all', kind='coefficients', resize=8 * BLOCKS + 64,
      crop=8 * BLOCKS, channels=CHANNELS, compression=compression,
    )  # fmt: skip
    metadata = prepare.prepare(plan, folder / compression)
    source = data.load_source(f'records:{folder}/{compression}', 'all')
    order = np.random.default_rng(0).permutation(len(source)).tolist()

    def run(source=source, order=order) -> np.ndarray:
      for row, i in enumerate(order):
        out[row] = source.read(i)['coefficients']
      return out

    name = f'stored, {compression}'
    routes[name] = run
    sizes[name] = sum(s['bytes'] for s in metadata['shards']) // len(images)
  return routes, sizes


def parse_command(argv=None):
  """Arguments of a command line; raises where the program would not run."""
  parser = common.parser(__doc__)
  parser.add_argument('--images', type=int, default=200)
  return parser.parse_args(argv)


def main(argv=None) -> None:
  args = parse_command(argv)
  name, images = photographs(args.images)
  mean_bytes = sum(map(len, images)) // len(images)
  print(f'{len(images)} of {name}, {mean_bytes:,} bytes each')
  with tempfile.TemporaryDirectory() as folder:
    pixel = pixel_routes(images)
    file = file_routes(images, pathlib.Path(folder))
    stored, disk = stored_routes(images, pathlib.Path(folder))
    seconds = common.compare({**pixel, **file, **stored}, args.repeats)

  speed = {k: len(images) / np.median(v) for k, v in seconds.items()}
  best = max(pixel, key=lambda k: speed[k])
  sent = {
    'float32 pixels': SIZE * SIZE * 3 * 4,
    # Whole files, three components, whatever their size.
    'coefficients of whole files': round(2 * np.mean([_samples(b) for b in images])),
    'stored coefficients': BLOCKS * BLOCKS * len(CHANNELS) * 2,
  }
  rows = []
  for k in seconds:
    row = {'name': f'input/{k}', 'value': float(speed[k]), 'unit': 'images/s per core'}
    if k == best:  # the others' peer
      rate = len(images) / np.asarray(seconds[k])
      spread = float(rate.std(ddof=1) / math.sqrt(len(rate))) if len(rate) > 1 else None
      rows.append(row | {'peer': None, 'ratio': None, 'goal': None, 'spread': spread})
    else:
      ratio, spread = common.speedup(seconds[k], seconds[best])
      goal = 3.0 if k == 'stored, none' else None
      rows.append(row | {'peer': best, 'ratio': ratio, 'goal': goal, 'spread': spread})
  for peer, peer_bytes, sizes, where in (
    ('uint8 RGB', SIZE * SIZE * 3, sent, 'to the device'),
    ('jpeg files', mean_bytes, disk, 'on disk'),
  ):
    rows += [
      {'name': f'input/{k}/{where}', 'value': size, 'unit': 'bytes per image', 'peer': peer,
       'ratio': peer_bytes / size, 'goal': None, 'spread': None}
      for k, size in sizes.items()
    ]  # fmt: skip
  common.finish(args, rows, data=name)


def _samples(encoded: bytes) -> int:
  width, height = Image.open(io.BytesIO(encoded)).size
  return 3 * (-(-width // 8) * 8) * (-(-height // 8) * 8)


if __name__ == '__main__':
  main()
