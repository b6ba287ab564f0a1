"""The report as a browser draws it: wide and narrow, something to see and nothing cut off."""

import html
import json
import re
import shutil
import subprocess

import numpy as np
import PIL.Image
import pytest

from fqjax.data import Corrupt
from fqjax.train import report
from tests.train.test_report import everything, picture

NAMES = ('chromium', 'chromium-browser', 'google-chrome', 'google-chrome-stable', 'chrome')

# A frame as wide as asked for: the window itself may not become that narrow.
PAGE = """<!doctype html><meta charset="utf-8"><style>body {{ margin: 0 }}</style>
<iframe id="frame" style="border: 0" width="{width}" height="{height}" srcdoc="{text}"></iframe>
<pre id="found"></pre>
<script>
const frame = document.getElementById('frame');
frame.addEventListener('load', () => {{
  const root = frame.contentDocument.documentElement;
  const inScroll = (e) => e.closest('.scroll') !== null;
  const beyond = [...root.querySelectorAll('body *')].filter(
    (e) => !inScroll(e) && e.getBoundingClientRect().right > root.clientWidth + 0.5);
  document.getElementById('found').textContent = JSON.stringify({{
    width: root.clientWidth, content: root.scrollWidth, height: root.scrollHeight,
    beyond: beyond.map((e) => e.tagName + '.' + e.getAttribute('class')),
    pictures: [...root.querySelectorAll('.picture img')].map(
      (e) => [e.getBoundingClientRect().width, e.closest('.scroll').clientWidth]),
    columns: getComputedStyle(root.querySelector('.samples')).gridTemplateColumns.split(' ').length,
  }});
}});
</script>"""


@pytest.fixture(scope='module')
def browser(tmp_path_factory):
  binary = next(filter(None, map(shutil.which, NAMES)), None)
  if binary is None:
    pytest.skip(f'no browser to look with: none of {", ".join(NAMES)} is on the PATH')
  # Some systems have a script of that name which only says how to install the browser.
  if subprocess.run([binary, '--version'], capture_output=True, timeout=60).returncode:
    pytest.skip(f'{binary} does not run')
  profile = tmp_path_factory.mktemp('profile')

  def run(*words):
    command = [
      binary, '--headless', '--no-sandbox', '--disable-gpu', '--hide-scrollbars', '--no-first-run',
      '--disable-dev-shm-usage', '--disable-background-networking', '--force-color-profile=srgb',
      f'--user-data-dir={profile}', *words,
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return done.stdout

  return run


def long_report(folder, **changes):
  """All sections, with names longer than a telephone is wide."""
  arguments = everything() | {
    'title': 'tiny_imagenet10: cifar_resnet20 on DCT coefficients and on pixels',
    'command': 'python -m experiments.x --config=configs/x.py:demo,settings=rgb+dct+dct_gate --workdir=DIR',
    'history': {name: everything()['history'] for name in ('rgb', 'dct', 'gate_then_static')},
    'figures': [('Narrow', picture(3.0), 'a ' * 200), ('Wide', picture(9.0))],
    'corrupt': {'training': Corrupt(7, {f'/data/{"sub" * 30}/{i}.jpg': 'cut' for i in range(7)})},
  }
  return report.write_report(folder / 'report.html', **(arguments | changes)).read_text()


def framed(folder, text, width, height=1400):
  """A page that shows another one at this width; the words that open it in a window around it."""
  page = folder / f'{width}.html'
  page.write_text(PAGE.format(width=width, height=height, text=html.escape(text)))
  return f'--window-size={max(width, 600)},{height}', page.as_uri()


def measured(browser, size, page):
  (found,) = re.findall(
    r'<pre id="found">(.*?)</pre>', browser(size, '--dump-dom', page), re.DOTALL
  )
  assert found, 'the page did not load'
  return json.loads(html.unescape(found))


@pytest.mark.parametrize('width, columns', [(1280, 7), (390, 2)])
def test_page_fits_its_window_and_is_drawn(browser, tmp_path, width, columns):
  where = framed(tmp_path, long_report(tmp_path), width)
  found = measured(browser, *where)
  assert found['width'] == width
  assert found['content'] <= width, 'the page scrolls sideways'
  assert found['beyond'] == [], 'cut off at the right'
  assert found['height'] > 2000
  assert found['columns'] == columns  # of photographs
  # A narrow picture is shown as drawn; a wide one shrinks by a quarter at most, then scrolls.
  (narrow, around_narrow), (wide, around_wide) = found['pictures']
  assert narrow == pytest.approx(288, abs=1) and around_narrow == pytest.approx(288, abs=1)
  assert wide == pytest.approx(864 if width > 900 else 648, abs=1) and around_wide <= width
  # Drawn from top to bottom: no band of the window is empty, and colours other than text are there.
  browser(f'--screenshot={tmp_path}/page.png', *where)
  picture = np.asarray(PIL.Image.open(tmp_path / 'page.png').convert('RGB'))[:, :width]
  assert picture.shape[:2] == (1400, width)
  assert all(band.std() > 3 for band in np.array_split(picture, 7))
  coloured = np.ptp(picture.astype(int), axis=-1) > 60
  assert coloured.mean() > 0.002


def test_a_page_that_is_too_wide_would_be_noticed(browser, tmp_path):
  wide = long_report(tmp_path).replace('</main>', '<p style="width: 900px">wide</p></main>')
  found = measured(browser, *framed(tmp_path, wide, 390))
  assert found['content'] > 390 and found['beyond'] == ['P.null']
