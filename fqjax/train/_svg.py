"""Charts of the report as inline SVG: sharp at any size, coloured by the page's own style sheet."""

from collections.abc import Sequence
import html
import math
from typing import NamedTuple

import numpy as np

from fqjax import ops

WIDTH, HEIGHT = 380, 236
LEFT, RIGHT, TOP, BOTTOM = 48, 10, 10, 38
MAX_POINTS = 400


class Series(NamedTuple):
  """One line of a chart.

  Attributes:
    name: what the legend calls it.
    x: steps, increasing.
    y: values; not finite means a gap.
    style: number of its colour and dash pattern.
    measured: True for evaluations (a dot at each), False for training (a thin line).
  """

  name: str
  x: np.ndarray
  y: np.ndarray
  style: int
  measured: bool


def ticks(low: float, high: float, count: int = 5) -> list[float]:
  """Round numbers that cover [low, high], about `count` of them.

  Example:
    >>> ticks(0.0, 9.3)
    [0.0, 2.0, 4.0, 6.0, 8.0, 10.0]
  """
  rough = (high - low) / count
  power = 10.0 ** math.floor(math.log10(rough))
  step = next(power * m for m in (1, 2, 5, 10) if power * m >= rough * 0.999)
  first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
  return [round(i * step, 12) for i in range(first, last + 1)]


def short(value: float) -> str:
  """A number for an axis: 1500 is '1.5k'.

  Example:
    >>> short(1500), short(0.25), short(0.00005)
    ('1.5k', '0.25', '5e-05')
  """
  for scale, letter in ((1e9, 'G'), (1e6, 'M'), (1e3, 'k')):
    if abs(value) >= scale:
      return f'{value / scale:.4g}{letter}'
  return f'{value:.4g}'


def thin(x: np.ndarray, y: np.ndarray, most: int = MAX_POINTS) -> tuple[np.ndarray, np.ndarray]:
  """At most `most` points: means of equal shares; a share with a gap in it stays a gap."""
  if len(x) <= most:
    return x, y
  parts = np.array_split(np.arange(len(x)), most)
  return np.array([x[p].mean() for p in parts]), np.array([y[p].mean() for p in parts])


def line_chart(series: Sequence[Series], *, title: str, x_label: str = 'step', log: bool = False):
  """Lines over a common x axis, as an `<svg>` element.

  Args:
    series: at least one, each with at least one finite value.
    title: said to readers who do not see the chart, before first and last values.
    x_label: below the axis.
    log: logarithmic y axis; every finite value must be positive.
  """
  finite = np.concatenate([s.y[np.isfinite(s.y)] for s in series])
  low, high = float(finite.min()), float(finite.max())
  if log:
    marks = [10.0**k for k in range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)]
    if len(marks) < 4:
      marks = sorted({m * k for m in marks for k in (1, 2, 5) if low / 2 <= m * k <= high * 2})
    warp = math.log10
  else:
    if high - low < 1e-9 * max(1.0, abs(high)):
      low, high = (min(low, 0.0), high) if high > 0 else (low - 1.0, high + 1.0)
    marks, warp = ticks(low, high), float
  bottom, top = warp(min(marks[0], low)), warp(max(marks[-1], high))
  x0 = min(float(s.x[0]) for s in series)
  x1 = max(float(s.x[-1]) for s in series)
  if 0 < x0 < 0.3 * x1:
    x0 = 0.0
  if x1 <= x0:
    x0, x1 = x0 - 1.0, x1 + 1.0

  def px(x):
    return LEFT + (WIDTH - LEFT - RIGHT) * (x - x0) / (x1 - x0)

  def py(y):
    return HEIGHT - BOTTOM - (HEIGHT - TOP - BOTTOM) * (warp(y) - bottom) / (top - bottom)

  parts = []
  for mark in marks:
    y = py(mark)
    parts.append(
      f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>'
      f'<text class="tick end" x="{LEFT - 6}" y="{y + 4:.1f}">{short(mark)}</text>'
    )
  x_marks = [m for m in ticks(x0, x1, 4) if x0 <= m <= x1]
  for mark in x_marks:
    # The last label would be cut by the edge if it were centred there.
    side = ' end' if px(mark) > WIDTH - RIGHT - 12 else ' mid'
    parts.append(
      f'<line class="axis" x1="{px(mark):.1f}" x2="{px(mark):.1f}" '
      f'y1="{HEIGHT - BOTTOM}" y2="{HEIGHT - BOTTOM + 4}"/>'
      f'<text class="tick{side}" x="{px(mark):.1f}" y="{HEIGHT - BOTTOM + 17}">{short(mark)}</text>'
    )
  parts.append(
    f'<line class="axis" x1="{LEFT}" x2="{WIDTH - RIGHT}" '
    f'y1="{HEIGHT - BOTTOM}" y2="{HEIGHT - BOTTOM}"/>'
    f'<text class="tick mid" x="{(LEFT + WIDTH - RIGHT) / 2}" y="{HEIGHT - 4}">'
    f'{html.escape(x_label)}</text>'
  )
  for s in series:
    parts.append(_line(s, px, py))
  said = '; '.join(_in_words(s) for s in series)
  return (
    f'<svg class="chart" viewBox="0 0 {WIDTH} {HEIGHT}" role="img" '
    f'aria-label="{html.escape(title)} by {html.escape(x_label)}. {html.escape(said)}.">'
    f'{"".join(parts)}</svg>'
  )


def _line(s: Series, px, py) -> str:
  x, y = thin(s.x, s.y)
  commands, dots, pen_down = [], [], False
  for i, (a, b) in enumerate(zip(x, y, strict=True)):
    if not math.isfinite(b):
      pen_down = False
      continue
    at = f'{px(a):.1f},{py(b):.1f}'
    commands.append(f'{"L" if pen_down else "M"}{at}')
    alone = not pen_down and (i + 1 == len(y) or not math.isfinite(y[i + 1]))
    if alone or (s.measured and len(x) <= 40):
      cx, cy = at.split(',')
      dots.append(f'<circle cx="{cx}" cy="{cy}" r="2.6"/>')
    pen_down = True
  kind = 'eval' if s.measured else 'train'
  name = f'<title>{html.escape(s.name)}</title>'
  return (
    f'<g class="line {kind} s{s.style % 6}">{name}<path d="{"".join(commands)}"/>'
    f'{"".join(dots)}</g>'
  )


def _in_words(s: Series) -> str:
  y = s.y[np.isfinite(s.y)]
  return f'{s.name}: from {short(float(y[0]))} to {short(float(y[-1]))}'


def legend(series: Sequence[Series]) -> str:
  """Names of the lines, each beside a piece of its line, as a list."""
  items = []
  for s in series:
    kind = 'eval' if s.measured else 'train'
    dot = '<circle cx="14" cy="6" r="2.6"/>' if s.measured else ''
    items.append(
      f'<li><svg viewBox="0 0 28 12" width="28" height="12" aria-hidden="true">'
      f'<g class="line {kind} s{s.style % 6}"><path d="M1,6L27,6"/>{dot}</g></svg>'
      f'{html.escape(s.name)}</li>'
    )
  return f'<ul class="legend">{"".join(items)}</ul>'


def heat_map(frequency: np.ndarray, *, component: str, first: int, size: int) -> str:
  """One component's selection frequencies as a `size` x `size` map, zig-zag numbers in the cells.

  Args:
    frequency: [size * size], 0..1, row-major (index `size * u + v`).
    component: 'Y', 'Cb' or 'Cr'.
    first: channel index of the component's lowest frequency.
    size: block size.
  """
  cell, edge = 28, 16
  side = edge + cell * size + 1
  rank = np.asarray(ops.zigzag_rank(size)).reshape(-1)
  parts = []
  for i in range(size):
    middle = edge + cell * (i + 0.5)
    if size <= 8:
      parts.append(f'<text class="tick mid" x="{middle}" y="11">{i}</text>')
      parts.append(f'<text class="tick mid" x="7" y="{middle + 4}">{i}</text>')
  for i, share in enumerate(np.asarray(frequency, np.float64).tolist()):
    u, v = divmod(i, size)
    x, y = edge + cell * v, edge + cell * u
    known = math.isfinite(share)
    percent = f'{100 * share:.0f} %' if known else 'not measured'
    text = (
      f'{component} u={u} v={v}: channel {first + i}, zig-zag {rank[i]}, '
      f'{"chosen in " if known else ""}{percent}'
    )
    paint = f'style="--v:{100 * min(max(share, 0.0), 1.0):.0f}%"' if known else ''
    # Where the ground is strong enough to need the other text colour, on light and on dark pages.
    strong = f'{" on-light" * (share > 0.74)}{" on-dark" * (share > 0.49)}' if known else ''
    number = (
      f'<text class="number mid{strong}" x="{x + cell / 2}" y="{y + cell / 2 + 4}">{rank[i]}</text>'
      if size <= 10
      else ''
    )
    parts.append(
      f'<g><title>{text}</title><rect class="{"heat" if known else "none"}" x="{x}" y="{y}" '
      f'width="{cell}" height="{cell}" {paint}/>{number}</g>'
    )
  order = np.argsort(-np.nan_to_num(frequency), kind='stable')[:5]
  said = ', '.join(f'zig-zag {rank[i]} ({100 * np.nan_to_num(frequency)[i]:.0f} %)' for i in order)
  return (
    f'<svg class="map" viewBox="0 0 {side} {side}" role="img" aria-label="{component}: share of '
    f'images in which each frequency was chosen. Most often: {said}.">{"".join(parts)}</svg>'
  )
