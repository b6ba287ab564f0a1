"""Pictures of quantized networks, as Matplotlib figures that share no global state.

Each function returns a `matplotlib.figure.Figure`; save it with `figure.savefig(path)`, hand it to
`fqjax.train.write_report`, or let it be the last line of a notebook cell after `%matplotlib inline`.
"""

from collections.abc import Sequence
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
import numpy as np
from numpy.typing import ArrayLike

from fqjax import _figures
from fqjax._figures import ACCENT, PART, WHOLE
from fqjax.quantize._components import codebook as levels_of
from fqjax.quantize._components import components, is_mixture

__all__ = ['level_histogram', 'levels_over_time']

_BINS = 120
# More levels than this in one picture are a grey smear.
_MOST_LINES = 64


def level_histogram(
  before: ArrayLike, start: Any, after: ArrayLike | None = None, end: Any = None
) -> Figure:
  """How the weights of a layer spread, and the levels or the mixture that describe them.

  Args:
    before: float weights of any shape.
    start: their mixture (`MixtureLeaf`), drawn with the density of every component, or their
      codebook, [K] or [O, K].
    after: weights later, e.g. quantized; drawn below, None for one picture alone. At most 256 distinct
      weights are drawn as bars of their own.
    end: mixture or codebook of `after`.

  Raises:
    ValueError: for weights that are not finite, or none.

  Example:
    >>> w = np.random.default_rng(0).normal(size=1000)
    >>> figure = level_histogram(w, jnp.array([0.0, -1.0, 0.0, 1.0]))
    >>> figure.axes[0].get_ylabel()
    'weights'
  """
  rows = [(before, start)] if after is None else [(before, start), (after, end)]
  values = [np.asarray(w, np.float64).ravel() for w, _ in rows]
  for w in values:
    if not w.size or not np.isfinite(w).all():
      raise ValueError('level_histogram draws weights that are finite, at least one.')
  figure = _figures.figure(7.5, 2.6 * len(rows), images=False)
  axes = np.atleast_1d(figure.subplots(len(rows), 1, sharex=True))
  reach = max(np.abs(w).max() for w in values) or 1.0
  bins = np.linspace(-1.05 * reach, 1.05 * reach, _BINS + 1)
  for ax, w, (_, levels) in zip(axes, values, rows, strict=True):
    _weights(ax, w, bins)
    if levels is not None:
      _levels(ax, levels, bins, len(w))
    ax.set_ylabel('weights')
    ax.grid(axis='y', alpha=0.3)
    ax.set_axisbelow(True)
  axes[-1].set_xlabel('value')
  return figure


def _weights(ax: Axes, w: np.ndarray, bins: np.ndarray):
  distinct, counts = np.unique(w, return_counts=True)
  width = bins[1] - bins[0]
  if len(distinct) <= 256:
    ax.bar(distinct, counts, width=0.6 * width, color=PART)
    # A level at zero that most weights have would hide all others.
    if counts.max() > 30 * np.median(counts):
      ax.set_yscale('log')
  else:
    ax.hist(w, bins=list(bins), color=WHOLE)


def _levels(ax: Axes, levels: Any, bins: np.ndarray, count: int):
  if is_mixture(levels):
    x = np.linspace(bins[0], bins[-1], 1200)
    mu, scale, bias = (
      np.asarray(part)[:, None] for part in components(x.astype(np.float32), levels)
    )
    density = np.exp(bias - 0.5 * ((x - mu) * scale) ** 2) / np.sqrt(2 * np.pi)
    parts = density * count * (bins[1] - bins[0])
    # Components are needles beside the weights where they are narrower than a bin.
    high = ax.get_ylim()[1]
    high = max(high, min(1.1 * parts.sum(0).max(), 2 * high))
    for part in parts:
      ax.plot(x, part, color=ACCENT, linewidth=0.6, alpha=0.6)
    ax.plot(x, parts.sum(0), color=ACCENT, linewidth=1.2)
    ax.set_ylim(top=high)
  table = np.asarray(levels_of(levels) if is_mixture(levels) else levels)
  if table.size <= _MOST_LINES:
    for level in np.unique(table):
      ax.axvline(level, color='0.35', linewidth=0.6, linestyle=':')


def levels_over_time(levels: Sequence[Sequence[float]]) -> Figure:
  """Where the levels of one layer go while they are trained.

  Args:
    levels: the levels at every look, [looks, K].

  Raises:
    ValueError: for no look, or looks of different lengths.

  Example:
    >>> figure = levels_over_time([[-1.0, 1.0], [-0.9, 1.1]])
    >>> figure.axes[0].get_ylabel()
    'level'
  """
  try:
    table = np.asarray(levels, np.float64)
  except ValueError as e:
    raise ValueError('levels_over_time draws looks at one codebook, [looks, K].') from e
  if table.ndim != 2 or not table.size:
    raise ValueError(f'levels_over_time draws [looks, K], got {list(table.shape)}.')
  figure = _figures.figure(7.5, 3.6, images=False)
  axes = figure.subplots()
  axes.plot(np.arange(len(table)), table, color=PART, linewidth=1.0)
  axes.axhline(0.0, color='0.6', linewidth=0.6)
  axes.set_xlabel('look')
  axes.set_ylabel('level')
  axes.grid(alpha=0.3)
  return figure
