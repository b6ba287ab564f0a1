"""A network as it is used where only NumPy is: load a file, call it."""

from collections.abc import Mapping, Sequence
import os
from typing import Any, NamedTuple

import numpy as np

from fqjax.runtime import _bounds, _header, reference
from fqjax.runtime import graph as graph_lib
from fqjax.runtime._file import ArtifactError, File, open_file
from fqjax.runtime._stored import read_arrays
from fqjax.runtime.graph import Graph, Node, Tensor

_KEYS = {'sections', 'operations', 'graphs', 'arrays', 'labels', 'metadata'}


class Spec(NamedTuple):
  """An input or output of a model.

  Attributes:
    name: where it stands in the caller's containers, 'input' for a single array.
    shape: whole numbers, and the batch: 'n', or a multiple of it such as '49*n'.
    dtype: NumPy's name of the element type.
    layout: what its axes are, e.g. 'NHWC'; '' where nothing says so.
  """

  name: str
  shape: tuple[int | str, ...]
  dtype: str
  layout: str = ''

  def __str__(self) -> str:
    layout = f' {self.layout}' if self.layout else ''
    return f'{self.name}: {self.dtype}[{", ".join(map(str, self.shape))}]{layout}'


class Signature(NamedTuple):
  """One way to call a model: a model exported for several image sizes has several.

  Attributes:
    graph: what runs.
    takes: tree of the arguments, as `fqjax.runtime._header` writes it: a tuple of those by position
      and a dict of those by name.
    returns: tree of the result.
  """

  graph: Graph
  takes: Any
  returns: Any


class Model:
  """A network that runs with NumPy alone.

  Args:
    signatures: at least one.
    header: of the file; labels, metadata and the like are read from it.

  Attributes:
    inputs: what the first signature takes.
    outputs: what it returns.
    signatures: all of them.
    labels: name of each class, or None.
    metadata: what was put into the file besides.
  """

  def __init__(self, signatures: Sequence[Signature], header: Mapping[str, Any]):
    self.signatures = tuple(signatures)
    self.labels: tuple[str, ...] | None = tuple(header['labels']) if 'labels' in header else None
    self.metadata: dict[str, Any] = dict(header.get('metadata', {}))
    self.inputs, self.outputs = _specs(self.signatures[0])

  def __call__(self, *args: Any, **kwargs: Any) -> Any:
    """Runs the network.

    Args:
      *args: arrays, or containers of arrays, as the exported function took them; any strides, the
        very type it was exported for.
      **kwargs: likewise.

    Returns:
      Arrays in the containers of the exported function; they are new, C-contiguous, and the
      caller's own.

    Raises:
      ValueError: other containers, a shape or a type that the file does not hold, with a list of
        what it holds; NaN where a network of integers begins.
    """
    problems = []
    for signature in self.signatures:
      try:
        leaves = _header.leaves_of(signature.takes, args, kwargs)
        arrays = [np.asarray(leaf) for leaf in leaves]
        _fit(signature.graph, arrays)
      except ValueError as error:
        problems.append(str(error))
        continue
      results = reference.run(signature.graph, arrays)
      # What is no result of arithmetic (a slice, an input passed on) may be shared.
      owned = [np.array(x, order='C', copy=True) for x in results]
      return _header.build(signature.returns, owned.__getitem__, 'the result')
    if len(problems) == 1:
      raise ValueError(problems[0])
    raise ValueError('no signature of the file fits:\n  ' + '\n  '.join(problems))

  def __str__(self) -> str:
    lines = []
    for i, signature in enumerate(self.signatures):
      inputs, outputs = _specs(signature)
      prefix = f'signature {i}, ' if len(self.signatures) > 1 else ''
      lines += [f'{prefix}input {spec}' for spec in inputs]
      lines += [f'{prefix}output {spec}' for spec in outputs]
    return '\n'.join(lines)


def load(path: str | os.PathLike, *, limit: int | None = None, mmap: bool = True) -> Model:
  """Opens an artifact.

  Weights that are stored plainly stay in the file until they are used (it is mapped into memory);
  the others are decoded. Every checksum is verified, every shape worked out, every index checked.

  Args:
    path: of the file.
    limit: elements that the arrays may have together, and a tensor on its own; what is allowed by
      default grows with the file (docs/format.md). Raise it for a file you trust.
    mmap: leave plainly stored weights in the file, mapped into memory. Then nobody may write into
      it while the model lives (`Artifact.save` does not: it puts another file in its place, which
      Windows refuses). False reads the file and is done with it.

  Returns:
    The model.

  Raises:
    ArtifactError: the file is damaged, cut off, from a newer version, or asks for more than its size
      justifies; naming the file, the section and the byte.
    OSError: it cannot be opened.
  """
  file = open_file(path, mmap)
  try:
    return read(file, limit)
  except ArtifactError as error:
    raise ArtifactError(f'{os.fspath(path)}: {error}') from None


def loads(data: bytes, *, limit: int | None = None) -> Model:
  """As `load`, from the bytes of a file.

  Args:
    data: all of them.
    limit: as in `load`.

  Raises:
    ArtifactError: as `load`.
  """
  return read(File(np.frombuffer(data, np.uint8)), limit)


def read(file: File, limit: int | None = None) -> Model:
  """The model in an opened file."""
  header = file.header
  _check_texts(header)
  arrays = read_arrays(file, limit)
  dtypes = {entry['name']: entry['dtype'] for entry in header['arrays']}
  entries = header.get('graphs')
  if not isinstance(entries, list) or not entries:
    raise ArtifactError('header: graphs must be a list of at least one.')
  signatures = []
  for entry in entries:
    graph = _header.graph_from_json(entry, header.get('operations'), arrays, dtypes)
    try:
      _bounds.check(graph, limit)
    except ValueError as error:
      raise ArtifactError(str(error)) from None
    takes, returns = entry.get('takes'), entry.get('returns')
    _header.check_tree(takes, len(graph.inputs), 'arguments')
    _header.check_tree(returns, len(graph.outputs), 'results')
    kinds = [list(x)[:1] for x in takes['tuple']] if _is_tuple(takes) else []
    if kinds != [['tuple'], ['dict']]:
      raise ArtifactError('header: a graph takes a tuple of (arguments, named arguments).')
    signatures.append(Signature(graph, takes, returns))
  return Model(signatures, header)


def _is_tuple(tree: Any) -> bool:
  inner = tree.get('tuple') if isinstance(tree, dict) else None
  return isinstance(inner, list) and all(isinstance(x, dict) for x in inner)


def _check_texts(header: Mapping[str, Any]) -> None:
  if unknown := set(header) - _KEYS:
    raise ArtifactError(f'header: unknown entry {min(unknown)!r}.')
  labels = header.get('labels', [])
  if not isinstance(labels, list) or not all(isinstance(label, str) for label in labels):
    raise ArtifactError('header: labels must be a list of texts.')
  if not isinstance(header.get('metadata', {}), dict):
    raise ArtifactError('header: metadata must be an object.')


def _fit(graph: Graph, arrays: Sequence[np.ndarray]) -> None:
  """Raises ValueError unless arrays are of the graph's shapes and types."""
  graph_lib.batch_size(graph, [x.shape for x in arrays])
  for name, array in zip(graph.inputs, arrays, strict=True):
    tensor = graph.tensors[name]
    if str(array.dtype) != tensor.dtype:
      raise ValueError(
        f'the file takes {tensor}, got {array.dtype}; convert it, types are never changed silently.'
      )


def _specs(signature: Signature) -> tuple[tuple[Spec, ...], tuple[Spec, ...]]:
  graph = signature.graph
  names = zip(graph.outputs, _labels(signature.returns), strict=True)
  outputs = tuple(_spec(graph.tensors[name], graph, label) for name, label in names)
  return tuple(_spec(graph.tensors[name], graph) for name in graph.inputs), outputs


def _spec(tensor: Tensor, graph: Graph, name: str = '') -> Spec:
  return Spec(name or tensor.name, tensor.shape, tensor.dtype, _layout(graph, tensor.name))


def _layout(graph: Graph, name: str) -> str:
  """What the convolution that reads or makes a tensor calls its axes."""
  for node in graph.nodes:
    if 'layout' in node.attributes:
      if node.inputs[0] == name:
        return node.attributes['layout'][0]
      if node.outputs[0] == name:
        return node.attributes['layout'][2]
    elif node.inputs and node.inputs[0] == name and _keeps_axes(graph, node):
      name = node.outputs[0]
  return ''


def _keeps_axes(graph: Graph, node: Node) -> bool:
  """Operations on single elements leave the axes what they are."""
  shapes = {graph.tensors[name].shape for name in (node.inputs[0], node.outputs[0])}
  return len(shapes) == 1 and node.op not in ('reshape', 'transpose')


def _labels(tree: Any) -> list[str]:
  """A name for each leaf of the result: its path, 'output' for a single array."""
  found: dict[int, str] = {}

  def walk(tree, path):
    if type(tree) is int:
      found[tree] = path or 'output'
    elif isinstance(tree, list):
      for i, x in enumerate(tree):
        walk(x, f'{path}/{i}'.lstrip('/'))
    elif isinstance(tree, dict):
      [(kind, inner)] = tree.items()
      if kind == 'tuple':
        walk(inner, path)
      elif kind in ('dict', 'named'):
        for key, x in (inner if kind == 'dict' else inner[1]).items():
          walk(x, f'{path}/{key}'.lstrip('/'))

  walk(tree, '')
  return [found[i] for i in sorted(found)]
