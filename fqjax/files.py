"""Files that are either whole or not there, whatever ends the program that writes them."""

from collections.abc import Iterator
import contextlib
import os
import pathlib


@contextlib.contextmanager
def replacing(path: str | os.PathLike) -> Iterator[pathlib.Path]:
  """Writes under another name; the file appears, or takes the place of the old one, when whole.

  The other name lies beside `path` and ends in `.tmp`. What is written is on the disk before it
  gets its name. After an error `path` is as it was; after a kill too, with the `.tmp` beside it.

  Args:
    path: the file.

  Yields:
    The path to write to.

  Raises:
    OSError: as writing or renaming does.

  Example:
    >>> import tempfile
    >>> path = pathlib.Path(tempfile.mkdtemp()) / 'numbers.txt'
    >>> with replacing(path) as unfinished:
    ...   _ = unfinished.write_text('1 2 3')
    ...   print(path.exists())
    False
    >>> path.read_text()
    '1 2 3'
  """
  path = pathlib.Path(path)
  # With the process number: two processes that write the same file do not write into each other's.
  unfinished = path.with_name(f'{path.name}.{os.getpid()}.tmp')
  try:
    yield unfinished
    with open(unfinished, 'rb+') as f:
      os.fsync(f.fileno())
    os.replace(unfinished, path)
  finally:
    unfinished.unlink(missing_ok=True)


def write_text(path: str | os.PathLike, text: str) -> None:
  """Writes a text file (UTF-8) by `replacing`.

  Args:
    path: the file.
    text: all of it.

  Raises:
    OSError: as writing or renaming does; the file is as it was.

  Example:
    >>> import tempfile
    >>> path = pathlib.Path(tempfile.mkdtemp()) / 'note.txt'
    >>> write_text(path, 'written')
    >>> [p.name for p in path.parent.iterdir()]
    ['note.txt']
  """
  with replacing(path) as unfinished:
    unfinished.write_text(text, encoding='utf-8')
