"""Text as numbers of words: the standard library's docstrings, or files of your own."""

import ast
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
import dataclasses
import functools
import hashlib
import os
import pathlib
import platform
import re
import sysconfig
from typing import Any
import warnings

import numpy as np

UNKNOWN, END = '<unk>', '<eos>'
SPLITS = ('train', 'valid', 'test')

_PTB = 'ptb:PATH'
_WORD = re.compile(r"[^\W\d_]+(?:'[^\W\d_]+)?|\d+")
_SENTENCE = re.compile(r'(?<=[.!?])\s+|\n\s*\n')
# Folders of the standard library that are no part of its documentation.
_SKIPPED = frozenset({'test', 'tests', 'idle_test', 'site-packages', 'dist-packages'})


@dataclasses.dataclass(frozen=True, eq=False)
class Text:
  """Words as numbers, in three parts that share no document.

  Attributes:
    name: what was asked for, and of which version.
    vocabulary: the word of each number; 0 is '<unk>', 1 '<eos>' (end of a sentence), then the words
      of the training part, most frequent first.
    train: int32 [n].
    valid: int32 [n].
    test: int32 [n].
    sha256: of the words of all parts, before the vocabulary: two machines with the same one have
      read the same text.
  """

  name: str
  vocabulary: tuple[str, ...]
  train: np.ndarray
  valid: np.ndarray
  test: np.ndarray
  sha256: str

  def encode(self, words: str | Iterable[str]) -> np.ndarray:
    """Numbers of words (or of a string's, between spaces), int32 [n]; those without one get 0."""
    return _encode(words.split() if isinstance(words, str) else words, self._numbers)

  def decode(self, tokens: Iterable[int]) -> str:
    """The words of numbers, a space between them."""
    return ' '.join(self.vocabulary[int(token)] for token in tokens)

  def facts(self) -> dict[str, Any]:
    """What a report says of the text (JSON-able): name, sha256, words, and the share unknown."""
    return {
      'text': self.name,
      'sha256': self.sha256,
      'vocabulary': len(self.vocabulary),
      'words': {part: len(getattr(self, part)) for part in SPLITS},
      'unknown': {part: float(np.mean(getattr(self, part) == 0)) for part in SPLITS},
    }

  @functools.cached_property
  def _numbers(self) -> dict[str, int]:
    return {word: i for i, word in enumerate(self.vocabulary)}

  def __repr__(self) -> str:
    sizes = ', '.join(f'{part} {len(getattr(self, part)):,}' for part in SPLITS)
    return f'Text({self.name}: {sizes} words, vocabulary {len(self.vocabulary):,})'


def load_text(name: str, *, vocab_size: int | None = 10_000) -> Text:
  """Opens a text by name, to train language models on.

  Args:
    name: one of
      'python_docs': the docstrings of the standard library of this very Python, in lower case
      without punctuation, numbers as 'N'. Needs no files; its modules are parsed, none imported. A
      module belongs to one part by the hash of its name, about a tenth each to 'valid' and 'test',
      and a docstring that stands in several modules is kept in the first only. What occurs once in
      'train' is '<unk>' there, so that a model learns to expect the unknown. Every version of
      Python has its own text: compare results by `Text.sha256`;
      'ptb:PATH': ptb.train.txt, ptb.valid.txt and ptb.test.txt in the folder PATH, words separated
      by spaces, a sentence per line.
    vocab_size: number of words at most, '<unk>' and '<eos>' among them; None takes all of the
      training part.

  Returns:
    A `Text`.

  Raises:
    ValueError: an unknown name, a vocabulary without words, a part without words, bytes that are no
      UTF-8.
    FileNotFoundError: a file is missing; says which, and what is expected.

  Example:
    >>> text = load_text('python_docs', vocab_size=1000)
    >>> len(text.vocabulary), text.vocabulary[:2], text.train.dtype.name
    (1000, ('<unk>', '<eos>'), 'int32')
    >>> text.decode(text.encode('return the xyzzy <eos>'))
    'return the <unk> <eos>'
  """
  if vocab_size is not None and vocab_size < 3:
    raise ValueError(f'vocab_size counts <unk>, <eos> and at least one word, got {vocab_size}.')
  scheme, _, rest = name.partition(':')
  if name == 'python_docs':
    label = f'python_docs {platform.python_implementation()} {platform.python_version()}'
    parts = _python_docs(sysconfig.get_path('stdlib'))
    return _text(label, parts, vocab_size, least=2)
  if scheme == 'ptb' and rest:
    return _text(name, _ptb(pathlib.Path(rest).expanduser()), vocab_size, least=1)
  raise ValueError(f"unknown text {name!r}: choose 'python_docs' or '{_PTB}'.")


def _text(
  name: str, parts: Mapping[str, Sequence[str]], vocab_size: int | None, least: int
) -> Text:
  """Numbers the words of three parts; those that occur less than `least` times have no number."""
  for part, words in parts.items():
    if set(words) <= {UNKNOWN, END}:
      raise ValueError(f'{name}: the part {part!r} holds no words.')
  counts = Counter(parts['train'])
  del counts[UNKNOWN], counts[END]
  # The order of words that are equally frequent must not depend on where they stand.
  ranked = sorted(
    (word for word in counts if counts[word] >= least), key=lambda word: (-counts[word], word)
  )
  vocabulary = (UNKNOWN, END, *ranked)[:vocab_size]
  numbers = {word: i for i, word in enumerate(vocabulary)}
  digest = hashlib.sha256()
  for part in SPLITS:
    digest.update(f'{part}\n{" ".join(parts[part])}\n'.encode())
  encoded = {part: _encode(parts[part], numbers) for part in SPLITS}
  return Text(name, vocabulary, **encoded, sha256=digest.hexdigest())


def _encode(words: Iterable[str], numbers: Mapping[str, int]) -> np.ndarray:
  tokens = np.fromiter((numbers.get(word, 0) for word in words), np.int32)
  tokens.flags.writeable = False
  return tokens


# The two texts: part -> words.


def _ptb(folder: pathlib.Path) -> dict[str, list[str]]:
  paths = {part: folder / f'ptb.{part}.txt' for part in SPLITS}
  missing = [path.name for path in paths.values() if not path.is_file()]
  if missing:
    raise FileNotFoundError(
      f'{_PTB}: {folder.absolute()} has no {", ".join(missing)}. PATH is the folder of '
      "ptb.train.txt, ptb.valid.txt and ptb.test.txt; 'python_docs' needs no files."
    )
  parts = {}
  for part, path in paths.items():
    try:
      lines = path.read_text(encoding='utf-8').splitlines()
    except UnicodeDecodeError as e:
      raise ValueError(f'{path} is no UTF-8 text: {e}.') from e
    parts[part] = [word for line in lines for word in (*line.split(), END)]
  return parts


@functools.lru_cache(maxsize=2)
def _python_docs(folder: str) -> dict[str, list[str]]:
  """Kept per process: parsing the library takes seconds."""
  parts: dict[str, list[str]] = {part: [] for part in SPLITS}
  seen = set()
  for module, path in _modules(pathlib.Path(folder)):
    words = parts[_part_of(module)]
    for docstring in _docstrings(path):
      found = tuple(_words(docstring))
      if found not in seen:
        seen.add(found)
        words += found
  if not any(parts.values()):
    raise FileNotFoundError(
      f'python_docs: no docstring in the .py files of {folder}, where the standard library of this '
      'Python should be (some distributions pack it). Use another Python, or a text of your own: '
      f"'{_PTB}'."
    )
  return parts


def _part_of(module: str) -> str:
  """By the name alone, so that a module stays where it is when others come or go."""
  tenth = int.from_bytes(hashlib.sha256(module.encode()).digest()[:4], 'big') % 10
  return {0: 'valid', 1: 'test'}.get(tenth, 'train')


def _modules(folder: pathlib.Path) -> list[tuple[str, pathlib.Path]]:
  """Dotted name and file of every module below a folder, in the order of the names."""
  found = []
  for root, folders, files in os.walk(folder):
    folders[:] = [name for name in folders if name.isidentifier() and name not in _SKIPPED]
    package = pathlib.Path(root).relative_to(folder).parts
    for name in files:
      if name.endswith('.py'):
        found.append(('.'.join((*package, name[:-3])), pathlib.Path(root, name)))
  return sorted(found)


def _docstrings(path: pathlib.Path) -> list[str]:
  """Docstrings of a module, its classes and functions, in the order of the file."""
  with warnings.catch_warnings():
    warnings.simplefilter('ignore')  # old escapes in strings: not ours to mend
    try:
      tree = ast.parse(path.read_bytes())
    except (SyntaxError, ValueError):
      return []  # templates and the like
  return [doc for node in _documented(tree) if (doc := ast.get_docstring(node))]


_Documented = ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef


def _documented(node: ast.AST) -> Iterator[_Documented]:
  if isinstance(node, _Documented):
    yield node
  # Only statements hold definitions: expressions, most of a file, need not be looked through.
  for field in ('body', 'handlers', 'orelse', 'finalbody'):
    for child in getattr(node, field, ()):
      yield from _documented(child)


def _words(text: str) -> Iterator[str]:
  for sentence in _SENTENCE.split(text):
    words = _WORD.findall(sentence)
    yield from ('N' if word.isdigit() else word.lower() for word in words)
    if words:
      yield END
