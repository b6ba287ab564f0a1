"""Collects the nodes of an ONNX graph; protocol buffers are made of them last."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from fqjax.runtime import dims
from fqjax.runtime.dims import Shape
from fqjax.runtime.graph import Graph, Node

# Order of a tensor's axes in ONNX: place -> axis of the graph's tensor.
Order = tuple[int, ...]

# Constants up to this size are compared with each other.
_SMALL = 16


class Draft(NamedTuple):
  """One ONNX node; a dtype among the attributes is NumPy's name for it."""

  op: str
  inputs: tuple[str, ...]
  outputs: tuple[str, ...]
  attributes: Mapping[str, Any]
  name: str


class Writer:
  """Nodes, constants, and in which orders of axes each tensor exists.

  ONNX convolves and pools in NCHW. A tensor is made in the order its operation has; `read` gives it
  in another by a Transpose, once. Operations that do not care keep the order of their input, so that
  a network in NHWC has a transposition at its input and one where its maps are flattened.
  """

  def __init__(self, graph: Graph, opset: int):
    self.graph, self.opset = graph, opset
    self.drafts: list[Draft] = []
    self.initializers: dict[str, np.ndarray] = {}
    self.labels: dict[str, str] = {}  # name here -> name wished for
    self._forms: dict[str, dict[Order, str]] = {}
    self._constants: dict[Any, str] = {}
    self._batch: str | None = None
    self._prefix, self._count = '', 0
    for name in graph.inputs:
      self.bind(name, self._fresh(name))

  # Nodes.

  def begin(self, number: int, node: Node) -> None:
    """What follows belongs to this node of the graph."""
    self._prefix = f'{node.scope}/{node.op}_{number}' if node.scope else f'{node.op}_{number}'

  def emit(self, op: str, *inputs: str, **attributes: Any) -> str:
    """Adds a node of one output, and returns its name; '' stands for an input left out."""
    return self.emit_many(op, *inputs, count=1, **attributes)[0]

  def emit_many(self, op: str, *inputs: str, count: int, **attributes: Any) -> list[str]:
    outputs = tuple(self._fresh(self._prefix) for _ in range(count))
    while inputs and not inputs[-1]:
      inputs = inputs[:-1]
    name = f'{self._prefix}/{op}_{len(self.drafts)}'
    self.drafts.append(Draft(op, inputs, outputs, attributes, name))
    return list(outputs)

  def _fresh(self, base: str) -> str:
    self._count += 1
    return f'{base}~{self._count}'

  # Tensors of the graph.

  def bind(self, name: str, value: str, order: Order | None = None) -> None:
    """Says that `value` is the graph's tensor `name` with its axes in this order."""
    self._forms[name] = {self.identity(name) if order is None else order: value}
    self.labels.setdefault(value, name)

  def identity(self, name: str) -> Order:
    return tuple(range(len(self.shape(name))))

  def shape(self, name: str) -> Shape:
    return self.graph.tensors[name].shape

  def dtype(self, name: str) -> str:
    return self.graph.tensors[name].dtype

  def array(self, name: str) -> np.ndarray | None:
    """Its value if it is a constant."""
    return self.graph.constants.get(name)

  def order(self, name: str) -> Order:
    """The order in which a tensor was made."""
    return next(iter(self._forms[name])) if name in self._forms else self.identity(name)

  def read(self, name: str, order: Order | None = None) -> str:
    """The tensor with its axes in this order; without one as in the graph."""
    order = self.identity(name) if order is None else order
    forms = self._forms.setdefault(name, {})
    if order in forms:
      return forms[order]
    if name in self.graph.constants:
      array = self.graph.constants[name]
      moved = order != self.identity(name) and array.size > 1
      label = f'{name}:{"".join(map(str, order))}' if moved else name
      forms[order] = self.constant(np.transpose(array, order), label)
    else:
      source, value = next(iter(forms.items()))
      shape = self.shape(name)
      longer = [[axis for axis in one if shape[axis] != 1] for one in (source, order)]
      if longer[0] == longer[1]:
        # Nothing moves but axes of size 1.
        forms[order] = self.reshape(value, tuple(shape[axis] for axis in order))
      else:
        forms[order] = self.emit('Transpose', value, perm=[source.index(axis) for axis in order])
    return forms[order]

  def common_order(self, names: Sequence[str]) -> Order:
    """The order in which tensors of one rank meet: that of the largest that is no constant."""
    ranked = [name for name in names if self.shape(name)]
    moving = [name for name in ranked if name not in self.graph.constants]
    moving.sort(key=lambda name: dims.size(self.shape(name))[::-1], reverse=True)
    if not moving:
      return self.identity(ranked[0]) if ranked else ()
    return self.order(moving[0])

  def aligned(self, names: Sequence[str]) -> tuple[list[str], Order]:
    """Tensors of one rank in one order, scalars as they are."""
    order = self.common_order(names)
    return [self.read(name, order if self.shape(name) else ()) for name in names], order

  # Constants and shapes.

  def constant(self, array: Any, label: str = '') -> str:
    """An initializer; equal small ones are one."""
    array = np.asarray(array)
    key = (str(array.dtype), array.shape, array.tobytes()) if array.size <= _SMALL else None
    if key in self._constants:
      return self._constants[key]
    value = self._fresh(label or 'constant')
    self.initializers[value] = np.ascontiguousarray(array).reshape(array.shape)
    if label:
      self.labels[value] = label
    if key is not None:
      self._constants[key] = value
    return value

  def scalar(self, value: Any, dtype: str) -> str:
    return self.constant(np.asarray(value, dtype))

  def ints(self, values: Sequence[int]) -> str:
    return self.constant(np.asarray(values, np.int64))

  def cast(self, value: str, source: str, dtype: str) -> str:
    return value if source == dtype else self.emit('Cast', value, to=dtype)

  def sizes(self, shape: Shape) -> str:
    """A shape as a tensor, worked out at run time if it names the batch."""
    if all(isinstance(dim, int) for dim in shape):
      return self.ints([dims.split(dim)[0] for dim in shape])
    parts = []
    for dim in shape:
      times, symbolic = dims.split(dim)
      part = self.batch() if symbolic else self.ints([times])
      parts.append(self.emit('Mul', part, self.ints([times])) if symbolic and times > 1 else part)
    return parts[0] if len(parts) == 1 else self.emit('Concat', *parts, axis=0)

  def batch(self) -> str:
    """int64 [1]: the number that n stands for."""
    if self._batch is None:
      for name in self.graph.inputs:
        for axis, dim in enumerate(self.shape(name)):
          times, symbolic = dims.split(dim)
          if symbolic:
            size = self.emit('Shape', self.read(name), start=axis, end=axis + 1)
            self._batch = self.emit('Div', size, self.ints([times])) if times > 1 else size
            return self._batch
      raise ValueError('a size depends on the batch, and no input of the graph has one.')
    return self._batch

  def reshape(self, value: str, shape: Shape) -> str:
    count, power = dims.size(shape)
    if power <= 1 and (count or not power):
      target = self.ints([-1 if isinstance(dim, str) else dim for dim in shape])
    else:
      target = self.sizes(shape)
    return self.emit('Reshape', value, target, **({} if count else {'allowzero': 1}))

  def expand(self, value: str, now: Shape, shape: Shape) -> str:
    """Repeats axes of size 1."""
    if now == shape:
      return value
    # A size of 1 leaves an axis as it is, so that most shapes need not know the batch.
    wanted = tuple(1 if old == new else new for old, new in zip(now, shape, strict=True))
    return self.emit('Expand', value, self.sizes(wanted))

  def cut(
    self, value: str, axes: Sequence[int], starts: Sequence[int], stops: Sequence[int],
    steps: Sequence[int] | None = None,
  ) -> str:  # fmt: skip
    parts = [self.ints(part) for part in (starts, stops, axes)]
    return self.emit('Slice', value, *parts, *([self.ints(steps)] if steps else []))

  def pad(self, value: str, padding: Sequence[Sequence[int]], fill: str) -> str:
    """Adds values around all axes."""
    if not any(map(any, padding)):
      return value
    pads = self.ints([*(low for low, _ in padding), *(high for _, high in padding)])
    return self.emit('Pad', value, pads, fill)

  def spread(self, value: str, shape: Shape, axis: int, inner: int, fill: str) -> str:
    """Puts `inner` values between any two elements of an axis; `shape` is that of `value`."""
    size = shape[axis]
    assert isinstance(size, int)
    if not inner or size < 2:
      return value
    value = self.emit('Unsqueeze', value, self.ints([axis + 1]))
    padding = [(0, inner if i == axis + 1 else 0) for i in range(len(shape) + 1)]
    merged = (*shape[:axis], size * (inner + 1), *shape[axis + 1 :])
    value = self.reshape(self.pad(value, padding, fill), merged)
    return self.cut(value, [axis], [0], [(size - 1) * (inner + 1) + 1])

  def reduce(self, op: str, value: str, axes: Sequence[int]) -> str:
    """A reduction; its axes became an input with operator set 18, of ReduceSum with 13."""
    if not axes:
      return value
    if op == 'ReduceSum' or self.opset >= 18:
      return self.emit(op, value, self.ints(axes), keepdims=0)
    return self.emit(op, value, axes=list(axes), keepdims=0)
