"""Pictures for notebooks and papers, as Matplotlib figures that share no global state.

Each function returns a `matplotlib.figure.Figure`; save it with `figure.savefig(path)`, or let it
be the last line of a notebook cell after `%matplotlib inline`.
"""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, NullFormatter
import numpy as np
from numpy.typing import ArrayLike

from fqjax import _figures, ops

COMPONENTS = ('Y', 'Cb', 'Cr')


class Point(NamedTuple):
  """A trained network in `accuracy_against_bytes`.

  Attributes:
    label: beside the point.
    bytes: of one image as sent to the device.
    accuracy: in percent.
    spread: standard error of the accuracy, in points, if known.
    series: points of one series share a marker and are joined by a line.
  """

  label: str
  bytes: float
  accuracy: float
  spread: float | None = None
  series: str = ''


def heatmap_figure(
  frequency: ArrayLike, size: int = 8, *, numbers: bool = True, title: str = ''
) -> Figure:
  """Share of images in which the gate chose each frequency, one panel per colour component.

  Args:
    frequency: [components * size**2], 0..1, channel `size**2 * component + size * u + v`.
    size: block size.
    numbers: zig-zag numbers in the cells, as the paper prints them.
    title: above the panels.

  Raises:
    ValueError: the length fits neither one nor three components.

  Example:
    >>> figure = heatmap_figure(np.linspace(1, 0, 192))
    >>> [axes.get_title() for axes in figure.axes[:3]]
    ['Y', 'Cb', 'Cr']
  """
  frequency = np.asarray(frequency, np.float64).reshape(-1)
  if frequency.size not in (size * size, 3 * size * size):
    raise ValueError(
      f'frequency has {frequency.size} channels; size={size} makes {size * size} (Y) or '
      f'{3 * size * size} (Y, Cb, Cr).'
    )
  maps = frequency.reshape(-1, size, size)
  rank = np.asarray(ops.zigzag_rank(size)).reshape(size, size)
  figure = _figures.figure(3.5 * len(maps) + 0.8, 4.1 + 0.3 * bool(title))
  panels = np.atleast_1d(figure.subplots(1, len(maps)))
  for axes, name, values in zip(panels, COMPONENTS, maps, strict=False):
    image = axes.imshow(values, vmin=0.0, vmax=1.0, cmap='Blues')
    axes.set_title(name)
    axes.set_xlabel('v (horizontal)')
    axes.set_xticks(range(0, size, max(1, size // 8)))
    axes.set_yticks(range(0, size, max(1, size // 8)))
    if numbers and size <= 16:
      for (u, v), share in np.ndenumerate(values):
        colour = 'white' if share > 0.6 else '#222222'
        axes.text(
          v, u, str(rank[u, v]), ha='center', va='center', color=colour, fontsize=64 / max(size, 8)
        )
  panels[0].set_ylabel('u (vertical)')
  figure.colorbar(image, ax=list(panels), label='chosen in this share of images', shrink=0.85)
  if title:
    figure.suptitle(title)
  return figure


def channel_panels(
  image: ArrayLike, size: int = 8, *, component: str = 'Y', mosaic: bool = True
) -> Figure:
  """The DCT channels of a photograph: the image, and a `size` x `size` mosaic of small maps.

  Each map shows one frequency over all blocks, grey where it is zero and scaled by its own
  98th percentile, so that weak frequencies are seen as well.

  Args:
    image: uint8 [h, w, 3]; cropped to whole blocks.
    size: block size.
    component: 'Y', 'Cb' or 'Cr'.
    mosaic: False leaves the mosaic out and shows the component alone beside the photograph.

  Example:
    >>> figure = channel_panels(np.zeros((64, 96, 3), np.uint8))
    >>> [axes.get_title() for axes in figure.axes]
    ['photograph', 'Y: 64 channels of 8 x 12']
  """
  if component not in COMPONENTS:
    raise ValueError(f'component is one of {", ".join(COMPONENTS)}, got {component!r}.')
  image = np.asarray(image)
  if image.dtype != np.uint8 or image.ndim != 3 or image.shape[-1] != 3:
    raise ValueError(f'image is uint8 [h, w, 3], got {image.dtype} {list(image.shape)}.')
  rows, columns = image.shape[0] // size, image.shape[1] // size
  if not rows or not columns:
    raise ValueError(f'image [{image.shape[0]}, {image.shape[1]}] holds no {size} x {size} block.')
  image = image[: rows * size, : columns * size]
  plane = np.asarray(ops.rgb_to_ycbcr(image.astype(np.float32)))[..., COMPONENTS.index(component)]
  figure = _figures.figure(10.0, 0.5 + 4.8 * min(rows / columns, 2.0))
  left, right = figure.subplots(1, 2)
  left.imshow(image)
  left.set_title('photograph')
  if mosaic:
    coefficients = np.asarray(ops.block_dct(plane[..., None] - 128.0, size))
    right.set_title(f'{component}: {size * size} channels of {rows} x {columns}')
    right.imshow(_mosaic(coefficients), cmap='gray', vmin=-1.0, vmax=1.0, interpolation='nearest')
  else:
    right.set_title(component)
    right.imshow(plane, cmap='gray', vmin=0.0, vmax=255.0)
  for axes in (left, right):
    axes.set_axis_off()
  return figure


def _mosaic(coefficients: np.ndarray) -> np.ndarray:
  """[rows, columns, size**2] channels side by side, each within -1..1, white lines between."""
  rows, columns, channels = coefficients.shape
  size = round(channels**0.5)
  gap = 1 + max(rows, columns) // 32
  # No map is stretched until the rounding of its pixels fills it: that stays below 1.
  scale = np.maximum(np.percentile(np.abs(coefficients), 98, axis=(0, 1)), 1.0)
  scaled = np.clip(coefficients / scale, -1.0, 1.0)
  out = np.ones((size * (rows + gap) - gap, size * (columns + gap) - gap))
  for c in range(channels):
    y, x = (c // size) * (rows + gap), (c % size) * (columns + gap)
    out[y : y + rows, x : x + columns] = scaled[..., c]
  return out


def accuracy_against_bytes(
  points: Sequence[Point | Mapping[str, Any]], *, title: str = ''
) -> Figure:
  """Accuracy over the bytes of one input image, with error bars of one standard error.

  Args:
    points: trained networks, at least one; a mapping has the names of `Point`'s fields.
    title: above the axes.

  Example:
    >>> points = [Point('RGB', 3072, 70.0, 0.5), Point('DCT', 3072, 71.0, 0.5)]
    >>> figure = accuracy_against_bytes(points)
    >>> figure.axes[0].get_ylabel()
    'top-1, %'
  """
  points = [Point(**p) if isinstance(p, Mapping) else Point(*p) for p in points]
  if not points:
    raise ValueError('accuracy_against_bytes needs at least one point.')
  figure = _figures.figure(7.0, 4.6, images=False)
  axes = figure.subplots()
  series: dict[str, list[_figures.Dot]] = {}
  for point in points:
    label = point.label if point.series else ''
    dot = _figures.Dot(point.bytes, point.accuracy, point.spread, label)
    series.setdefault(point.series or point.label, []).append(dot)
  _figures.draw_series(axes, series)
  axes.set_xscale('log', base=2)
  sizes = sorted({point.bytes for point in points})
  axes.set_xticks(sizes)
  axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f'{value:,.0f}'))
  axes.xaxis.set_minor_formatter(NullFormatter())
  # Room for the labels, which are centred over the outermost points.
  axes.set_xlim(sizes[0] / 2, sizes[-1] * 2)
  axes.tick_params(axis='x', rotation=30 if len(sizes) > 5 else 0)
  axes.set_xlabel('input bytes per image')
  axes.set_ylabel('top-1, %')
  axes.legend(frameon=False)
  if title:
    axes.set_title(title)
  return figure
