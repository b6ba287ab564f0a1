"""The integer network in float32, with gradients: what training sees."""

from collections.abc import Mapping, Sequence
import dataclasses
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from fqjax.quantize._integer import _BIAS_STEPS, WEIGHT_STEPS
from fqjax.quantize._ranges import STEPS, Range
from fqjax.quantize._steps import Step, find_steps, layer_of, sources
from fqjax.runtime.graph import Graph, batch_size
from fqjax.tracing import evaluate_node


class FakeQuantParams(NamedTuple):
  """What training may change.

  Attributes:
    weights: name -> float array, kernels and biases of the layers that become integers.
    ranges: name -> `Range` of float32 scalars.
  """

  weights: dict[str, jax.Array]
  ranges: dict[str, Range]


def init_fake_quant(
  graph: Graph, ranges: Mapping[str, Range], in_float: str = ''
) -> FakeQuantParams:
  """Trainable leaves of a frozen graph.

  Args:
    graph: frozen.
    ranges: of `calibrate`.
    in_float: layers that stay in float, as in `integer_graph`; their weights are none of these.

  Example:
    >>> from fqjax.exporter.passes import freeze
    >>> from fqjax.tracing import to_graph
    >>> graph = freeze(to_graph(lambda p, x: x @ p, jnp.eye(2), jnp.ones((1, 2))), jnp.eye(2))
    >>> params = init_fake_quant(graph, {'input': Range(0.0, 1.0), '%0': Range(0.0, 1.0)})
    >>> list(params.weights)
    ['params']
  """
  weights = {}
  for step in find_steps(graph, in_float):
    for name in (step.details.get('kernel'), step.details.get('bias')):
      if name is not None:
        weights[name] = jnp.asarray(graph.constants[name])
  return FakeQuantParams(
    weights, {name: Range(*map(jnp.float32, one)) for name, one in ranges.items()}
  )


def with_weights(graph: Graph, params: FakeQuantParams) -> Graph:
  """The frozen graph with trained weights in place of its own, for `integer_graph`.

  Args:
    graph: the one the parameters are of.
    params: trained.

  Raises:
    ValueError: a weight that the graph has not.

  Example:
    >>> from fqjax.exporter.passes import freeze
    >>> from fqjax.tracing import to_graph
    >>> graph = freeze(to_graph(lambda p, x: x @ p, jnp.eye(2), jnp.ones((1, 2))), jnp.eye(2))
    >>> trained = FakeQuantParams({'params': 2 * jnp.eye(2)}, {})
    >>> float(with_weights(graph, trained).constants['params'].max())
    2.0
  """
  if unknown := [name for name in params.weights if name not in graph.constants]:
    raise ValueError(f'the graph has no weights {unknown[0]!r}; these are of another graph.')
  arrays = {name: jax.device_get(array) for name, array in params.weights.items()}
  return dataclasses.replace(graph, constants={**graph.constants, **arrays})


def fake_quant(
  graph: Graph, params: FakeQuantParams, inputs: Sequence[Any], in_float: str = ''
) -> tuple[jax.Array, ...]:
  """Runs a frozen graph in float32 as if in integers; under jit, vmap and grad.

  Every activation and weight is rounded to a value that its integers stand for, so that results lie
  within one step of those of `integer_graph`. Rounding passes gradients on, clipping stops them;
  the ends of the ranges have gradients too.

  Args:
    graph: frozen.
    params: of `init_fake_quant`.
    inputs: float32 arrays in the order of `graph.inputs`.
    in_float: layers that stay in float, as in `integer_graph`.

  Returns:
    Float32 arrays in the order of `graph.outputs`.

  Raises:
    ValueError: a tensor without a range, naming the layer.

  Example:
    >>> from fqjax.exporter.passes import freeze
    >>> from fqjax.tracing import to_graph
    >>> graph = freeze(to_graph(lambda p, x: x @ p, jnp.eye(2), jnp.ones((1, 2))), jnp.eye(2))
    >>> params = init_fake_quant(graph, {'input': Range(0.0, 255.0), '%0': Range(0.0, 255.0)})
    >>> fake_quant(graph, params, [jnp.array([[1.4, 300.0]])])[0].tolist()
    [[1.0, 255.0]]

  Source: Jacob et al. 2018, arXiv 1712.05877, section 3; ranges: Esser et al. 2020, arXiv
  1902.08153 (the gradient of a step, its scale), Choi et al. 2018, arXiv 1805.06085 (the clip).
  """
  steps = find_steps(graph, in_float)
  scale_of = sources(graph, steps)
  values: dict[str, Any] = dict(graph.constants)
  values |= zip(graph.inputs, map(jnp.asarray, inputs), strict=True)
  rounded: dict[str, jax.Array] = {}

  def find(name: str) -> Range:
    source = scale_of.get(name, name)
    if source not in params.ranges:
      raise ValueError(f'no range for tensor {source!r} ({layer_of(graph, source)}).')
    return params.ranges[source]

  def read(name: str, step: Step):
    if step.kind == 'float':
      return values[name]
    if name not in rounded:
      rounded[name] = fake_quantize(values[name], find(name))
    return rounded[name]

  batch = batch_size(graph, [jnp.shape(x) for x in inputs])
  for step in steps:
    local = {name: read(name, step) for name in step.inputs}
    if step.kind in ('conv', 'dot'):
      local |= _layer(step, params.weights, find(step.inputs[0]))
    for node in step.nodes:
      arrays = [local[name] if name in local else values[name] for name in node.inputs]
      local |= zip(node.outputs, evaluate_node(node, arrays, batch), strict=True)
    if step.integer:
      values[step.output] = fake_quantize(local[step.output], find(step.output))
      rounded[step.output] = values[step.output]
    else:
      made = {name: local[name] for node in step.nodes for name in node.outputs}
      values |= made
      if step.output in scale_of:
        rounded[step.output] = values[step.output]
  return tuple(jnp.asarray(values[name]) for name in graph.outputs)


def fake_quantize(x: jax.Array, chosen: Range) -> jax.Array:
  """Rounds to the values that the 256 integers of a range stand for.

  Args:
    x: float32.
    chosen: its ends, float32 scalars; they have gradients, scaled by 1 / sqrt(255 x.size) as a
      step of LSQ, so that one learning rate fits tensors of any size.

  Returns:
    Float32 like `x`.

  Example:
    >>> fake_quantize(jnp.array([-1.0, 0.4, 0.9, 900.0]), Range(0.0, 127.5)).tolist()
    [0.0, 0.5, 1.0, 127.5]
  """
  factor = float((STEPS * max(1, x.size)) ** -0.5)
  low = _scale_gradient(factor, jnp.minimum(jnp.float32(chosen.low), 0))
  high = _scale_gradient(factor, jnp.maximum(jnp.float32(chosen.high), 0))
  width = high - low
  scale = jnp.where(width > 0, width, jnp.float32(STEPS)) / jnp.float32(STEPS)
  zero = jnp.clip(_round(-low / scale), 0, STEPS)
  return (jnp.clip(_round(x / scale) + zero, 0, STEPS) - zero) * scale


def _layer(step: Step, weights: Mapping[str, jax.Array], given: Range) -> dict[str, jax.Array]:
  """Kernel and bias as the integers have them."""
  node, name, bias = step.nodes[0], step.details['kernel'], step.details['bias']
  kernel = weights[name]
  if step.kind == 'conv':
    channel = node.attributes['layout'][1].index('O')
  else:
    channel = 1 - node.attributes['contract'][1][0]
  axes = tuple(axis for axis in range(kernel.ndim) if axis != channel)
  scale = jnp.max(jnp.abs(kernel), axes) / jnp.float32(WEIGHT_STEPS)
  width = jnp.maximum(given.high, 0) - jnp.minimum(given.low, 0)
  input_scale = jnp.where(width > 0, width, jnp.float32(STEPS)) / jnp.float32(STEPS)
  if bias is not None:
    scale = jnp.maximum(scale, jnp.abs(weights[bias]).reshape(-1) / (input_scale * _BIAS_STEPS))
  # The scales are what weights and input make them, no parameters of their own here.
  scale = jax.lax.stop_gradient(jnp.where(scale > 0, scale, 1))
  wide = scale.reshape([-1 if axis == channel else 1 for axis in range(kernel.ndim)])
  local = {name: _round(kernel / wide) * wide}
  if bias is not None:
    shape, size = weights[bias].shape, weights[bias].size
    step_of_sums = jax.lax.stop_gradient(input_scale) * scale
    unit = step_of_sums.reshape(shape) if size == scale.size else jnp.min(step_of_sums)
    local[bias] = _round(weights[bias] / unit) * unit
  return local


@jax.custom_jvp
def _round(x: jax.Array) -> jax.Array:
  return jnp.round(x)


@_round.defjvp
def _round_jvp(primals, tangents):
  return jnp.round(primals[0]), tangents[0]


@functools.partial(jax.custom_jvp, nondiff_argnums=(0,))
def _scale_gradient(factor: float, x: jax.Array) -> jax.Array:
  del factor
  return x


@_scale_gradient.defjvp
def _scale_gradient_jvp(factor, primals, tangents):
  return primals[0], tangents[0] * factor
