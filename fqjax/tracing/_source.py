"""What stands between a function and its graph: where in the code, and what to write instead."""

from collections.abc import Iterable
import dataclasses
import functools
import os
import sys
import sysconfig
import traceback
from types import TracebackType
from typing import Any, NamedTuple

# Frames of these are not the user's.
_LIBRARIES = ('jax', 'jaxlib', 'flax', 'haiku', 'equinox', 'einops', 'jaxtyping', 'numpy')


class Obstacle(NamedTuple):
  """Something that has no place in a graph.

  Attributes:
    scope: layer, 'ResNet/layer1_0/conv1'; '' outside all.
    primitive: JAX's name for the operation, or the argument or the error.
    source: 'file:line' of the user's code; '' if unknown.
    remedy: what to write instead.
    times: how often this line runs into it.
  """

  scope: str
  primitive: str
  source: str
  remedy: str
  times: int = 1

  def __str__(self) -> str:
    times = f' ({self.times} times)' if self.times > 1 else ''
    line = f'  [{self.source}]' if self.source else ''
    return f'{self.primitive} in {self.scope or "no scope"}{times}: {self.remedy}{line}'


@dataclasses.dataclass(frozen=True)
class Report:
  """What keeps a network from leaving JAX; `print(report)` lists it, `bool(report)` is `ok`.

  Attributes:
    obstacles: all of them, in order of execution.

  Example:
    >>> print(Report((Obstacle('head', 'fft', 'net.py:7', 'a product with a matrix'),)))
    1 operation has no place in a graph.
      fft in head: a product with a matrix  [net.py:7]
  """

  obstacles: tuple[Obstacle, ...] = ()

  @property
  def ok(self) -> bool:
    """True if nothing is in the way."""
    return not self.obstacles

  def __bool__(self) -> bool:
    return self.ok

  def __str__(self) -> str:
    if self.ok:
      return 'Every operation has its place in a graph.'
    noun = 'operation has' if len(self.obstacles) == 1 else 'operations have'
    lines = [f'  {obstacle}' for obstacle in self.obstacles]
    return '\n'.join([f'{len(lines)} {noun} no place in a graph.', *lines])


def source_line(tracebacks: Iterable[Any]) -> str:
  """'file:line' of the innermost call that is the user's.

  Args:
    tracebacks: JAX's of an equation and of the calls around it, from within; None for unknown.
  """
  for one in tracebacks:
    for frame in one.frames if one is not None else ():
      if _is_users(frame.file_name):
        return _show(frame.file_name, frame.line_num)
  return ''


def error_line(trace: TracebackType | None) -> str:
  """The same for an error's `__traceback__`."""
  for frame in reversed(traceback.extract_tb(trace)):
    if _is_users(frame.filename):
      return _show(frame.filename, frame.lineno or 0)
  return ''


def _show(path: str, line: int) -> str:
  here = os.getcwd() + os.sep
  return f'{path.removeprefix(here)}:{line}'


@functools.cache
def _is_users(path: str) -> bool:
  if path.startswith('<frozen'):
    return False
  modules = [sys.modules.get(name) for name in (*_LIBRARIES, 'fqjax.tracing', 'fqjax.exporter')]
  folders = [os.path.dirname(m.__file__) for m in modules if m is not None and m.__file__]
  if any(path.startswith(folder + os.sep) for folder in folders):
    return False
  # Installed packages lie below the standard library.
  standard = sysconfig.get_path('stdlib') + os.sep
  return not path.startswith(standard) or 'site-packages' in path
