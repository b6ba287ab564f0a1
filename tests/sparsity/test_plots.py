"""Pictures show the numbers they are given: bars, grids, densities, names of the axes."""

import io
import subprocess
import sys

from matplotlib.offsetbox import AnnotationBbox
import numpy as np
import PIL.Image
import pytest

from fqjax.sparsity import Entry, Plan, Pooled, Unstructured, pattern_set, plots


def png(figure):
  buffer = io.BytesIO()
  figure.savefig(buffer, format='png', dpi=40)
  return np.asarray(PIL.Image.open(buffer).convert('RGB'))


def texts(axes):
  return [text.get_text() for text in axes.texts]


def widths(container):
  return [int(bar.get_width()) for bar in container]


def plan(layers=3, name='layer{}/kernel'):
  """Layers of 100 * 4**i weights; the first dense, the others keep a tenth; a bias among them."""
  entries = [Entry('bias', (7,), '', None, 'bias: never pruned')]
  for i in range(layers):
    structure = Unstructured(keep=0.1) if i else None
    entries.append(Entry(name.format(i), (100, 4 ** (i % 6)), 'IO', structure, ''))
  return Plan(tuple(entries))


# -------------------------------------------------------------------- layers


def test_bars_are_as_long_as_the_counts():
  figure = plots.kept_per_layer(plan())
  (axes,) = figure.axes
  dense, kept = axes.containers
  assert widths(dense) == [100, 400, 1600]
  assert widths(kept) == [100, 40, 160]
  assert texts(axes) == ['100 %', '10 %', '10 %']
  assert [label.get_text() for label in axes.get_yticklabels()] == ['layer0', 'layer1', 'layer2']
  assert axes.get_title() == 'pruned layers keep 200 of 2,000 weights (10 %)'
  assert (axes.get_xscale(), axes.get_xlabel()) == ('log', 'weights')
  bottom, top = axes.get_ylim()
  assert bottom > top, 'the first layer stands at the top'
  low, high = axes.get_xlim()
  assert low < 40 and high > 1600
  assert [text.get_text() for text in figure.legends[0].get_texts()] == ['dense', 'kept']
  assert png(figure).std() > 10


def test_masks_count_more_than_the_plan():
  found = {'bias': None, 'layer0': {'kernel': None}}
  for i in (1, 2):
    mask = np.zeros((100, 4**i), bool)
    mask[: 5 * i] = True
    found[f'layer{i}'] = {'kernel': mask}
  (axes,) = plots.kept_per_layer(plan(), found).axes
  assert widths(axes.containers[1]) == [100, 20, 160]
  assert texts(axes) == ['100 %', '5 %', '10 %']
  assert axes.get_title() == 'pruned layers keep 180 of 2,000 weights (9 %)'
  found['layer1']['kernel'][:] = False
  (axes,) = plots.kept_per_layer(plan(), found).axes
  assert texts(axes)[1] == '0 %' and png(axes.figure).std() > 10
  with pytest.raises(ValueError, match="masks has nothing for 'layer1/kernel'"):
    plots.kept_per_layer(plan(), {'layer2': {'kernel': np.ones((100, 16), bool)}})
  with pytest.raises(ValueError, match='another model'):
    plots.kept_per_layer(plan(), {'layer9': {'kernel': np.ones((100, 16), bool)}})


def test_layers_of_one_budget_are_counted_by_their_masks():
  shared = Plan(
    tuple(Entry(name, (4, 5), 'IO', Pooled(keep=0.5, scope='all'), '') for name in 'ab')
  )
  masks = {'a': np.ones((4, 5), bool), 'b': np.zeros((4, 5), bool)}
  (axes,) = plots.kept_per_layer(shared, masks).axes
  assert widths(axes.containers[1]) == [20, 0]
  assert axes.get_title() == 'pruned layers keep 20 of 40 weights (50 %)'


@pytest.mark.parametrize('layers', [3, 60])
def test_names_of_few_and_many_layers_do_not_touch(layers):
  name = 'encoder/stage{0}/block{0}/attention/projection_of_the_values/kernel'
  figure = plots.kept_per_layer(plan(layers, name), title='t')
  figure.canvas.draw()
  (axes,) = figure.axes
  boxes = [label.get_window_extent() for label in axes.get_yticklabels()]
  assert len(boxes) == layers
  assert all(a.y0 >= b.y1 - 1 for a, b in zip(boxes, boxes[1:]))
  assert all(box.x0 >= 0 for box in boxes)
  # Bars keep half of the width, and percentages end before the edge.
  assert axes.bbox.width > 0.5 * figure.bbox.width
  assert max(text.get_window_extent().x1 for text in axes.texts) < figure.bbox.width
  assert axes.get_yticklabels()[0].get_text().startswith('…') and axes.get_title() == 't'


def test_a_plan_of_vectors_has_no_layers():
  with pytest.raises(ValueError, match='no layer to draw'):
    plots.kept_per_layer(Plan((Entry('bias', (7,), '', None, ''),)))


# -------------------------------------------------------------------- patterns


def grids(axes):
  """What the little grids show, left to right: {place: bitmask}."""
  found = {}
  for box in axes.get_children():
    if isinstance(box, AnnotationBbox):
      cells = box.offsetbox.get_children()
      cells.sort(key=lambda cell: (-cell.get_y(), cell.get_x()))
      # The first channel of the colour is low where a tap lives.
      found[box.xy[0]] = sum(1 << t for t, c in enumerate(cells) if c.get_facecolor()[0] < 0.5)
  return [found[place] for place in sorted(found)]


def test_patterns_stand_over_their_bars_sorted_by_use():
  masks, counts = pattern_set('elog4'), [7, 2000, 0, 993]
  figure = plots.pattern_histogram(masks, counts, title='conv1')
  (axes,) = figure.axes
  assert [bar.get_height() for bar in axes.containers[0]] == [2000, 993, 7, 0]
  assert grids(axes) == [masks[1], masks[3], masks[0], masks[2]]
  assert [t.get_text() for t in axes.get_xticklabels()] == ['154', '178', '58', '184']
  assert [t for t in texts(axes) if t] == ['67 %', '33 %', '0.23 %', '0 %']
  assert (axes.get_xlabel(), axes.get_ylabel()) == ('pattern (bitmask)', 'kernels')
  assert axes.get_title() == 'conv1'
  assert png(figure).std() > 10


@pytest.mark.parametrize('count', [4, 32])
def test_grids_stay_apart_and_inside(count):
  figure = plots.pattern_histogram(range(1, count + 1), np.arange(count))
  figure.canvas.draw()
  (axes,) = figure.axes
  boxes = [b.get_window_extent() for b in axes.get_children() if isinstance(b, AnnotationBbox)]
  boxes.sort(key=lambda box: box.x0)
  assert len(boxes) == count
  assert all(a.x1 < b.x0 for a, b in zip(boxes, boxes[1:]))
  assert max(box.y1 for box in boxes) <= axes.bbox.y1


def test_patterns_of_other_kernels():
  (axes,) = plots.pattern_histogram([0b10001, 0b111], [3, 4], shape=(1, 5)).axes
  assert grids(axes) == [0b111, 0b10001]
  with pytest.raises(ValueError, match='more than the 4 taps'):
    plots.pattern_histogram([16], [1], shape=(2, 2))
  with pytest.raises(ValueError, match='one count per pattern'):
    plots.pattern_histogram([1, 2], [1])


# -------------------------------------------------------------------- accuracy


def test_accuracy_stands_over_the_rate_of_each_series():
  points = [
    plots.Point(40_000, 91.0, 0.1, 'ADMM'),
    plots.Point(20_000, 92.0, 0.2, 'ADMM'),
    plots.Point(5_000, 88.0, 0.5, 'ADMM', 'N:M'),
    {'rate': 10_000, 'value': 85.0, 'series': 'magnitude'},
  ]
  figure = plots.accuracy_against_rate(points, dense=(92.5, 0.3), title='t')
  (axes,) = figure.axes
  lines = [container.lines[0].get_xydata().tolist() for container in axes.containers]
  assert lines == [[[5000, 88], [20000, 92], [40000, 91]], [[10000, 85]]]
  segments = axes.containers[0].lines[2][0].get_segments()
  np.testing.assert_allclose(
    [s[:, 1] for s in segments], [[87.5, 88.5], [91.8, 92.2], [90.9, 91.1]]
  )
  assert axes.lines[0].get_ydata() == [92.5, 92.5] and axes.lines[0].get_linestyle() == '--'
  assert [t.get_text() for t in axes.get_legend().get_texts()] == ['dense', 'ADMM', 'magnitude']
  assert (axes.get_xlabel(), axes.get_ylabel(), axes.get_xscale()) == ('bytes', 'top-1, %', 'log')
  assert texts(axes) == ['N:M']
  assert png(figure).std() > 5
  figure.canvas.draw()
  shown = [t.get_text() for t in axes.get_xticklabels()]
  assert {'5k', '10k', '20k'} <= set(shown)


def test_perplexity_against_a_plain_axis():
  figure = plots.accuracy_against_rate(
    [(0.0, 90.0), (0.5, 95.0)], dense=88.0, rate='removed', value='perplexity', log=False
  )
  (axes,) = figure.axes
  assert (axes.get_xscale(), axes.get_ylabel()) == ('linear', 'perplexity')
  with pytest.raises(ValueError, match='log=False'):
    plots.accuracy_against_rate([(0.0, 90.0)])
  with pytest.raises(ValueError, match='at least one point'):
    plots.accuracy_against_rate([])


# -------------------------------------------------------------------- matrices


def test_survivors_are_where_the_mask_says():
  mask = np.random.default_rng(0).uniform(size=(12, 20)) < 0.3
  figure = plots.survivors(mask)
  left, right = figure.axes
  np.testing.assert_array_equal(left.images[0].get_array(), mask)
  np.testing.assert_allclose(right.patches[0].get_data().values, 100 * mask.mean(1))
  assert right.get_ylim() == left.get_ylim() and left.get_ylim()[0] > left.get_ylim()[1]
  assert left.get_title() == f'{mask.sum()} of 240 weights live ({100 * mask.mean():.3g} %)'
  assert (left.get_xlabel(), left.get_ylabel()) == ('column (input)', 'row (output)')
  assert right.get_xlabel() == 'row density, %'
  assert png(figure).std() > 10
  # Flax's [in, out] has its outputs in columns.
  np.testing.assert_array_equal(plots.survivors(mask.T, 'IO').axes[0].images[0].get_array(), mask)


def test_a_large_matrix_becomes_densities():
  mask = np.random.default_rng(0).uniform(size=(101, 57)) < 0.2
  figure = plots.survivors(mask, pixels=(10, 8))
  left, right = figure.axes[:2]
  shares = np.asarray(left.images[0].get_array())
  assert shares.shape == (10, 8)
  # The boxes cover every weight once.
  down, across = (np.linspace(0, n, k + 1).round().astype(int) for n, k in ((101, 10), (57, 8)))
  for i in range(10):
    for j in range(8):
      part = mask[down[i] : down[i + 1], across[j] : across[j + 1]]
      assert shares[i, j] == pytest.approx(part.mean())
  assert left.images[0].get_clim() == (0, pytest.approx(shares.max()))
  assert figure.axes[2].get_ylabel() == 'share that lives'
  assert len(right.patches[0].get_data().values) == 101
  with pytest.raises(ValueError, match="'HWIO' for a Flax Conv"):
    plots.survivors(np.ones((3, 3, 2, 2)))
  with pytest.raises(ValueError, match='no weights'):
    plots.survivors(np.ones((0, 3)))


def test_densities_run_from_the_densest_row_to_the_emptiest():
  matrix = np.array([[0, 0, 0, 0, 1], [1, 1, 1, 0, 1], [0, 1, 0, 0, 0]])
  figure = plots.row_densities({'fc': matrix, 'given': [0.1, 0.3]})
  (axes,) = figure.axes
  np.testing.assert_allclose(axes.lines[0].get_ydata(), [80, 20, 20])
  np.testing.assert_allclose(axes.lines[0].get_xdata(), [100 / 6, 50, 500 / 6])
  np.testing.assert_allclose(axes.lines[1].get_ydata(), [30, 10])
  assert [t.get_text() for t in axes.get_legend().get_texts()] == [
    'fc: 20 to 80 %, mean 40 %', 'given: 10 to 30 %, mean 20 %',
  ]  # fmt: skip
  assert axes.get_xlabel() == 'rows, densest first, %' and axes.get_ylabel() == 'density, %'
  assert png(figure).std() > 5


def test_densities_of_banks_and_their_short_end():
  matrix = np.array([[0, 0, 0, 0, 1], [1, 1, 1, 0, 1], [0, 1, 0, 0, 0]])
  (axes,) = plots.row_densities({'fc': matrix}, bank=2).axes
  np.testing.assert_allclose(axes.lines[0].get_ydata(), [100, 100, 100, 50, 50, 0, 0, 0, 0])
  assert axes.get_xlabel() == 'banks of 2 columns, densest first, %'
  with pytest.raises(ValueError, match='banks cannot be told'):
    plots.row_densities({'x': [0.1, 0.2]}, bank=2)
  with pytest.raises(ValueError, match='must be a matrix'):
    plots.row_densities({'x': np.ones((2, 2, 2))})
  with pytest.raises(ValueError, match='at least one matrix'):
    plots.row_densities({})


def test_sensitivity_follows_the_order_of_densities():
  density = np.array([0.5, 0.1, 0.9])
  figure = plots.row_sensitivity([2.0, 1.0, 3.0], density, what='loss')
  above, below = figure.axes
  np.testing.assert_allclose(above.patches[0].get_data().values, [10, 50, 90])
  np.testing.assert_allclose(below.lines[0].get_ydata(), [1, 2, 3])
  assert (below.get_xlabel(), below.get_ylabel()) == ('row, emptiest first', 'loss')
  (alone,) = plots.row_sensitivity([2.0, 1.0, 3.0]).axes
  np.testing.assert_allclose(alone.lines[0].get_ydata(), [2, 1, 3])
  assert alone.get_xlabel() == 'row'


def test_sensitivity_of_several_fractions_is_a_strip():
  change = np.arange(6.0).reshape(3, 2)
  figure = plots.row_sensitivity(change, [0.5, 0.1, 0.9], fractions=[0.25, 0.75], title='t')
  _, strip, bar = figure.axes
  np.testing.assert_array_equal(strip.images[0].get_array(), change[[1, 0, 2]].T)
  assert [t.get_text() for t in strip.get_yticklabels()] == ['25', '75']
  assert bar.get_xlabel() == 'change of loss' and figure.get_suptitle() == 't'
  assert png(figure).std() > 10
  with pytest.raises(ValueError, match='name the 2 columns'):
    plots.row_sensitivity(change)
  with pytest.raises(ValueError, match='3 rows of change, but densities \\[2\\]'):
    plots.row_sensitivity([1, 2, 3], [0.1, 0.2])
  with pytest.raises(ValueError, match='change is'):
    plots.row_sensitivity(1.0)


def test_maps_of_two_networks_share_a_scale():
  rng = np.random.default_rng(0)
  dense = rng.normal(size=(3, 6, 8))
  pruned = dense * np.array([1.0, 0.5, 2.0])[:, None, None]
  images = rng.uniform(size=(3, 12, 16, 3))
  figure = plots.feature_maps(
    dense, pruned, images=images, names=('a', 'b'), labels='xyz', title='t'
  )
  panels = np.array(figure.axes).reshape(3, 3)
  for i in range(3):
    np.testing.assert_allclose(panels[0, i].images[0].get_array(), images[i])
    np.testing.assert_array_equal(panels[1, i].images[0].get_array(), dense[i])
    np.testing.assert_array_equal(panels[2, i].images[0].get_array(), pruned[i])
    both = np.stack([dense[i], pruned[i]])
    for axes in panels[1:, i]:
      assert axes.images[0].get_clim() == (both.min(), both.max())
  assert [axes.get_ylabel() for axes in panels[:, 0]] == ['image', 'a', 'b']
  assert [axes.get_title() for axes in panels[0]] == ['x', 'y', 'z']
  assert [axes.get_xlabel() for axes in panels[2]] == ['0 % apart', '50 % apart', '100 % apart']
  assert png(figure).std() > 10
  with pytest.raises(ValueError, match='one shape'):
    plots.feature_maps(dense, pruned[:2])
  with pytest.raises(ValueError, match='13 maps: choose 1 to 12'):
    plots.feature_maps(np.ones((13, 2, 2)), np.ones((13, 2, 2)))
  with pytest.raises(ValueError, match='as many labels'):
    plots.feature_maps(dense, pruned, labels=['x'])


def test_the_room_itself_draws_nothing():
  code = (
    'import sys, fqjax.sparsity; print("matplotlib" in sys.modules); '
    'from fqjax.sparsity import plots; plots.survivors([[1, 0]]); '
    'print("matplotlib.pyplot" in sys.modules)'
  )
  out = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, timeout=120)
  assert out.stdout.split() == ['False', 'False'], out.stderr
