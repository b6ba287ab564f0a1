"""Documents: every public name is explained and on a page, examples run, the site builds strictly."""

import doctest
import html
import importlib
import inspect
import os
import pathlib
import re
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).resolve().parents[1]
ROOMS = ('ops', 'data', 'models', 'nn', 'train', 'tracing', 'sparsity', 'quantize', 'rules')
PAGES = sorted(path.relative_to(ROOT).as_posix() for path in (ROOT / 'docs').glob('*.md'))


def public_names(room):
  module = importlib.import_module(f'fqjax.{room}')
  assert getattr(module, '__all__', None), f'fqjax/{room}/__init__.py has no __all__'
  return module, list(module.__all__)


def says_enough(obj) -> bool:
  """A summary, and an example or what goes in; exceptions and plain getters need the first only."""
  text = inspect.getdoc(obj) or ''
  if not text.split('\n')[0].strip():
    return False
  if inspect.isclass(obj):
    explained = ('>>>', 'Args:', 'Attributes:')
    return issubclass(obj, Exception) or any(word in text for word in explained)
  takes = [p for p in inspect.signature(obj).parameters.values() if p.name != 'self']
  return not takes or '>>>' in text or 'Args:' in text


@pytest.mark.parametrize('room', ROOMS)
def test_every_public_name_is_explained(room):
  module, names = public_names(room)
  assert len(set(names)) == len(names)
  silent = []
  for name in names:
    obj = getattr(module, name)
    if callable(obj) and not says_enough(obj):
      silent.append(name)
  assert silent == [], f'fqjax.{room}: a docstring with an Example or Args for {silent}'


@pytest.mark.parametrize('room', ROOMS)
def test_rooms_and_names_of_the_reference_exist(room):
  text = (ROOT / 'docs' / 'api' / f'{room}.md').read_text()
  targets = re.findall(r'^::: (\S+)$', text, re.MULTILINE)
  assert targets[0] == f'fqjax.{room}'
  for target in targets:
    importlib.import_module(target)
  assert f'api/{room}.md' in (ROOT / 'mkdocs.yml').read_text()


@pytest.mark.parametrize('page', PAGES)
def test_examples_in_the_guide_run(page):
  # As a page is read: one name space per page, from top to bottom.
  result = doctest.testfile(str(ROOT / page), module_relative=False)
  assert result.failed == 0
  text = (ROOT / page).read_text()
  assert text.count('```') % 2 == 0


@pytest.mark.parametrize('page', ['README.md', *PAGES])
def test_modules_and_files_named_in_commands_exist(page):
  text = (ROOT / page).read_text()
  for module in re.findall(r'python -m ([a-z_]+(?:\.[a-z_]+)+)', text):
    assert importlib.util.find_spec(module) is not None, f'{page}: python -m {module}'
  for file in re.findall(r'--config=(configs/\w+\.py)', text):
    assert (ROOT / file).exists(), f'{page}: {file}'


def test_site_builds_strictly_and_shows_every_public_name(tmp_path):
  for needed in ('mkdocs', 'material', 'mkdocstrings_handlers.python'):
    pytest.importorskip(needed, reason="pip install -e '.[docs]' to check the site")
  site = tmp_path / 'site'
  built = subprocess.run(
    [sys.executable, '-m', 'mkdocs', 'build', '--strict', '--site-dir', site],
    cwd=ROOT, capture_output=True, text=True, timeout=300,
    env={**os.environ, 'NO_MKDOCS_2_WARNING': '1'},
  )  # fmt: skip
  assert built.returncode == 0, built.stdout + built.stderr
  for room in ROOMS:
    page = (site / 'api' / room / 'index.html').read_text()
    shown = set(re.findall(r'id="fqjax\.' + room + r'\.(\w+)"', page))
    missing = [name for name in public_names(room)[1] if name not in shown]
    assert missing == [], f'fqjax.{room}: not on its page: {missing}'
  # A page asks nobody else for anything: no font, style, script or picture from elsewhere.
  for path in site.rglob('*.html'):
    for tag in re.findall(r'<(?:link|script|img|iframe|source)\b[^>]*>', path.read_text()):
      for url in re.findall(r'(?:src|href)="?([^" >]+)', tag):
        assert not re.match(r'(https?:)?//', html.unescape(url)) or 'rel="canonical"' in tag, tag
