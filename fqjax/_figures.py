"""What the pictures of all rooms share: figures without global state, series with error bars.

Matplotlib is imported here, so nothing but a module of pictures imports this one.
"""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine

# Two tones of one blue for a part and its whole, and a warm colour for what stands out.
PART, WHOLE, ACCENT = '#0b62b5', '#c9d8e8', '#c2410c'


class Dot(NamedTuple):
  """One point of a series.

  Attributes:
    x: place on the horizontal axis.
    y: place on the vertical axis.
    spread: standard error of y, if known.
    label: written above it; '' writes nothing.
  """

  x: float
  y: float
  spread: float | None = None
  label: str = ''


def figure(width: float, height: float, images: bool = True) -> Figure:
  """A figure that pyplot does not know.

  Args:
    width: in inches.
    height: in inches.
    images: images keep their shape; what they leave free goes to the edge, not between them.
  """
  layout = ConstrainedLayoutEngine(w_pad=0.08, h_pad=0.08, compress=images)
  made = Figure(figsize=(width, height), layout=layout)
  FigureCanvasAgg(made)
  return made


def draw_series(axes: Axes, series: Mapping[str, Sequence[Dot]]) -> None:
  """Draws every series with a marker of its own, joined from left to right.

  Args:
    axes: to draw on.
    series: name in the legend -> points, in any order.
  """
  for marker, (name, dots) in zip('osD^vP*X' * len(series), series.items(), strict=False):
    dots = sorted(dots, key=lambda dot: dot.x)
    axes.errorbar(
      [dot.x for dot in dots],
      [dot.y for dot in dots],
      yerr=[dot.spread or 0.0 for dot in dots] if any(dot.spread for dot in dots) else None,
      marker=marker,
      capsize=3,
      linestyle='-' if len(dots) > 1 else 'none',
      label=name,
    )
    for dot in dots:
      if dot.label:
        axes.annotate(
          dot.label, (dot.x, dot.y + (dot.spread or 0.0)),  # clear of the error bar
          textcoords='offset points', xytext=(0, 7), ha='center', fontsize=9,
        )  # fmt: skip
  axes.margins(y=0.12)
  axes.grid(alpha=0.3)


def percent(part: float, whole: float) -> str:
  """A share with the digits that mean something."""
  return f'{100 * part / whole:.3g} %'
