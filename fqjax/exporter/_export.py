"""From a function of JAX to an artifact: trace, simplify, encode by value."""

from collections.abc import Callable, Iterable, Mapping, Sequence
import dataclasses
import hashlib
import pathlib
import sys
from typing import Any
import warnings

import jax
import numpy as np

from fqjax import files, quantize
from fqjax.exporter import passes
from fqjax.exporter._encode import encode, few_levels, has_levels
from fqjax.exporter._trees import to_json
from fqjax.runtime import _bounds, _file, _header, _model
from fqjax.runtime import graph as graph_lib
from fqjax.runtime._stored import Stored, to_sections
from fqjax.runtime.graph import Graph
from fqjax.sparsity import remove_unused
from fqjax.tracing import Traced, to_graph

PRECISIONS = ('float32', 'int8')
OPTIMIZE = ('speed', 'size')
BATCHES = ('open', 'fixed')


class Call:
  """Example arguments by position and by name, where one array or tree does not say it all.

  Args:
    *args: trees of arrays or `jax.ShapeDtypeStruct`s.
    **kwargs: likewise; what is neither array nor struct is fixed in the file.

  Example:
    >>> call = Call(jnp.zeros((1, 8)), mask=jnp.ones((1, 8), bool))
    >>> len(call.args), list(call.kwargs)
    (1, ['mask'])
  """

  def __init__(self, *args: Any, **kwargs: Any):
    self.args, self.kwargs = args, kwargs


@dataclasses.dataclass(frozen=True, eq=False)
class Artifact:
  """A network that has left JAX; calling it runs what is in the file, with NumPy.

  Attributes:
    data: the bytes of the file.
    graphs: what runs, one per example.
    arrays: how each array is stored.
    float_layers: of an integer network, what stayed in float: operation and layer.
    dense_bytes: of the parameters as raw float32.
  """

  data: bytes
  graphs: tuple[Graph, ...]
  arrays: tuple[Stored, ...]
  float_layers: tuple[str, ...]
  dense_bytes: int

  def __post_init__(self):
    # What cannot be read again must not leave.
    try:
      model = _model.loads(self.data)
    except _file.ArtifactError as error:
      model = _model.loads(self.data, limit=_largest(self))
      warnings.warn(f'load(path, limit=...) is needed for this file: {error}', stacklevel=3)
    object.__setattr__(self, '_model', model)

  @property
  def model(self) -> _model.Model:
    """As `fqjax.runtime.load` gives it."""
    return self._model  # pyright: ignore[reportAttributeAccessIssue]

  def __call__(self, *args: Any, **kwargs: Any) -> Any:
    """Runs the network; see `fqjax.runtime.Model`."""
    return self.model(*args, **kwargs)

  def save(self, path: str | pathlib.Path) -> pathlib.Path:
    """Writes the file; it is there whole, or the old one stays.

    Args:
      path: of the file, by custom ending in '.fqx'.

    Returns:
      The path.

    Raises:
      OSError: no such folder, no right to write, no space left.
    """
    path = pathlib.Path(path)
    with files.replacing(path) as unfinished:
      unfinished.write_bytes(self.data)
    return path

  def to_onnx(
    self, path: str | pathlib.Path | None = None, *, which: int | None = None, **options: Any
  ) -> Any:
    """A graph as ONNX; see `fqjax.exporter.onnx.to_onnx`.

    Args:
      path: of the file; None writes none.
      which: of `graphs`, where the network was exported for several sizes: an ONNX file holds one.
      **options: of `fqjax.exporter.onnx.to_onnx`.

    Returns:
      The `onnx.ModelProto`.

    Raises:
      ValueError: there are several graphs and `which` is none of them.
      ImportError: onnx is not installed.
    """
    from fqjax.exporter import onnx

    count = len(self.graphs)
    if which not in range(count) and (which is not None or count > 1):
      sizes = [', '.join(str(g.tensors[name].shape) for name in g.inputs) for g in self.graphs]
      raise ValueError(
        f'An ONNX file holds one graph, and here are {count}: '
        + '; '.join(f'which={i} for {size}' for i, size in enumerate(sizes))
      )
    return onnx.to_onnx(self.graphs[which or 0], path, **options)

  def report(self) -> str:
    """What is in the file: a line per array, and the sum; bytes are those of the file."""
    rows = [('array', 'shape', 'kept', 'stored as', 'values', 'index', 'bytes', 'ratio')]
    for a in self.arrays:
      size = int(np.prod(a.shape))
      table = sum(t.nbytes for t in (a.levels, a.scales) if t is not None)
      form = a.form if not table else f'{a.form}, {"levels" if a.levels is not None else "steps"}'
      rows.append((
        a.name,
        'x'.join(map(str, a.shape)) or '1',
        f'{a.kept:,}',
        form,
        f'{a.bits.values / 8:,.0f}',
        f'{(a.bits.total - a.bits.values) / 8 + table:,.0f}',
        f'{a.bytes:,}',
        f'{4 * size / max(1, a.bytes):.3g}x',
      ))  # fmt: skip
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = [
      '  '.join(
        cell.ljust(width) if i in (0, 3) else cell.rjust(width)
        for i, (cell, width) in enumerate(zip(row, widths, strict=True))
      ).rstrip()
      for row in rows
    ]
    ratio = self.dense_bytes / len(self.data)
    lines.append(
      f'{len(self.data):,} bytes, all of the file; {self.dense_bytes:,} as raw float32: {ratio:.4g}x'
    )
    if self.float_layers:
      lines += ['in float:', *(f'  {layer}' for layer in self.float_layers)]
    return '\n'.join(lines)


def export(
  apply_fn: Callable,
  params: Any,
  example: Any,
  *,
  batch_axes: Any = 0,
  batch: str = 'open',
  precision: str = 'float32',
  optimize: str = 'speed',
  ranges: Mapping[str, quantize.Range] | Iterable[Any] | None = None,
  preprocess: Callable | None = None,
  labels: Sequence[str] | None = None,
  metadata: Mapping[str, Any] | None = None,
  in_float: str = '',
  progress: bool | None = None,
) -> Artifact:
  """Takes a network out of JAX.

  `apply_fn(params, ...)` is traced, so that any function JAX can trace will do: Linen, NNX, Equinox,
  Haiku, plain. Constants and batch norm are folded, activations fused, and every array is stored in
  the form that its values allow: pruned and quantized ones are found by looking at them, whoever
  pruned and quantized them.

  Args:
    apply_fn: the network as it is used: no dropout, batch norm by its running statistics.
    params: first argument of `apply_fn`, a tree of arrays.
    example: the other arguments: an array, a tree of arrays (one argument) or a tuple (several);
      `Call(...)` where some go by name; or a list of such, one graph each, for several image sizes.
      `jax.ShapeDtypeStruct`s will do.
    batch_axes: axis of the batch in every input, or a tuple with an entry for each argument by
      position (a tree of axes for one that is a tree); arguments by name have their batch first.
    batch: 'open' for any number of items; 'fixed' for that of the example.
    precision: 'float32' keeps every weight as it is; 'int8' makes weights and activations 8 bits
      (docs/format.md).
    optimize: 'speed' stores large arrays so that they need not be decoded, sections aligned; 'size'
      leaves away what no path reads and deflates what is left.
    ranges: of 'int8': batches to calibrate on, each like `example` (never those that are scored),
      on which the mean errors of the weights are taken out of the biases too; or what
      `quantize.calibrate` found on the frozen graph, tensor -> `quantize.Range`.
    preprocess: function of the example's arguments, in front of the network and in the file:
      uint8 images to normalised floats, say.
    labels: name of each class; `python -m fqjax.runtime run` prints them.
    metadata: anything JSON can say; travels along.
    in_float: of 'int8': layers that stay in float, as in `quantize.integer_graph`.
    progress: whether to draw a bar on the standard error while arrays are encoded; None: if that is
      a terminal.

  Returns:
    The artifact: `save(path)`, `report()`, `to_onnx(path)`, and callable.

  Raises:
    ValueError: all operations that have no place in a graph, with what to write instead
      (`fqjax.can_export` lists them before any training); bfloat16; unknown options; no ranges.

  Example:
    >>> def network(params, x):
    ...   return jax.nn.relu(x @ params['kernel'] + params['bias'][None])
    >>> params = {'kernel': jnp.eye(3), 'bias': jnp.zeros(3)}
    >>> artifact = export(network, params, jnp.zeros((1, 3)))
    >>> artifact(np.float32([[1, -2, 3], [0, 1, 0]]))
    array([[1., 0., 3.],
           [0., 1., 0.]], dtype=float32)
  """
  for name, value, allowed in (
    ('precision', precision, PRECISIONS),
    ('optimize', optimize, OPTIMIZE),
    ('batch', batch, BATCHES),
  ):
    if value not in allowed:
      raise ValueError(f'{name}={value!r}: choose of {", ".join(map(repr, allowed))}.')
  if (precision == 'int8') != (ranges is not None):
    raise ValueError(
      "precision='int8' needs ranges=: batches to calibrate on, or what `quantize.calibrate` found; "
      "with 'float32' there are none."
    )
  dense_bytes = 4 * sum(np.size(leaf) for leaf in jax.tree.leaves(params))
  calls = [_call(x) for x in (example if isinstance(example, list) else [example])]
  whole = _in_front(preprocess, apply_fn), params
  # Of images of several sizes, each size makes a network of its own smaller.
  networks = [_without_unused(*whole, call) if optimize == 'size' else whole for call in calls]
  axes = batch_axes if batch == 'open' else None
  traced = [_trace(*network, call, axes) for network, call in zip(networks, calls, strict=True)]
  variables = [own for _, own in networks]
  graphs = [
    _frozen(one, own, precision == 'float32') for one, own in zip(traced, variables, strict=True)
  ]
  float_layers: tuple[str, ...] = ()
  if precision == 'int8':
    float_layers = quantize.float_layers(graphs[0], in_float)
    batches = ranges if isinstance(ranges, Mapping) else list(ranges or ())
    graphs = [
      _integers(one, graph, own, batches, in_float)
      for one, graph, own in zip(traced, graphs, variables, strict=True)
    ]
  graphs = [passes.fuse_sums(graph) for graph in graphs]
  with _Bar(sys.stderr.isatty() if progress is None else progress) as bar:
    graphs, arrays = _encoded(graphs, bar)
  for graph in graphs:
    _check(graph)
  entries, sections = to_sections(arrays)
  header: dict[str, Any] = {
    'operations': graph_lib.VERSION,
    'graphs': [
      {**_header.graph_to_json(graph, scopes=optimize == 'speed'), **_trees(one)}
      for one, graph in zip(traced, graphs, strict=True)
    ],
    'arrays': entries,
  }
  if labels is not None:
    header['labels'] = [str(label) for label in labels]
  if metadata:
    header['metadata'] = dict(metadata)
  try:
    small = optimize == 'size'
    data = _file.pack(header, sections, alignment=1 if small else 64, deflate=small)
  except (TypeError, ValueError) as error:
    raise ValueError(f'metadata is not what JSON can say: {error}') from error
  return Artifact(data, tuple(graphs), tuple(arrays), float_layers, dense_bytes)


def _call(example: Any) -> Call:
  if isinstance(example, Call):
    return example
  return Call(*example) if type(example) is tuple else Call(example)


def _in_front(preprocess: Callable | None, apply_fn: Callable) -> Callable:
  """`apply_fn(params, args, kwargs)`, behind the preprocessing."""

  def call(params, args, kwargs):
    if preprocess is None:
      return apply_fn(params, *args, **kwargs)
    found = preprocess(*args, **kwargs)
    return apply_fn(params, *found) if type(found) is tuple else apply_fn(params, found)

  return call


def _without_unused(apply_fn: Callable, params: Any, call: Call) -> tuple[Callable, Any]:
  """The network without channels that nothing reads, where that is possible."""
  removed = remove_unused(apply_fn, params, call.args, call.kwargs)
  return removed.apply, removed.variables


def _trace(apply_fn: Callable, params: Any, call: Call, batch_axis: Any) -> Traced:
  if batch_axis is not None and not isinstance(batch_axis, int):
    batch_axis = (batch_axis if type(batch_axis) is tuple else (batch_axis,), 0)
  return to_graph(apply_fn, params, call.args, call.kwargs, batch_axis=batch_axis)


def _frozen(traced: Traced, params: Any, as_they_are: bool) -> Graph:
  """Folded and fused; batch norm stays outside of kernels that have levels, which it would hide.

  Not where they become integers (`as_they_are` is False): there it only scales them.
  """
  keep = []
  if as_they_are:
    # As the layers see them: kernels may be products with masks, or transposed.
    bound = _folded(traced, params)
    keep = [
      name
      for name, layout in _layouts(bound).items()
      if has_levels(_plain(bound.constants[name]), layout)
    ]
  graph = passes.freeze(traced, params, keep)
  kernels = {name: _plain(graph.constants[name]) for name in _layouts(graph)}
  return dataclasses.replace(graph, constants={**graph.constants, **kernels})


def _folded(traced: Traced, params: Any) -> Graph:
  values = {name: np.asarray(x) for name, x in traced.parameters(params).items()}
  return passes.fold_constants(passes.bind_parameters(traced.graph, values))


def _plain(kernel: np.ndarray) -> np.ndarray:
  """A weight times a mask may be -0.0: nothing, for a layer, and stored as something."""
  return kernel + kernel.dtype.type(0)


def _integers(traced: Traced, graph: Graph, params: Any, ranges: Any, in_float: str) -> Graph:
  largest = _largest_levels(traced, graph, params)
  if not isinstance(ranges, Mapping):
    batches = [leaves for batch in ranges if _fits(graph, leaves := _leaves(traced, batch))]
    if not batches and ranges:
      takes = ', '.join(str(graph.tensors[name]) for name in graph.inputs)
      raise ValueError(f'no batch of ranges= is of the shape that the network takes: {takes}.')
    ranges = quantize.calibrate(graph, batches)
    graph = quantize.correct_bias(graph, ranges, batches, in_float, largest)
  return quantize.integer_graph(graph, ranges, in_float, largest)


def _largest_levels(traced: Traced, graph: Graph, params: Any) -> dict[str, np.ndarray]:
  """For kernels of few levels, folded or not: what the largest level is in each output channel.

  With it all channels round their levels alike, and there are as few of them afterwards.
  """
  found = {}
  unfolded = _folded(traced, params).constants
  for kernel, layout in _layouts(graph).items():
    before = unfolded.get(kernel.removesuffix(':folded'))
    after = graph.constants[kernel]
    if before is None or before.shape != after.shape or layout.count('O') != 1:
      continue
    few = few_levels(_plain(before), layout)
    # Channels with levels of their own share nothing.
    if few is None or few.bits > 7 or (few.levels is not None and few.axis is not None):
      continue
    axis = layout.index('O')
    rows = lambda x, axis=axis: np.abs(np.moveaxis(x, axis, 0)).reshape(x.shape[axis], -1).max(1)
    own = rows(before)
    if few.scales is not None:
      reach = few.scales * np.abs(few.codes).max()
    else:
      reach = np.full(len(own), own.max())
    # What batch norm has multiplied the channel with; nothing to be seen in one of zeros.
    found[kernel] = reach * np.divide(rows(after), own, out=np.zeros_like(own), where=own > 0)
  return found


def _leaves(traced: Traced, batch: Any) -> list[Any]:
  call = _call(batch)
  leaves, tree = jax.tree.flatten((call.args, call.kwargs))
  if tree != traced.inputs:
    raise ValueError(
      f'a batch of ranges= has another structure than the example:\n  {tree}\n  {traced.inputs}'
    )
  static = traced.static[traced.variables.num_leaves :]
  return [leaf for leaf, fixed in zip(leaves, static, strict=True) if fixed is None]


def _fits(graph: Graph, arrays: Sequence[Any]) -> bool:
  try:
    graph_lib.batch_size(graph, [np.shape(x) for x in arrays])
  except ValueError:
    return False
  return True


def _layouts(graph: Graph) -> dict[str, str]:
  """Constant -> what its axes are, by the layer that reads it."""
  found: dict[str, str] = {}
  for node in graph.nodes:
    if node.op in ('conv', 'qconv'):
      found[node.inputs[1]] = node.attributes['layout'][1]
    elif node.op == 'qdot':
      found[node.inputs[1]] = 'IO'
    elif node.op == 'dot':
      for name, axes, batch in zip(
        node.inputs, node.attributes['contract'], node.attributes['batch'], strict=True
      ):
        rank = len(graph.tensors[name].shape)
        if name in graph.constants and axes and not batch and rank > len(axes):
          found[name] = ''.join('I' if axis in axes else 'O' for axis in range(rank))
  return {name: layout for name, layout in found.items() if name in graph.constants}


def _encoded(graphs: Sequence[Graph], bar: '_Bar') -> tuple[list[Graph], list[Stored]]:
  """Every array once, however many graphs have it; graphs call it by its name in the file."""
  stored: dict[str, Stored] = {}
  known: dict[tuple, str] = {}
  renamed = []
  bar.total = sum(np.size(array) for graph in graphs for array in graph.constants.values())
  for graph in graphs:
    layouts, names = _layouts(graph), {}
    for name, array in graph.constants.items():
      array = np.asarray(array)
      digest = hashlib.blake2b(np.ascontiguousarray(array).tobytes()).digest()
      key = (str(array.dtype), array.shape, digest)
      if key not in known:
        # Numbered names belong to what nodes make.
        free = f'constant/{len(stored)}' if name[0] in '%#' else name
        while free in stored:
          free += "'"
        known[key] = free
        stored[free] = encode(free, array, layouts.get(name, ''))
      names[name] = known[key]
      bar.add(array.size)
    renamed.append(passes.rename(graph, names))
  return renamed, list(stored.values())


class _Bar:
  """How much has been encoded, on one line that is gone at the end."""

  def __init__(self, shown: bool):
    self.shown, self.total, self.done, self.drawn = shown, 0, 0, ''

  def __enter__(self) -> '_Bar':
    return self

  def add(self, count: int) -> None:
    self.done += count
    share = self.done / max(1, self.total)
    line = f'encoding [{"=" * round(30 * share):30}] {100 * share:3.0f} %'
    if self.shown and line != self.drawn:
      print(f'\r{line}', end='', file=sys.stderr, flush=True)
      self.drawn = line

  def __exit__(self, *_: object) -> None:
    if self.drawn:
      print(f'\r{" " * len(self.drawn)}\r', end='', file=sys.stderr, flush=True)


def _check(graph: Graph) -> None:
  graph_lib.validate(graph)
  for tensor in graph.tensors.values():
    if tensor.dtype == 'bfloat16':
      raise ValueError(
        f'{tensor} is bfloat16, which NumPy cannot compute; export the network with dtype=float32.'
      )


def _trees(traced: Traced) -> dict[str, Any]:
  static = traced.static[traced.variables.num_leaves :]
  return {
    'takes': to_json(traced.inputs, static, 'the arguments'),
    'returns': to_json(traced.outputs, None, 'the result'),
  }


def _largest(artifact: Artifact) -> int:
  """What reading our own file may take."""
  arrays = sum(int(np.prod(a.shape)) for a in artifact.arrays)
  return max(arrays, _bounds.FREE_ELEMENTS, 1 << 34)
