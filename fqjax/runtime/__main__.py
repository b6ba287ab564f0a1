"""Command line of the runtime: what is in a file, and what it says of a photograph.

python -m fqjax.runtime show model.fqx
python -m fqjax.runtime run model.fqx photo.jpg [photo.jpg ...]
"""

import argparse
from collections.abc import Sequence
import sys
import time
from typing import Any

import numpy as np

from fqjax.runtime import ArtifactError, Model, load

# Of the shorter side of a photograph, how much is looked at where the file does not say.
_CROP = 0.875


def main(argv: Sequence[str] | None = None) -> int:
  """Runs the command line; returns the exit status."""
  parser = argparse.ArgumentParser(prog='python -m fqjax.runtime', description=__doc__)
  commands = parser.add_subparsers(dest='command', required=True)
  show = commands.add_parser('show', help='inputs, outputs and metadata of a file')
  show.add_argument('model')
  run = commands.add_parser('run', help='the five likeliest classes of photographs')
  run.add_argument('model')
  run.add_argument('photo', nargs='+')
  run.add_argument('--top', type=int, default=5, help='how many classes (5)')
  args = parser.parse_args(argv)
  try:
    model = load(args.model)
    if args.command == 'show':
      print(model)
      for key, value in model.metadata.items():
        print(f'{key}: {value!r}')
      return 0
    for name in args.photo:
      print_top(model, name, args.top)
  except (ArtifactError, OSError, ValueError, ImportError) as error:
    print(f'error: {error}', file=sys.stderr)
    return 1
  return 0


def print_top(model: Model, name: str, count: int) -> None:
  """Prints the likeliest classes of a photograph.

  Args:
    model: takes one batch of uint8 photographs, returns one row of scores for each.
    name: of the photograph's file.
    count: of classes.

  Raises:
    ValueError: the model takes or returns something else.
    OSError: no such photograph, or not one.
  """
  x = photograph(model, name)
  start = time.perf_counter()
  result = model(x)
  took = time.perf_counter() - start
  scores = np.asarray(result) if isinstance(result, np.ndarray) else None
  if scores is None or scores.ndim != 2 or scores.dtype.kind != 'f':
    raise ValueError('the model returns no row of scores; call it from Python instead.')
  row = scores[0].astype(np.float64)
  chances = np.exp(row - row.max())
  chances /= chances.sum()
  # Scores that are chances already are shown as they are.
  if row.min() >= 0 and abs(row.sum() - 1) < 1e-3:
    chances = row
  print(f'{name}  ({1e3 * took:.0f} ms)')
  for i in np.argsort(-row)[:count]:
    label = model.labels[i] if model.labels and i < len(model.labels) else f'class {i}'
    print(f'  {100 * chances[i]:5.1f} %  {label}')


def photograph(model: Model, name: str) -> np.ndarray:
  """A photograph as the model's one input takes it: uint8 [1, height, width, 3].

  The shorter side is scaled to `metadata['resize']` pixels (by default the input's over 0.875), the
  centre cut out.

  Raises:
    ValueError: the model takes no such input.
    OSError: no photograph.
  """
  spec = model.inputs[0]
  sides = spec.shape[1:3]
  if (
    len(model.inputs) > 1
    or spec.dtype != 'uint8'
    or len(spec.shape) != 4
    or spec.shape[3] != 3
    or not all(isinstance(side, int) for side in sides)
  ):
    raise ValueError(
      f'the model takes {", ".join(map(str, model.inputs))}, not uint8[n, height, width, 3]: export '
      'it with preprocess= that begins at 8-bit pixels.'
    )
  height, width = (int(side) for side in sides)
  size = model.metadata.get('resize', round(min(height, width) / _CROP))
  if not isinstance(size, int) or not 1 <= size <= 1 << 14:
    raise ValueError(f"metadata['resize'] is {size!r}, not a number of pixels.")
  image = _open(name)
  scale = max(size / min(image.size), height / image.height, width / image.width)
  image = image.resize((round(image.width * scale), round(image.height * scale)), resample=2)
  left, top = (image.width - width) // 2, (image.height - height) // 2
  return np.asarray(image.crop((left, top, left + width, top + height)), np.uint8)[None]


def _open(name: str) -> Any:
  try:
    from PIL import Image, ImageOps
  except ImportError:
    raise ImportError('reading photographs needs Pillow: pip install pillow') from None
  try:
    # Cameras turn the picture by a note in the file.
    return ImageOps.exif_transpose(Image.open(name)).convert('RGB')
  except Image.DecompressionBombError as error:
    raise ValueError(f'{name}: {error}') from None


if __name__ == '__main__':
  sys.exit(main())
