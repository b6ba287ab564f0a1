"""A graph as an ONNX model."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
import json
import os
from typing import TYPE_CHECKING, Any

import numpy as np

from fqjax import files
from fqjax.exporter.onnx import _axes, _gather, _integer, _layers, _pointwise, _scales
from fqjax.exporter.onnx._writer import Draft, Writer
from fqjax.runtime import graph as graph_lib
from fqjax.runtime.graph import Graph, Node, Tensor

if TYPE_CHECKING:
  import onnx

LOWEST_OPSET = 17
# What a protocol buffer can hold.
_LARGEST = (1 << 31) - 1

_FLOAT: Mapping[str, Callable[[Writer, Node], None]] = {
  **_pointwise.HANDLERS,
  **_axes.HANDLERS,
  **_gather.HANDLERS,
  **_layers.HANDLERS,
}


def to_onnx(
  graph: Graph,
  path: str | os.PathLike | None = None,
  *,
  input_names: Sequence[str] | None = None,
  output_names: Sequence[str] | None = None,
  opset: int = LOWEST_OPSET,
  metadata: Mapping[str, Any] | None = None,
) -> onnx.ModelProto:
  """Writes a graph as ONNX, for engines that are not ours.

  The batch stays open: sizes 'n' and '49*n' become dimensions of that name. Convolutions and pools
  are in ONNX's NCHW, inputs and outputs in the graph's own layout; transpositions stand where the
  two meet, not around every layer. Integer graphs become QDQ: float operations between
  DequantizeLinear and QuantizeLinear, with weights int8 per output channel, activations uint8,
  biases int32. Engines that fuse the three compute in integers.

  ONNX has no sparse blocks, patterns, row blocks or delta-coded indices for weights, no codebooks
  of 1 to 7 bits, and no entropy coding: every float weight is written as float32 and every integer
  one as int8, zeros included (see `onnx_size`). Pruning shows in an `.fqx` file, not here.

  Args:
    graph: a valid graph whose parameters are constants, as `fqjax.exporter.passes.freeze` returns.
    path: file to write, whole or not at all; none if None.
    input_names: in the order of `graph.inputs`; those by default.
    output_names: in the order of `graph.outputs`; 'output' or 'output/0', 'output/1', ... by
      default.
    opset: version of ONNX's operators, 17 or later. Bitwise operations on integers are in 18, and
      raise it.
    metadata: key -> text (other values are written as JSON), kept in the model's properties.

  Returns:
    The model, an `onnx.ModelProto`.

  Raises:
    ImportError: `onnx` is not installed.
    ValueError: parameters are not bound; names that repeat or are not as many as there are tensors;
      an opset that is too low or unknown; a model of more than 2 GB; or what ONNX cannot say, with
      the node, its layer and what to do.
    OSError: the file cannot be written; an older one stays as it was.

  Example:
    >>> from fqjax.exporter.passes import freeze
    >>> from fqjax.tracing import to_graph
    >>> params, x = {'w': jnp.ones((3, 2))}, jnp.ones((1, 3))
    >>> traced = to_graph(lambda p, x: jax.nn.relu(x @ p['w']), params, x)
    >>> model = to_onnx(freeze(traced, params))
    >>> [node.op_type for node in model.graph.node]
    ['MatMul', 'Relu']
    >>> model.graph.input[0].type.tensor_type.shape.dim[0].dim_param
    'n'
  """
  onnx = _import_onnx()
  if graph.parameters:
    raise ValueError(
      f'{len(graph.parameters)} parameters are not bound, {graph.parameters[0]!r} first: '
      'use passes.bind_parameters, or passes.freeze.'
    )
  graph_lib.validate(graph)
  inputs = _names('input', input_names, graph.inputs, graph.inputs)
  single = len(graph.outputs) == 1
  default = ['output' if single else f'output/{i}' for i in range(len(graph.outputs))]
  outputs = _names('output', output_names, default, graph.outputs)
  if both := set(inputs) & set(outputs):
    raise ValueError(f'{min(both)!r} names an input and an output.')
  writer = Writer(graph, _opset(graph, opset, onnx.defs.onnx_opset_version()))
  scales = _scales.find_scales(graph)
  for number, node in enumerate(graph.nodes):
    _write_node(writer, number, node, scales)
  names = _settle(writer, inputs, outputs)
  model = _model(writer, names, inputs, outputs, metadata or {})
  if path is not None:
    with files.replacing(path) as unfinished:
      unfinished.write_bytes(model.SerializeToString())
  return model


def onnx_size(model: onnx.ModelProto) -> int:
  """Bytes of the file a model makes.

  Args:
    model: of `to_onnx`.

  Example:
    >>> from fqjax.exporter.passes import freeze
    >>> from fqjax.tracing import to_graph
    >>> params, x = {'w': jnp.zeros((100, 100))}, jnp.ones((1, 100))
    >>> model = to_onnx(freeze(to_graph(lambda p, x: x @ p['w'], params, x), params))
    >>> 40_000 < onnx_size(model) < 41_000  # zeros cost as much as other numbers
    True
  """
  return model.ByteSize()


def _import_onnx() -> Any:
  try:
    import onnx
  except ImportError as error:
    raise ImportError(
      "writing ONNX needs the package onnx: pip install 'fqjax[onnx]'."
    ) from error  # fmt: skip
  return onnx


def _names(
  kind: str, given: Sequence[str] | None, default: Sequence[str], tensors: Sequence[str]
) -> list[str]:
  names = list(default if given is None else given)
  if len(names) != len(tensors):
    raise ValueError(f'{len(names)} {kind}_names for {len(tensors)} {kind}s.')
  if wrong := [name for name in names if not isinstance(name, str) or not name]:
    raise ValueError(f'{kind}_names must be texts, got {wrong[0]!r}.')
  if len(set(names)) < len(names):
    raise ValueError(f'{kind}_names repeat: {", ".join(names)}.')
  return names


def _opset(graph: Graph, wanted: int, highest: int) -> int:
  if not LOWEST_OPSET <= wanted <= highest:
    raise ValueError(
      f'opset must be {LOWEST_OPSET} to {highest}, what this onnx knows; got {wanted}.'
    )
  bits = any(
    _pointwise.bitwise(graph.tensors[node.inputs[0]].dtype, node.op)
    for node in graph.nodes
    if node.inputs
  )
  return max(wanted, 18) if bits else wanted


def _write_node(writer: Writer, number: int, node: Node, scales: Mapping[str, float]) -> None:
  writer.begin(number, node)
  where = f'node {number}, {node.op}' + (f' ({node.scope})' if node.scope else '')
  try:
    if 'bfloat16' in [writer.dtype(name) for name in (*node.inputs, *node.outputs)]:
      raise ValueError('bfloat16, which engines compute differently: trace in float32.')
    if node.op in _integer.HANDLERS:
      _integer.HANDLERS[node.op](writer, node, scales)
    else:
      _FLOAT[node.op](writer, node)
  except ValueError as error:
    raise ValueError(f'{where}: {error}') from error


def _settle(writer: Writer, inputs: Sequence[str], outputs: Sequence[str]) -> dict[str, str]:
  """Name in the writer -> name in the file: what was asked for, then the graph's, once each."""
  graph = writer.graph
  names = {writer.read(name): new for name, new in zip(graph.inputs, inputs, strict=True)}
  writer.begin(len(graph.nodes), Node('output', (), ()))
  for name, new in zip(graph.outputs, outputs, strict=True):
    value = writer.read(name)
    if value in names or value in writer.initializers:
      value = writer.emit('Identity', value)
    names[value] = new
  taken = {*inputs, *outputs}
  drafted = [name for draft in writer.drafts for name in draft.outputs]
  for value in (*writer.initializers, *drafted):
    if value in names:
      continue
    name = writer.labels.get(value, value)
    while name in taken:
      name += "'"
    names[value] = name
    taken.add(name)
  return names


def _model(
  writer: Writer,
  names: Mapping[str, str],
  inputs: Sequence[str],
  outputs: Sequence[str],
  metadata: Mapping[str, Any],
) -> onnx.ModelProto:
  onnx = _import_onnx()
  helper, graph = onnx.helper, writer.graph

  def declared(name: str, tensor: Tensor) -> Any:
    dtype = helper.np_dtype_to_tensor_dtype(np.dtype(tensor.dtype))
    return helper.make_tensor_value_info(name, dtype, list(tensor.shape))

  def node(draft: Draft) -> Any:
    attributes = dict(draft.attributes)
    if 'to' in attributes:
      attributes['to'] = helper.np_dtype_to_tensor_dtype(np.dtype(attributes['to']))
    named = [[names.get(name, name) for name in part] for part in (draft.inputs, draft.outputs)]
    return helper.make_node(draft.op, *named, name=draft.name, **attributes)

  used = {name for draft in writer.drafts for name in draft.inputs}
  arrays = {names[name]: array for name, array in writer.initializers.items() if name in used}
  if sum(array.nbytes for array in arrays.values()) > _LARGEST:
    raise ValueError('the weights take more than 2 GB, which one ONNX file cannot hold.')
  proto = helper.make_graph(
    [node(draft) for draft in writer.drafts],
    'fqjax',
    [declared(new, graph.tensors[name]) for name, new in zip(graph.inputs, inputs, strict=True)],
    [declared(new, graph.tensors[name]) for name, new in zip(graph.outputs, outputs, strict=True)],
    [onnx.numpy_helper.from_array(array, name) for name, array in arrays.items()],
  )
  opsets = [helper.make_opsetid('', writer.opset)]
  # The oldest format that has these operators, which the most engines read.
  version = helper.find_min_ir_version_for(opsets)
  model = helper.make_model(
    proto, opset_imports=opsets, ir_version=version, producer_name='fqjax'
  )  # fmt: skip
  texts = {
    key: value if isinstance(value, str) else json.dumps(value) for key, value in metadata.items()
  }
  helper.set_model_props(model, texts)
  return model
