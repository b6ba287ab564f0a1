"""Calibration: what the activations of a network are like, over batches of data."""

from collections.abc import Callable, Iterable, Mapping, Sequence
import dataclasses
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from fqjax.quantize._ranges import METHODS, Range, Seen
from fqjax.quantize._steps import activations, layer_of
from fqjax.runtime.graph import Graph
from fqjax.tracing import evaluate

# Bins on either side of zero.
BINS = 4096
# Elements of one tensor and batch that the histogram takes.
_SAMPLE = 1 << 16
# Constants up to this size stay in the compiled program, where they show what a pool or a pad is.
_SMALL = 16


class Observed(NamedTuple):
  """What was seen of one tensor so far.

  The histogram is over (-2^exponent, 2^exponent); where a value does not fit, the range doubles and
  pairs of bins join, so that neither the order nor the number of batches changes the result.

  Attributes:
    low: [] float32, smallest of all values; NaN if one was NaN.
    high: [] float32, largest.
    exponent: [] int32.
    counts: [2, 4096] int32, of a sample: negative and other values, from zero outwards.
  """

  low: jax.Array
  high: jax.Array
  exponent: jax.Array
  counts: jax.Array


def observe_nothing() -> Observed:
  """The state before the first batch."""
  return Observed(
    jnp.float32(jnp.inf), jnp.float32(-jnp.inf), jnp.int32(-126), jnp.zeros((2, BINS), jnp.int32)
  )


def observe(state: Observed, x: jax.Array) -> Observed:
  """Adds a batch of a tensor; pure, works under jit.

  Args:
    state: of `observe_nothing` or of earlier batches.
    x: float32 of any shape; the histogram takes at most 65,536 of its elements, evenly spread.

  Returns:
    The state with the batch in it.

  Example:
    >>> state = observe(observe_nothing(), jnp.array([-1.0, 0.5]))
    >>> float(state.low), int(state.exponent), int(state.counts.sum())
    (-1.0, 1, 2)
  """
  sample = _spread_sample(x)
  return _add(state, jnp.min(x), jnp.max(x), sample, jnp.ones_like(sample, jnp.int32))


def _add(
  state: Observed, low: jax.Array, high: jax.Array, sample: jax.Array, weights: jax.Array
) -> Observed:
  largest = jnp.max(jnp.abs(jnp.nan_to_num(sample)))
  needed = jnp.where(largest > 0, jnp.frexp(largest)[1].astype(jnp.int32), state.exponent)
  exponent = jnp.maximum(state.exponent, needed)
  places = jnp.right_shift(jnp.arange(BINS), jnp.minimum(exponent - state.exponent, 31))
  counts = jnp.zeros_like(state.counts).at[:, places].add(state.counts)
  place = jnp.ldexp(jnp.abs(sample), math.frexp(BINS)[1] - 1 - exponent)
  place = jnp.clip(place, 0, BINS - 1).astype(jnp.int32)
  counts = counts.at[jnp.where(sample < 0, 0, 1), place].add(weights)
  # min and max carry a NaN on.
  return Observed(jnp.minimum(state.low, low), jnp.maximum(state.high, high), exponent, counts)


def seen(state: Observed) -> Seen:
  """The histogram as values and counts, in float64.

  Args:
    state: of `observe`.

  Example:
    >>> state = observe(observe_nothing(), jnp.array([0.0, 1.0]))
    >>> seen(state).counts.tolist()
    [1.0, 1.0]
  """
  low, high, exponent, counts = (np.asarray(part) for part in state)
  width = 2.0 ** int(exponent) / BINS
  centres = (np.arange(BINS) + 0.5) * width
  values = np.concatenate([-centres[::-1], centres])
  counts = np.concatenate([counts[0, ::-1], counts[1]]).astype(np.float64)
  return Seen(float(low), float(high), values[counts > 0], counts[counts > 0])


def intermediates(
  graph: Graph, names: Sequence[str], inputs: Sequence[Any], parameters: Mapping[str, Any] = {}
) -> dict[str, jax.Array]:
  """Values inside a graph; works under jit, vmap and grad.

  Args:
    graph: of any function, by `fqjax.tracing.to_graph`.
    names: of tensors in it.
    inputs: arrays in the order of `graph.inputs`.
    parameters: path -> array, for all of `graph.parameters`.

  Raises:
    ValueError: a name that the graph has not.

  Example:
    >>> from fqjax.tracing import to_graph
    >>> graph = to_graph(lambda p, x: jnp.exp(x) + 1, {}, jnp.ones(2)).graph
    >>> intermediates(graph, ['%0'], [jnp.zeros(2)])
    {'%0': Array([1., 1.], dtype=float32)}
  """
  if unknown := [name for name in names if name not in graph.tensors]:
    raise ValueError(f'the graph has no tensor {unknown[0]!r}; print(graph) shows those it has.')
  wanted = dataclasses.replace(graph, outputs=tuple(names))
  return dict(zip(names, evaluate(wanted, parameters, inputs), strict=True))


def calibrate(
  graph: Graph,
  batches: Iterable[Any],
  method: str | Callable[[Seen], Range] = 'mse',
  names: Sequence[str] | None = None,
  *,
  in_float: str = '',
) -> dict[str, Range]:
  """Ranges of the activations of a network, one per tensor.

  Args:
    graph: frozen (`fqjax.exporter.passes.freeze`).
    batches: the input arrays of each batch, or a tuple of them where there are several. Never the
      data a network is scored on.
    method: 'min_max', 'percentile', 'mse', 'entropy', or any function of what was seen.
    names: tensors to look at; those that the integer graph rounds if None.
    in_float: regex on the names of layers that stay in float, as in `integer_graph`.

  Returns:
    Tensor name -> range.

  Raises:
    ValueError: no batch; NaN or an infinity, naming tensor and layer; an unknown method.

  Example:
    >>> from fqjax.exporter.passes import freeze
    >>> from fqjax.tracing import to_graph
    >>> network = lambda p, x: jax.nn.relu(x @ p)
    >>> graph = freeze(to_graph(network, jnp.eye(2), jnp.ones((1, 2))), jnp.eye(2))
    >>> calibrate(graph, [jnp.array([[-1.0, 2.0]])], 'min_max')
    {'input': Range(low=-1.0, high=2.0), '%1': Range(low=0.0, high=2.0)}
  """
  if isinstance(method, str) and method not in METHODS:
    raise ValueError(f'method must be one of {", ".join(METHODS)} or a function, got {method!r}.')
  choose = METHODS[method] if isinstance(method, str) else method
  found = observed(graph, batches, activations(graph, in_float) if names is None else names)
  return {name: choose(one) for name, one in found.items()}


def observed(
  graph: Graph, batches: Iterable[Any], names: Sequence[str] | None = None
) -> dict[str, Seen]:
  """What `calibrate` chooses from.

  Args:
    graph: frozen.
    batches: as `calibrate` takes them; gone through once.
    names: tensors to look at.

  Raises:
    ValueError: as `calibrate`.
  """
  names = activations(graph) if names is None else tuple(names)
  states, watch = watching(graph, names)
  count = 0
  for batch in batches:
    states = watch(states, batch)
    count += 1
  if not count:
    raise ValueError('calibration has seen no batch: the iterator is empty (or used up already).')
  rows = zip(*jax.device_get(states), strict=True)
  found = {name: seen(Observed(*row)) for name, row in zip(names, rows, strict=True)}
  for name, one in found.items():
    if not (math.isfinite(one.low) and math.isfinite(one.high)):
      what = 'NaN' if math.isnan(one.low) or math.isnan(one.high) else 'an infinity'
      raise ValueError(
        f'calibration met {what} in tensor {name!r} ({layer_of(graph, name)}): look for a division '
        'by zero, an overflow, or images that were not scaled.'
      )
  return found


def watching(
  graph: Graph, names: Sequence[str]
) -> tuple[Observed, Callable[[Observed, Any], Observed]]:
  """The states of all tensors before the first batch, stacked, and what adds a batch to them."""
  call, arrays = compiled_pass(graph, names, ends_and_samples)
  # All tensors at once: one scatter compiles a hundred times faster than a hundred.
  add = jax.jit(jax.vmap(_add))

  def watch(states, batch):
    inputs = batch if isinstance(batch, (tuple, list)) else (batch,)
    return add(states, *call(arrays, tuple(map(jnp.asarray, inputs))))

  return jax.tree.map(lambda x: jnp.stack([x] * len(names)), observe_nothing()), watch


def ends_and_samples(values: Mapping[str, jax.Array]) -> tuple[jax.Array, ...]:
  """Ends and samples of tensors, padded to one length; weight 0 marks the padding."""
  samples = [_spread_sample(x) for x in values.values()]
  length = max(len(sample) for sample in samples)
  fill = lambda x: jnp.pad(x, (0, length - len(x)))
  return (
    jnp.stack([jnp.min(x) for x in values.values()]),
    jnp.stack([jnp.max(x) for x in values.values()]),
    jnp.stack([fill(sample) for sample in samples]),
    jnp.stack([fill(jnp.ones_like(sample, jnp.int32)) for sample in samples]),
  )


def compiled_pass(
  graph: Graph, names: Sequence[str], then: Callable[..., Any]
) -> tuple[Callable, dict[str, np.ndarray]]:
  """One jitted pass; the weights are arguments, so that XLA need not look at them.

  Args:
    graph: frozen.
    names: tensors to look at.
    then: (name -> array, *rest) -> anything.

  Returns:
    (weights, inputs, *rest) -> what `then` gives, and the weights.
  """
  arrays = {name: array for name, array in graph.constants.items() if array.size > _SMALL}
  small = {name: array for name, array in graph.constants.items() if name not in arrays}
  opened = dataclasses.replace(graph, parameters=(*graph.parameters, *arrays), constants=small)

  @jax.jit
  def call(arrays, inputs, *rest):
    return then(intermediates(opened, names, inputs, arrays), *rest)

  return call, arrays


def _spread_sample(x: jax.Array) -> jax.Array:
  stride = max(1, -(-x.size // _SAMPLE))
  # A stride that shares a factor with the channels would never meet some of them.
  while x.ndim and math.gcd(stride, x.shape[-1]) > 1:
    stride += 1
  return x.reshape(-1)[::stride]
