"""The report: one well-formed page without external parts, right numbers, hostile text tamed."""

import base64
import dataclasses
import html.parser
import io
import re
import subprocess
import sys

import matplotlib.figure
import ml_collections
import numpy as np
import PIL.Image
import pytest

from fqjax.data import Corrupt
from fqjax.train import _svg, _tables, plots, report

HOSTILE = '<script>alert(1)</script>"\'&'
VOID = {'meta', 'img', 'br', 'link', 'hr', 'input'}


class Page(html.parser.HTMLParser):
  """Reads a page strictly: every tag closed in order; collects what the tests ask about."""

  def __init__(self, text):
    super().__init__(convert_charrefs=True)
    self.open, self.tags, self.words = [], [], []
    self.feed(text)
    self.close()
    assert self.open == []

  def handle_starttag(self, tag, attrs):
    assert len({name for name, _ in attrs}) == len(attrs), f'repeated attribute in {tag} {attrs}'
    self.tags.append((tag, dict(attrs)))
    if tag not in VOID:
      self.open.append(tag)

  def handle_startendtag(self, tag, attrs):
    self.tags.append((tag, dict(attrs)))

  def handle_endtag(self, tag):
    assert self.open and self.open.pop() == tag, f'</{tag}> closes something else'

  def handle_data(self, data):
    if self.open and self.open[-1] != 'style':
      self.words.append(data)

  @property
  def text(self):
    return ' '.join(' '.join(self.words).split())

  def all(self, tag, **attrs):
    return [a for t, a in self.tags if t == tag and all(a.get(k) == v for k, v in attrs.items())]


def history(n=40):
  rows = []
  for step in range(1, n + 1):
    row = {'step': step, 'time': float(step), 'train/loss': 2.0 / step, 'lr': 0.1}
    if step % 10 == 0:
      row.update({'val/loss': 2.2 / step, 'val/top1': step / 50, 'val/top5': 0.99})
    rows.append(row)
  return rows


def picture(width=3.0):
  figure = matplotlib.figure.Figure(figsize=(width, 2.0))
  axes = figure.subplots()
  axes.bar([0, 1, 2], [3, 1, 2])
  axes.set(title='bars', xlabel='layer', ylabel='weights\nthat live')
  return figure


def everything(name=''):
  rng = np.random.default_rng(0)
  image = rng.integers(0, 256, (16, 16, 3), np.uint8)
  return dict(
    title='A run' + name,
    command='python -m experiments.x --workdir=DIR' + name,
    config={'a': {'b' + name: 1.5}, 'c': name},
    history=history(),
    heatmap=np.linspace(1, 0, 192),
    confusion=rng.integers(0, 9, (3, 3)),
    class_names=['cat' + name, 'dog', 'cow'],
    samples=[report.Sample(image, 0, 1, 0.5), report.Sample(image, 2, 2), (image, 'x', 'x' + name)],
    tables=[
      report.Table('First' + name, ('what', 'top-1'), [('RGB' + name, (81.234, 0.42))], name),
      ('Second', ('what', 'MACs' + name), [('DCT', 1_000_000), ('none', None)], ''),
    ],
    figures=[
      report.Picture('Kept' + name, picture(), 'As planned' + name),
      ('Rates', plots.accuracy_against_bytes([plots.Point('RGB', 3072, 70.0)])),
    ],
    summary={'Accuracy' + name: (81.234, 0.42), 'Input': '768 bytes' + name},
    hardware='one core' + name,
  )


def write(tmp_path, **arguments):
  defaults = dict(title='t', command='c', config={}, history=[])
  path = report.write_report(tmp_path / 'report.html', **{**defaults, **arguments})
  return path.read_text(encoding='utf-8')


# -------------------------------------------------------------------- the page


def test_undecodable_images_are_counted_and_named(tmp_path):
  many = {f'{i}{HOSTILE}.jpg': 'truncated' for i in range(7)}
  corrupt = {'training': Corrupt(1234, many), 'validation': Corrupt()}
  rows = [{'step': 1, 'loss': 1.0, 'data/corrupt': 3}, {'step': 2, 'loss': 0.5, 'data/corrupt': 4}]
  page = Page(write(tmp_path, corrupt=corrupt, history=rows))
  assert 'training images 1,234 samples (7 files) could not be decoded and did not' in page.text
  assert f': 0{HOSTILE}.jpg; 1{HOSTILE}.jpg;' in page.text and 'and 2 more.' in page.text
  assert 'Of the validation images every one could be decoded.' in page.text
  assert 'data/corrupt' not in page.text  # a line says more than a curve
  assert 'decoded' not in Page(write(tmp_path)).text


def test_page_is_well_formed_and_stands_alone(tmp_path):
  text = write(tmp_path, **everything())
  page = Page(text)
  for tag, attrs in page.tags:
    for name in ('src', 'href', 'srcset', 'data', 'action', 'xlink:href'):
      if name in attrs:
        assert attrs[name].startswith(('data:', '#')), (tag, attrs)
    assert tag not in ('script', 'link', 'iframe', 'object', 'form')
    assert not any(name.startswith('on') for name in attrs)
  assert 'url(' not in text and '@import' not in text
  assert (
    "default-src 'none'"
    in page.all('meta', **{'http-equiv': 'Content-Security-Policy'})[0]['content']
  )
  assert len(text) < 200_000


def test_page_is_accessible(tmp_path):
  page = Page(write(tmp_path, **everything()))
  assert page.all('html')[0]['lang'] == 'en'
  assert 'width=device-width' in page.all('meta', name='viewport')[0]['content']
  levels = [int(tag[1]) for tag, _ in page.tags if re.fullmatch('h[1-6]', tag)]
  assert levels.count(1) == 1 and levels[0] == 1
  assert all(b <= a + 1 for a, b in zip(levels, levels[1:]))
  assert all(a.get('alt') for a in page.all('img'))
  for svg in page.all('svg'):
    assert svg.get('aria-label') or svg.get('aria-hidden') == 'true'
  ids = [a['id'] for _, a in page.tags if 'id' in a]
  assert len(ids) == len(set(ids))
  assert {a['href'][1:] for a in page.all('a')} <= set(ids)
  # Whatever scrolls can be reached with the keyboard and has a name.
  for box in page.all('div', **{'class': 'scroll'}):
    assert box['tabindex'] == '0' and box['aria-label']
  assert all('scope' in a for a in page.all('th'))


def test_hostile_text_stays_text(tmp_path):
  arguments = everything(HOSTILE)
  rows = [{**row, 'train/' + HOSTILE: 1.0} for row in arguments['history']]
  arguments['history'] = {'a' + HOSTILE: rows, 'b': rows}
  text = write(tmp_path, **arguments)
  assert '<script' not in text
  page = Page(text)
  assert not page.all('script')
  # Title, command, configuration, class, tables, summary, hardware, run: all shown literally.
  assert page.text.count(HOSTILE) >= 12
  write(tmp_path, **{**arguments, 'confusion': np.ones((40, 40)), 'class_names': [HOSTILE] * 40})
  Page((tmp_path / 'report.html').read_text())


def test_all_parts_are_there_and_optional_ones_are_not(tmp_path):
  full = Page(write(tmp_path, **everything()))
  wanted = [
    'Result',
    'Pictures',
    'Curves',
    'Chosen channels',
    'Comparisons',
    'Confusion',
    'Photographs',
    'Repeat it',
  ]
  assert all(word in full.text for word in wanted)
  assert '81.23 ± 0.42' in full.text.replace('\xa0', ' ')
  assert '1,000,000' in full.text
  assert 'python -m experiments.x --workdir=DIR' in full.text
  assert 'one core' in full.text and 'jaxlib' in full.text
  bare = Page(write(tmp_path))
  assert not any(word in bare.text for word in wanted[:-1])
  assert 'Repeat it' in bare.text and 'cores' in bare.text


def test_report_replaces_the_old_one_whole_or_not_at_all(tmp_path):
  path = tmp_path / 'new' / 'folder' / 'report.html'
  report.write_report(path, title='first', command='', config={}, history=[])
  before = path.read_text()
  with pytest.raises(ValueError, match='heatmap has 65 channels'):
    report.write_report(
      path, title='second', command='', config={}, history=[], heatmap=np.ones(65)
    )
  assert path.read_text() == before
  report.write_report(path, title='third', command='', config={}, history=[])
  assert 'third' in path.read_text()
  assert [p.name for p in path.parent.iterdir()] == ['report.html']


# -------------------------------------------------------------------- curves


def test_lines_go_through_the_values_and_break_at_gaps():
  y = np.array([0.0, 10.0, np.nan, np.inf, 5.0, 5.0, np.nan, 2.0])
  svg = _svg.line_chart([_svg.Series('a', np.arange(0, 80, 10.0), y, 0, False)], title='t')
  (path,) = re.findall(r' d="([^"]+)"', svg)
  assert re.sub(r'[\d.,]+', '', path) == 'MLMLM'
  points = [tuple(map(float, p.split(','))) for p in re.findall(r'[\d.]+,[\d.]+', path)]
  width = _svg.WIDTH - _svg.LEFT - _svg.RIGHT
  height = _svg.HEIGHT - _svg.TOP - _svg.BOTTOM
  for (px, py), (step, value) in zip(points, [(0, 0), (10, 10), (40, 5), (50, 5), (70, 2)]):
    assert abs(px - (_svg.LEFT + width * step / 70)) < 0.06
    assert abs(py - (_svg.TOP + height * (1 - value / 10))) < 0.06
  # The lonely last value is seen although no line reaches it.
  assert svg.count('<circle') == 1


@pytest.mark.parametrize(
  'rows',
  [
    [],
    [{'step': 1}],
    [{'step': 5, 'train/loss': 1.0}],
    [{'step': 5, 'train/loss': float('nan')}],
    [{'step': i, 'val/loss': 0.0} for i in range(3)],
    [{'step': i, 'val/loss': 10.0**-i, 'other': -1.0, 'word': 'x'} for i in range(9)],
    [{'step': 7, 'lr': 0.1}, {'step': 3, 'lr': 0.2}, {'step': 7, 'lr': np.float32(0.3)}],
    [{'step': i, 'train/loss': 1.0 + i % 7} for i in range(5000)],
  ],
)
def test_any_history_makes_a_page(tmp_path, rows):
  Page(write(tmp_path, history=rows))
  Page(write(tmp_path, history={'one': rows, 'two': history()}))


def test_curves_are_grouped_and_named(tmp_path):
  page = Page(write(tmp_path, history=history()))
  charts = page.all('svg', **{'class': 'chart'})
  assert [c['aria-label'].split(' by ')[0] for c in charts] == [
    'Loss',
    'Accuracy, %',
    'Learning rate',
  ]
  # Accuracy is in percent whatever the file has; final value 40/50.
  assert 'validation top-1: from 20 to 80' in charts[1]['aria-label']
  assert 'train loss' in page.text and 'validation loss' in page.text
  facts = page.text.split('Curves')[1]
  assert 'Accuracy 80.00 %' in facts and 'Steps 40' in facts


def test_thinning_keeps_means_and_gaps():
  x = np.arange(10_000.0)
  y = np.sin(x / 500)
  y[5_000] = np.nan
  a, b = _svg.thin(x, y)
  assert len(a) == len(b) == _svg.MAX_POINTS
  assert np.isnan(b).sum() == 1
  good = np.isfinite(b)
  np.testing.assert_allclose(b[good], np.sin(a[good] / 500), atol=1e-3)
  assert _svg.thin(x[:400], y[:400])[1] is not None and len(_svg.thin(x[:400], y[:400])[0]) == 400


def test_ticks_are_round_few_and_cover():
  rng = np.random.default_rng(0)
  for _ in range(500):
    low = rng.normal() * 10.0 ** rng.integers(-6, 7)
    high = low + abs(rng.normal()) * 10.0 ** rng.integers(-4, 7) + 1e-6
    marks = _svg.ticks(low, high)
    step = marks[1] - marks[0]
    assert 2 <= len(marks) <= 9
    assert marks[0] <= low + 1e-6 * step and marks[-1] >= high - 1e-6 * step
    assert f'{step:.0e}'[0] in '125'


# -------------------------------------------------------------------- channels


def test_heat_map_prints_zigzag_numbers_and_names_channels():
  share = np.zeros(64)
  share[10] = 0.75  # u = 1, v = 2, zig-zag 7
  svg = _svg.heat_map(share, component='Cb', first=64, size=8)
  numbers = [int(n) for n in re.findall(r'class="number[^>]*>(\d+)<', svg)]
  assert numbers[:8] == [0, 1, 5, 6, 14, 15, 27, 28]
  assert sorted(numbers) == list(range(64)) and numbers[63] == 63
  assert 'Cb u=1 v=2: channel 74, zig-zag 7, chosen in 75 %' in svg
  assert svg.count('--v:75%') == 1 and svg.count('--v:0%') == 63
  # Its cell stands in column 2, row 1.
  x, y = re.search(r'channel 74,.*?x="(\d+)" y="(\d+)"', svg).groups()
  assert (int(x), int(y)) == (16 + 2 * 28, 16 + 28)


@pytest.mark.parametrize(('block', 'panels'), [(4, 3), (8, 3), (8, 1), (16, 3)])
def test_heat_maps_of_other_blocks(tmp_path, block, panels):
  heat = np.zeros(panels * block * block)
  heat[:5] = 0.9
  heat[7] = np.nan
  page = Page(write(tmp_path, heatmap=heat, block=block))
  assert len(page.all('svg', **{'class': 'map'})) == panels
  assert f'5 of {heat.size} channels' in page.text
  assert len(page.all('rect', **{'class': 'none'})) == 1


# -------------------------------------------------------------------- confusion


def test_small_confusion_is_a_matrix(tmp_path):
  counts = np.array([[8, 2, 0], [0, 0, 0], [1, 1, 2]])
  page = Page(write(tmp_path, confusion=counts, class_names=['cat', 'dog', 'cow']))
  cells = [a for a in page.all('td') if 'taken for' in a.get('title', '')]
  assert len(cells) == 9
  assert cells[1]['title'] == 'cat taken for dog: 20.0 %' and '--v:20%' in cells[1]['style']
  assert [i for i, c in enumerate(cells) if 'right' in c['class']] == [0, 4, 8]


@pytest.mark.parametrize(('classes', 'matrix'), [(2, True), (30, True), (31, False), (1000, False)])
def test_large_confusion_is_a_list_of_pairs(tmp_path, classes, matrix):
  counts = np.eye(classes, dtype=int) * 50
  counts[1, 0] = 7
  page = Page(write(tmp_path, confusion=counts, class_names=[f'c{i}' for i in range(classes)]))
  assert bool(page.all('table', **{'class': 'confusion'})) == matrix
  if not matrix:
    assert 'c1 c0 7 12.3 Hardest classes' in page.text  # the one pair there is
    assert 'c1 87.7 57' in page.text


def test_confusion_that_does_not_fit_is_refused(tmp_path):
  with pytest.raises(ValueError, match='got \\[2, 3\\]'):
    write(tmp_path, confusion=np.ones((2, 3)))
  with pytest.raises(ValueError, match='4 class names for 3 classes'):
    write(tmp_path, confusion=np.ones((3, 3)), class_names=list('abcd'))


# -------------------------------------------------------------------- photographs, tables, config


def test_photographs_keep_their_pixels_and_say_right_or_wrong(tmp_path):
  rng = np.random.default_rng(0)
  small = rng.integers(0, 256, (32, 48, 3), np.uint8)
  large = rng.integers(0, 256, (600, 448, 3), np.uint8)
  page = Page(
    write(tmp_path, samples=[(small, 0, 0, 0.913), (large, 1, 0)], class_names=['cat', 'dog'])
  )
  assert '✓ right cat 91\xa0%' in ' '.join(page.words) or '✓ right cat 91 %' in page.text
  assert '✗ wrong cat was dog' in page.text
  first, second = (a['src'] for a in page.all('img'))
  decode = lambda url: PIL.Image.open(io.BytesIO(base64.b64decode(url.split(',')[1])))
  np.testing.assert_array_equal(np.asarray(decode(first)), small)
  assert second.startswith('data:image/jpeg') and max(decode(second).size) == 224
  assert [a['alt'] for a in page.all('img')] == [
    'Photograph of class cat',
    'Photograph of class dog',
  ]


def test_pictures_stand_after_the_first_table_and_stay_as_drawn(tmp_path):
  text = write(tmp_path, **everything())
  keys = [a['id'] for a in Page(text).all('section')]
  assert keys[:3] == ['summary', 'pictures', 'curves']
  section = text.split('<section id="pictures"')[1].split('</section>')[0]
  page = Page(section.split('>', 1)[1])
  first, second = page.all('img')
  assert first['alt'] == 'Kept. bars, vertical: weights that live, horizontal: layer'
  assert second['alt'] == 'Rates. vertical: top-1, %, horizontal: input bytes per image'
  assert 'Kept As planned Rates' in page.text and 'top-1' not in page.text
  # As large as drawn, at half as many pixels again, and never smaller than is readable.
  assert (first['width'], first['height']) == ('288', '192')
  assert first['style'] == '--least:216px'
  shown = PIL.Image.open(io.BytesIO(base64.b64decode(first['src'].split(',')[1])))
  figure, buffer = picture(), io.BytesIO()
  figure.savefig(buffer, format='png', dpi=144)
  np.testing.assert_array_equal(np.asarray(shown), np.asarray(PIL.Image.open(buffer)))
  for box in page.all('div', **{'class': 'scroll'}):
    assert box['tabindex'] == '0' and box['aria-label'] in ('Kept', 'Rates')


def test_what_is_no_figure_is_refused(tmp_path):
  with pytest.raises(ValueError, match="picture 'x' holds Axes, not a Matplotlib figure"):
    write(tmp_path, figures=[('x', picture().axes[0])])


def test_sample_images_of_another_kind_are_refused(tmp_path):
  with pytest.raises(ValueError, match='uint8 \\[h, w, 3\\], got float32 \\[8, 8, 3\\]'):
    write(tmp_path, samples=[(np.zeros((8, 8, 3), np.float32), 0, 0)])


@pytest.mark.parametrize(
  ('value', 'text'),
  [
    (None, ''), (150528, '150,528'), (np.int64(7), '7'), (0.123456, '0.1235'), (81.0, '81'),
    (12345.67, '12,345.7'), ((81.234, 0.4191), '81.23&nbsp;± 0.42'), ((81.234, 3.2), '81.2&nbsp;± 3.2'),
    ((81.234, None), '81.23'), (float('nan'), 'nan'), (True, 'yes'), ('<b>', '&lt;b&gt;'),
  ],
)  # fmt: skip
def test_cells(value, text):
  assert _tables.cell_text(value) == text


def test_columns_of_fractions_line_up():
  assert _tables.column_texts([55.2, 51, 60.125, None]) == ['55.20', '51.00', '60.12', '']
  assert _tables.column_texts([1, 2500, 'x']) == ['1', '2,500', 'x']


def test_table_with_a_short_row_is_refused(tmp_path):
  with pytest.raises(ValueError, match="table 'T' has 2 columns and a row of 1"):
    write(tmp_path, tables=[('T', ('a', 'b'), [('x',)])])


def test_configurations_of_all_kinds_are_shown(tmp_path):
  @dataclasses.dataclass
  class Config:
    rate: float = 0.125

  for config in (Config(), {'rate': 0.125}, ml_collections.ConfigDict({'rate': 0.125})):
    assert '"rate": 0.125' in Page(write(tmp_path, config=config)).text
  assert 'rate is 1/8' in Page(write(tmp_path, config='rate is 1/8')).text


# -------------------------------------------------------------------- figures


def png(figure):
  buffer = io.BytesIO()
  figure.savefig(buffer, format='png', dpi=40)
  return np.asarray(PIL.Image.open(buffer))


def test_heatmap_figure_shows_the_maps():
  heat = np.random.default_rng(0).uniform(size=192)
  figure = plots.heatmap_figure(heat, title='t')
  panels = figure.axes[:3]
  for i, axes in enumerate(panels):
    np.testing.assert_array_equal(
      axes.images[0].get_array(), heat[64 * i : 64 * i + 64].reshape(8, 8)
    )
    assert [t.get_text() for t in axes.texts[:8]] == ['0', '1', '5', '6', '14', '15', '27', '28']
  assert png(figure).std() > 10
  assert len(plots.heatmap_figure(heat[:16], size=4, numbers=False).axes) == 2
  with pytest.raises(ValueError, match='frequency has 60 channels'):
    plots.heatmap_figure(heat[:60])


def test_channel_panels_put_each_frequency_in_its_place():
  # A horizontal cosine of frequency 3, stronger from block to block, lives in row 0, column 3 of
  # the mosaic alone.
  strength = np.repeat(np.arange(1.0, 7.0), 8)
  wave = 128 + 20 * strength * np.cos(np.pi * (2 * np.arange(48) + 1) * 3 / 16)
  image = np.broadcast_to(wave[None, :, None], (40, 48, 3)).round().astype(np.uint8)
  figure = plots.channel_panels(image)
  mosaic = np.asarray(figure.axes[1].images[0].get_array())
  rows, columns = 5, 6
  assert mosaic.shape == (8 * rows + 7, 8 * columns + 7)
  tile = mosaic[0:rows, 3 * 7 : 3 * 7 + columns]
  signs = (-1.0) ** np.arange(6)  # the wave ends each block upside down
  expected = np.tile(signs * np.arange(1, 7) / 6, (rows, 1))
  np.testing.assert_allclose(tile, expected, atol=0.01)
  np.testing.assert_allclose(mosaic[3 * 6 : 3 * 6 + rows, 0:columns], 0.0, atol=1e-4)
  assert png(figure).std() > 10
  assert plots.channel_panels(image, component='Cr', mosaic=False).axes[1].get_title() == 'Cr'
  with pytest.raises(ValueError, match='holds no 8 x 8 block'):
    plots.channel_panels(image[:4])
  with pytest.raises(ValueError, match='uint8'):
    plots.channel_panels(image.astype(np.float32))
  with pytest.raises(ValueError, match='one of Y, Cb, Cr'):
    plots.channel_panels(image, component='G')


def test_accuracy_against_bytes_places_points():
  points = [
    plots.Point('RGB', 3072, 70.0, 0.5),
    plots.Point('24', 3072, 72.0, 0.5, 'DCT'),
    {'series': 'DCT', 'label': '6', 'bytes': 768, 'accuracy': 68.0},
  ]
  figure = plots.accuracy_against_bytes(points)
  axes = figure.axes[0]
  lines = [container.lines[0].get_xydata().tolist() for container in axes.containers]
  assert lines == [[[3072, 70]], [[768, 68], [3072, 72]]]
  assert [t.get_text() for t in axes.get_legend().get_texts()] == ['RGB', 'DCT']
  assert png(figure).std() > 5
  with pytest.raises(ValueError, match='at least one point'):
    plots.accuracy_against_bytes([])


def test_figures_leave_pyplot_alone():
  code = (
    'import sys, numpy as np; from fqjax.train import plots; '
    'plots.heatmap_figure(np.ones(192)); print("matplotlib.pyplot" in sys.modules)'
  )
  out = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, timeout=120)
  assert out.stdout.strip() == 'False', out.stderr
