"""A graph as JSON and back, and the trees around it.

    {'inputs': [[name, shape, dtype]], 'constants': [name], 'nodes': [...], 'outputs': [number],
     'takes': tree, 'returns': tree}

Tensors are numbered: inputs, constants, then what the nodes make, in their order; a node is
[op, [number of each input], attributes, scope] and can only read what came before it. Shapes and
types of what nodes make are worked out when the file is read. A tree says how a caller's containers
hold arrays: a number is a leaf, [..] a list or, as {'tuple': [..]}, a tuple; {'dict': {..}},
{'named': [type, {field: ..}]}, None, and {'value': ..} for a leaf that was fixed when tracing.
"""

import collections
from collections.abc import Callable, Mapping, Sequence
import functools
import keyword
from typing import Any

import numpy as np

from fqjax.runtime import graph as graph_lib
from fqjax.runtime import oplist
from fqjax.runtime._file import ArtifactError
from fqjax.runtime.graph import Graph, Node, Tensor


def graph_to_json(graph: Graph, scopes: bool = True) -> dict[str, Any]:
  """What the header says of a graph without parameters.

  Args:
    graph: valid.
    scopes: whether to say where nodes come from.
  """
  made = [name for node in graph.nodes for name in node.outputs]
  number = {name: i for i, name in enumerate((*graph.inputs, *graph.constants, *made))}
  nodes = []
  for node in graph.nodes:
    entry: list[Any] = [node.op, [number[name] for name in node.inputs]]
    scope = node.scope if scopes else ''
    if node.attributes or scope:
      entry.append(dict(node.attributes))
    if scope:
      entry.append(scope)
    nodes.append(entry)
  return {
    'inputs': [
      [name, list(graph.tensors[name].shape), graph.tensors[name].dtype] for name in graph.inputs
    ],
    'constants': list(graph.constants),
    'nodes': nodes,
    'outputs': [number[name] for name in graph.outputs],
  }


def graph_from_json(
  entry: Any, version: Any, arrays: Mapping[str, np.ndarray], dtypes: Mapping[str, str]
) -> Graph:
  """Inverse of `graph_to_json`; every shape and type is worked out anew.

  Args:
    entry: of the header.
    version: of the operations.
    arrays: the file's, by name.
    dtypes: of the arrays as announced ('bfloat16' arrays are uint16 here).

  Raises:
    ArtifactError: naming node and operation.
  """
  if type(version) is not int or version != graph_lib.VERSION:
    raise ArtifactError(
      f'header: the file uses version {version!r} of the operations, this fqjax runs '
      f'{graph_lib.VERSION}; {"update fqjax" if _newer(version) else "export it again"}.'
    )
  inputs, constants, nodes, outputs = _parts(entry)
  tensors = [_input(x) for x in inputs]
  for name in constants:
    if name not in arrays:
      raise ArtifactError(f'header: the constant {name!r} is not among the arrays.')
    tensors.append(Tensor(name, arrays[name].shape, dtypes[name]))
  made = []
  for i, node in enumerate(nodes):
    op, reads, attributes, scope = _node(node, i)
    where = f'node {i}, {op}' + (f' ({scope})' if scope else '')
    read = [_tensor(tensors, number, where) for number in reads]
    try:
      found = oplist.infer(op, [(t.shape, t.dtype) for t in read], attributes)
    except (ValueError, TypeError, IndexError, OverflowError) as error:
      raise ArtifactError(f'{where}: {error}') from None
    names = [f'%{len(tensors) + j}' for j in range(len(found))]
    made.append(Node(op, tuple(t.name for t in read), tuple(names), attributes, scope))
    tensors += [Tensor(name, *kind) for name, kind in zip(names, found, strict=True)]
  graph = Graph(
    inputs=tuple(t.name for t in tensors[: len(inputs)]),
    parameters=(),
    constants={name: arrays[name] for name in constants},
    nodes=tuple(made),
    outputs=tuple(_tensor(tensors, number, 'outputs').name for number in outputs),
    tensors={t.name: t for t in tensors},
  )
  if len(graph.tensors) < len(tensors):
    raise ArtifactError('header: two tensors of a graph have the same name.')
  return graph


def _parts(entry: Any) -> tuple[list, list, list, list]:
  keys = ('inputs', 'constants', 'nodes', 'outputs')
  if not isinstance(entry, dict) or not all(isinstance(entry.get(key), list) for key in keys):
    raise ArtifactError(f'header: a graph must have the lists {", ".join(keys)}.')
  if unknown := set(entry) - {*keys, 'takes', 'returns'}:
    raise ArtifactError(f'header: unknown entry {min(unknown)!r} of a graph.')
  inputs, constants, nodes, outputs = (entry[key] for key in keys)
  if not all(isinstance(name, str) for name in constants):
    raise ArtifactError('header: constants must be names.')
  return inputs, constants, nodes, outputs


def _newer(version: Any) -> bool:
  return type(version) is int and version > graph_lib.VERSION


def _input(entry: Any) -> Tensor:
  if isinstance(entry, list) and len(entry) == 3:
    name, shape, dtype = entry
    tensor = Tensor(name, tuples(shape), dtype)
    if isinstance(name, str) and isinstance(shape, list) and isinstance(dtype, str):
      try:
        graph_lib.check_tensor(name, tensor)
      except ValueError as error:
        raise ArtifactError(f'header: {error}') from None
      return tensor
  raise ArtifactError(f'header: the input {entry!r} is not [name, shape, dtype].')


def _node(entry: Any, i: int) -> tuple[str, list, dict[str, Any], str]:
  if isinstance(entry, list) and 2 <= len(entry) <= 4:
    op, reads, attributes, scope = (*entry, {}, '')[: len(entry)] + ({}, '')[len(entry) - 2 :]
    if (
      isinstance(op, str)
      and isinstance(reads, list)
      and isinstance(attributes, dict)
      and isinstance(scope, str)
    ):
      return op, reads, {key: tuples(value) for key, value in attributes.items()}, scope
  raise ArtifactError(f'header: node {i} is {entry!r}, not [op, inputs, attributes, scope].')


def _tensor(tensors: Sequence[Tensor], number: Any, where: str) -> Tensor:
  if type(number) is not int or not 0 <= number < len(tensors):
    raise ArtifactError(f'{where}: reads tensor {number!r}; there are {len(tensors)} before it.')
  return tensors[number]


def tuples(value: Any) -> Any:
  """Lists of JSON as the tuples that graphs hold."""
  return tuple(tuples(x) for x in value) if isinstance(value, list) else value


# ---------------------------------------------------------------------------- trees


def check_tree(tree: Any, leaves: int, what: str) -> None:
  """Checks that a tree names every leaf 0..leaves-1 once.

  Raises:
    ArtifactError: it does not, or is no tree.
  """
  found: list[int] = []
  build(tree, lambda i: found.append(i), what)
  if sorted(found) != list(range(leaves)):
    raise ArtifactError(
      f'header: the tree of {what} names the leaves {found}, not 0..{leaves - 1}.'
    )


def build(tree: Any, leaf: Callable[[int], Any], what: str) -> Any:
  """The containers of a tree with `leaf(number)` in them.

  Raises:
    ArtifactError: no tree.
  """
  if type(tree) is int:
    return leaf(tree)
  if tree is None:
    return None
  if isinstance(tree, list):
    return [build(x, leaf, what) for x in tree]
  if isinstance(tree, dict) and len(tree) == 1:
    [(kind, inner)] = tree.items()
    if kind == 'value':
      return inner
    if kind == 'tuple' and isinstance(inner, list):
      return tuple(build(x, leaf, what) for x in inner)
    if kind == 'dict' and isinstance(inner, dict):
      return {key: build(x, leaf, what) for key, x in inner.items()}
    if kind == 'named' and isinstance(inner, list) and len(inner) == 2:
      return _named(inner[0], inner[1], leaf, what)
  raise ArtifactError(f'header: {tree!r} in the tree of {what} is no container.')


def _named(name: Any, fields: Any, leaf: Callable[[int], Any], what: str) -> Any:
  words = [name, *fields] if isinstance(fields, dict) else [None]
  usable = [
    isinstance(w, str)
    and w.isascii()
    and w.isidentifier()
    and not keyword.iskeyword(w)
    and w[0] != '_'
    for w in words
  ]
  if not all(usable):
    raise ArtifactError(f'header: {name!r} in the tree of {what} is no named tuple.')
  return _named_type(name, tuple(fields))(*(build(x, leaf, what) for x in fields.values()))


@functools.lru_cache(256)
def _named_type(name: str, fields: tuple[str, ...]) -> Any:
  # The names of the exporter's own type; nothing but names is taken from the file. One type for all
  # calls, or results of two calls would be of different structures.
  return collections.namedtuple(name, fields)


def leaves_of(takes: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> list[Any]:
  """The leaves of a caller's arguments, in the order of their numbers.

  Args:
    takes: tree of the header: a tuple of the arguments by position and a dict of those by name.
    args: like it: dicts of the same keys, sequences of the same length.
    kwargs: likewise.

  Raises:
    ValueError: other arguments, or containers of another structure.
  """
  found: dict[int, Any] = {}
  by_position, by_name = takes['tuple']
  wanted = by_position['tuple']
  if len(args) != len(wanted):
    raise ValueError(
      f'takes {len(wanted)} argument{"s" * (len(wanted) != 1)} by position, got {len(args)}.'
    )
  for i, (tree, value) in enumerate(zip(wanted, args, strict=True)):
    _match(tree, value, f'argument {i}', found)
  _match(by_name, dict(kwargs), 'the arguments by name', found)
  return [found[i] for i in sorted(found)]


def _kind(tree: Any) -> tuple[str, Any]:
  return ('list', tree) if isinstance(tree, list) else next(iter(tree.items()))


def _match(tree: Any, value: Any, where: str, found: dict[int, Any]) -> None:
  if type(tree) is int:
    found[tree] = value
    return
  if tree is None:
    if value is not None:
      raise ValueError(f'{where} must be None, got {type(value).__name__}.')
    return
  kind, inner = _kind(tree)
  if kind == 'value':
    if not isinstance(value, bool | int | float | str) or value != inner:
      raise ValueError(f'{where} was fixed to {inner!r} when the network was exported.')
    return
  if kind in ('dict', 'named'):
    inner = inner if kind == 'dict' else inner[1]
    parts = value if isinstance(value, dict) else getattr(value, '_asdict', lambda: None)()
    if not isinstance(parts, dict) or set(parts) != set(inner):
      got = ', '.join(map(str, parts)) if isinstance(parts, dict) else type(value).__name__
      raise ValueError(f'{where} must have {", ".join(inner) or "none"}; got {got or "none"}.')
    for key, x in inner.items():
      _match(x, parts[key], f'{where}[{key!r}]', found)
    return
  if not isinstance(value, list | tuple) or len(value) != len(inner):
    got = f'{len(value)}' if isinstance(value, list | tuple) else type(value).__name__
    raise ValueError(f'{where} must be a {kind} of {len(inner)}; got {got}.')
  for i, x in enumerate(inner):
    _match(x, value[i], f'{where}[{i}]', found)
