"""Phases, ladders and sizes that the experiments on pruning share."""

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
import optax
import pytest

from experiments import cifar, levels, outcome, tasks
from experiments import compression as cp
from fqjax import data as fd
from fqjax import models, rules, sparsity, train
from tests.experiments import tiny_task

RECIPE = cp.recipe(optimizer='adam', lr=0.05, epochs=3.0)
ADMM = cp.admm_recipe(optimizer='adam', lr=0.01, epochs=3.0, rho=(1e-2, 1e-1), refreshes=2)


def plan(keep, params):
  return sparsity.make_plan(params, [('.*/kernel', sparsity.Unstructured(keep=keep))])


@pytest.fixture
def run(tmp_path):
  return cp.Run(tiny_task.task(), tmp_path / 'seed0', 0, train.make_mesh(1))


@pytest.mark.promotes('optax')
def test_a_climb_prunes_nested_and_is_read_back(run, capsys):
  dense = cp.phase(run, 'dense', run.task.init(jax.random.key(0)), RECIPE)
  plans = [plan(0.5, dense.params), plan(0.2, dense.params)]
  rungs = list(cp.climb(run, dense, plans, ADMM, RECIPE))
  assert len(rungs) == 2
  for rung, keep in zip(rungs, (0.5, 0.2), strict=True):
    for layer in ('fc1', 'fc2'):
      kernel, mask = rung.variables.params[layer]['kernel'], rung.masks[layer]['kernel']
      assert int(mask.sum()) == round(keep * mask.size)
      np.testing.assert_array_equal(np.asarray(kernel)[~np.asarray(mask)], 0)
    assert set(rung.scores) == set(rung.cut) == {'test', 'held_out'}
  mild, sparse = (np.asarray(r.masks['fc1']['kernel']) for r in rungs)
  assert not np.any(sparse & ~mild)
  assert np.mean(rungs[0].scores['test']) > 0.85
  # The gap to the target is in the log, and shrinks.
  rows = train.read_json_lines(run.folder / '00-admm' / 'metrics.jsonl')
  gaps = [row['admm/gap'] for row in rows if 'admm/gap' in row]
  assert len(gaps) > 2 and gaps[-1] < max(gaps)
  # A second call trains nothing and returns the same.
  capsys.readouterr()
  again = list(cp.climb(run, dense, plans, ADMM, RECIPE))
  assert 'steps' not in capsys.readouterr().out
  for a, b in zip(rungs, again, strict=True):
    jax.tree.map(np.testing.assert_array_equal, a.variables.params, b.variables.params)
    np.testing.assert_array_equal(a.scores['test'], b.scores['test'])


@pytest.mark.promotes('optax')
def test_weights_leave_one_after_the_other(run):
  dense = cp.phase(run, 'dense', run.task.init(jax.random.key(0)), RECIPE)
  pooled = lambda keep: sparsity.make_plan(
    dense.params, [('.*/kernel', sparsity.Pooled(keep=float(keep)))]
  )
  ends, asked = (0.5, 0.1), []

  def between(rung, count):
    before = ends[rung - 1] if rung else 1.0
    asked.append((rung, count))
    return [pooled(keep) for keep in np.geomspace(before, ends[rung], count + 1)[1:]]

  recipe = cp.gradual_recipe(optimizer='adam', lr=0.02, epochs=4.0, renewals=5)
  rungs = list(cp.climb(run, dense, list(map(pooled, ends)), recipe, RECIPE, between))
  assert [rung for rung, _ in asked] == [0, 1] and 1 < asked[0][1] <= 5
  sizes = [sum(int(m.sum()) for m in jax.tree.leaves(rung.masks)) for rung in rungs]
  total = sum(np.size(dense.params[layer]['kernel']) for layer in ('fc1', 'fc2'))
  assert sizes == [round(keep * total) for keep in ends]
  for layer in ('fc1', 'fc2'):
    mild, sparse = (np.asarray(rung.masks[layer]['kernel']) for rung in rungs)
    assert not np.any(sparse & ~mild)
  assert np.mean(rungs[1].scores['test']) > 0.6
  # The phase itself ended on the masks: the cut took nothing away.
  before = cp.load_variables(run.folder / '01-gradual' / 'variables.npz', dense)
  kept = sum(np.count_nonzero(before.params[layer]['kernel']) for layer in ('fc1', 'fc2'))
  assert kept <= sizes[1]


@pytest.mark.promotes('optax')
def test_no_epochs_cut_at_once(run):
  dense = run.task.init(jax.random.key(1))
  one_shot = cp.recipe(epochs=0.0)
  (rung,) = cp.climb(run, dense, [plan(0.25, dense.params)], cp.admm_recipe(epochs=0.0), one_shot)
  want, _ = rules.finalize(plan(0.25, dense.params), dense.params)
  jax.tree.map(np.testing.assert_array_equal, rung.variables.params, want)
  np.testing.assert_array_equal(rung.scores['test'], rung.cut['test'])


def test_variables_of_another_network_are_refused(tmp_path):
  path = tmp_path / 'variables.npz'
  cp.save_variables(path, tasks.Variables({'fc': {'kernel': np.ones((2, 3))}}, {}))
  same = cp.load_variables(path, tasks.Variables({'fc': {'kernel': jnp.zeros((2, 3))}}, {}))
  np.testing.assert_array_equal(same.params['fc']['kernel'], np.ones((2, 3)))
  with pytest.raises(ValueError, match='of another network'):
    cp.load_variables(path, tasks.Variables({'fc': {'kernel': jnp.zeros((3, 3))}}, {}))


def test_sizes_count_everything_that_is_stored():
  params = {'fc': {'kernel': jnp.arange(1.0, 65).reshape(8, 8), 'bias': jnp.ones(8)}}
  half = sparsity.make_plan(params, [('.*/kernel', sparsity.NM(2, 4))])
  pruned, _ = rules.finalize(half, params)
  state = {'batch_stats': {'mean': np.zeros(8, np.float32)}}
  sizes = cp.measure(half, tasks.Variables(pruned, state))
  found = sparsity.sizes(half, pruned)
  assert (sizes.weights, sizes.kept, sizes.compression) == (64, 32, 2.0)
  assert sizes.dense_bytes == 4 * (64 + 8 + 8)
  assert sizes.stored_bytes == found.bytes + 4 * 8
  assert sizes.stored_bytes > 4 * (32 + 8 + 8)  # the index is not free


def test_learning_rate_starts_again_with_every_stage():
  config = cp.recipe(lr=1.0, momentum=0.0)
  tx = cp.optimizer(config, length=4)
  params = {'w': jnp.zeros(())}
  state, moved = tx.init(params), []
  for _ in range(8):
    updates, state = tx.update({'w': jnp.ones(())}, state, params)
    moved.append(-float(updates['w']))
  assert moved[0] == moved[4] == 1.0
  assert moved[3] < 0.2 and moved[:4] == sorted(moved[:4], reverse=True)


@pytest.mark.parametrize(
  'fields, message',
  [({'optimizer': 'lamb'}, 'optimizer'), ({'schedule': 'step'}, 'schedule'), ({'lr': 0.0}, 'lr')],
)
def test_recipes_that_cannot_be_followed(fields, message):
  with pytest.raises(ValueError, match=message):
    cp.check_recipe('dense', cp.recipe(**fields))


@pytest.mark.promotes('optax')
def test_classifier_scores_every_image_once_in_order():
  source = fd.load_source('synthetic', 'test', n=37, size=28)
  spec = fd.InputSpec('rgb', 28, mean=(128.0,) * 3, std=(64.0,) * 3)
  model = models.create_model('lenet5')
  # Twelve do not split over eight devices: sixteen do.
  task = tasks.classifier(
    model, source, {'test': source}, spec, eval_batch_size=12, grey=True, mesh=train.make_mesh(8)
  )
  variables = task.init(jax.random.key(0))
  right = task.score(variables)['test']
  x = (np.stack([source[i]['image'] for i in range(37)])[..., :1].astype(np.float32) - 128) / 64
  logits = np.asarray(model.apply({'params': variables.params}, x))
  want = np.argmax(logits, -1) == [source[i]['label'] for i in range(37)]
  np.testing.assert_array_equal(right, want)
  assert list(task.layers) == ['conv1/kernel', 'conv2/kernel', 'fc1/kernel', 'fc2/kernel']
  assert task.sample.shape == (16, 28, 28, 1)


def test_statistics_are_taken_on_images_augmented_as_in_training():
  source = fd.load_source('synthetic', 'test', n=32, size=28)
  spec = fd.InputSpec('rgb', 28, mean=(0.0,) * 3, std=(1.0,) * 3)
  model, white = models.create_model('lenet5'), lambda image: np.full_like(image, 255)

  def task(**how):
    return tasks.classifier(
      model, source, {}, spec, eval_batch_size=16, grey=True, mesh=train.make_mesh(1), **how
    )

  augmented = task(transform=lambda example, rng: {**example, 'image': white(example['image'])})
  batches = list(augmented.calibration())
  assert len(batches) == 2
  for batch in batches:
    np.testing.assert_array_equal(batch['image'], 255)
  assert np.min(augmented.sample) < 255
  # Without augmentation they are seen as those that are scored.
  viewed = task(eval_transform=lambda example, rng: {**example, 'image': white(example['image'])})
  np.testing.assert_array_equal(next(iter(viewed.calibration()))['image'], 255)


@pytest.mark.full
def test_new_statistics_leave_a_published_network_as_it_is(data_dir, monkeypatch):
  monkeypatch.setenv('FQJAX_DATA_DIR', str(data_dir))
  config = cifar.fields('resnet20')
  task, _ = cifar.make_task(config, train.make_mesh(1))
  dense = task.init(jax.random.key(0))
  before, after = (task.score(v)['test'].mean() for v in (dense, cp.recalibrated(task, dense)))
  assert before == 0.9173
  assert abs(after - before) < 0.002  # 0.8913 on plain images


def test_a_file_is_scored_like_the_network_in_it(tmp_path):
  source = fd.load_source('synthetic', 'test', n=30, size=28)
  spec = fd.InputSpec('rgb', 28, mean=(128.0,) * 3, std=(64.0,) * 3)
  model = models.create_model('lenet5')
  task = tasks.classifier(
    model, source, {'test': source}, spec, eval_batch_size=16, grey=True, mesh=train.make_mesh(1)
  )
  params = task.init(jax.random.key(0)).params
  few = lambda w: jnp.where(jnp.abs(w) > 0.06, 0.1 * jnp.sign(w), 0) if w.ndim > 1 else w
  variables = tasks.Variables(jax.device_get(jax.tree.map(few, params)), {})
  found = levels.as_file(model, task, variables, tmp_path / 'model.fqx')
  assert found['file_top1'] == pytest.approx(100 * task.score(variables)['test'].mean())
  assert found['file_bytes'] == (tmp_path / 'model.fqx').stat().st_size < 100_000
  assert 'levels' in (tmp_path / 'model.txt').read_text()
  biased = jax.tree.map(lambda w: np.linspace(0, 0.01, w.size) if w.ndim == 1 else w, params)
  biased = tasks.Variables(jax.tree.map(np.float32, jax.tree.map(few, biased)), {})
  whole, halves, bytes_, less = (
    levels.as_file(model, task, biased, tmp_path / f'{name}.fqx', name) for name in levels.FLOATS
  )
  assert halves['file_bytes'] < whole['file_bytes'] - 500
  assert bytes_['file_bytes'] < halves['file_bytes'] - 200
  assert less['file_bytes'] < bytes_['file_bytes'] - 50
  for found in (halves, bytes_, less):
    assert abs(found['file_top1'] - whole['file_top1']) < 10
  np.testing.assert_array_equal(
    task.elsewhere(lambda x: np.eye(10)[np.arange(len(x)) % 10])['test'],
    [source[i]['label'] == i % 16 % 10 for i in range(30)],
  )


def test_biases_become_steps_of_their_largest():
  x = np.float32([0.31, -0.157, 0.0044, -0.0044])
  np.testing.assert_array_equal(
    levels.rounded(x, 'int6') / np.float32(0.01), np.float32([31, -16, 0, 0])
  )
  assert np.abs(levels.rounded(x, 'int8') - x).max() <= 0.31 / 127 / 2 + 1e-7
  assert not levels.rounded(x * 0, 'int8').any()
  assert np.signbit(levels.rounded(x, 'int6')).tolist() == [False, True, False, False]
  np.testing.assert_array_equal(levels.rounded(x, 'float32'), x)


def test_a_student_learns_what_the_teacher_says():
  source = fd.load_source('synthetic', 'test', n=16, size=28)
  spec = fd.InputSpec('rgb', 28, mean=(128.0,) * 3, std=(64.0,) * 3)
  model = models.create_model('lenet5')
  task = tasks.classifier(
    model, source, {'test': source}, spec, batch_size=8, grey=True, mesh=train.make_mesh(1)
  )
  teacher, other = task.init(jax.random.key(0)), task.init(jax.random.key(1))
  distill = ml_collections.ConfigDict({'share': 0.0, 'temperature': 4.0})
  assert cp.student(task, distill, teacher) is task
  distill.share = 1.0
  loss_fn = cp.student(task, distill, teacher).loss_fn
  batch = next(iter(task.loader(0)))
  gradient = jax.jit(jax.grad(lambda p: loss_fn(p, {}, batch, jax.random.key(0))[0]))
  at_teacher, elsewhere = (optax.tree.norm(gradient(v.params)) for v in (teacher, other))
  assert at_teacher < 1e-4 * elsewhere
  distill.share = 1.1
  with pytest.raises(ValueError, match='0..1'):
    cp.check_distill(distill)


def test_summary_is_a_paired_mean_over_seeds():
  sizes = cp.Sizes(weights=100, kept=10, dense_bytes=400, stored_bytes=80, index_bits=64)
  dense = {'test': np.array([1.0, 1, 0, 1]), 'held_out': np.array([1.0, 1])}
  first = {'test': np.array([1.0, 0, 0, 1]), 'held_out': np.array([1.0, 0])}
  second = {'test': np.array([1.0, 1, 0, 1]), 'held_out': np.array([1.0, 1])}
  networks = [
    outcome.Measured('a', seed, 0, scores, scores, dense, sizes)
    for seed, scores in enumerate((first, second))
  ]
  (entry,) = outcome.summarize(networks)
  assert entry['value'] == 62.5 and entry['dense'] == 75.0 and entry['change'] == -12.5
  assert entry['compression'] == 10 and entry['compression_bytes'] == 5
  # Differences [[0, -1, 0, 0], [0, 0, 0, 0]]: standard errors of seed means and of image means.
  seeds = np.std([-25.0, 0.0], ddof=1) / np.sqrt(2)
  images = np.std([0, -50.0, 0, 0], ddof=1) / 2
  np.testing.assert_allclose(entry['change_spread'], np.hypot(seeds, images))
  assert entry['held_out_change'] == -25.0
  assert outcome.chosen([entry], 30.0) == {'a': entry} and not outcome.chosen([entry], 20.0)


def test_perplexity_is_worse_when_larger():
  metric = outcome.PERPLEXITY
  items = np.log(np.full((1, 5), 12.0))
  dense = np.log(np.full((1, 5), 10.0))
  change, error = metric.difference(items, dense)
  np.testing.assert_allclose([metric.value(items), change, error], [12.0, 2.0, 0.0], atol=1e-9)
  assert metric.lost(change) == change and outcome.TOP1.lost(-0.3) == 0.3


def test_ledger_rows_refuse_goals_of_no_metric():
  sizes = cp.Sizes(weights=100, kept=10, dense_bytes=400, stored_bytes=80, index_bits=64)
  scores = {'test': np.array([1.0, 0.0])}
  (entry,) = outcome.summarize([outcome.Measured('a', 0, 0, scores, scores, scores, sizes)])
  rows = outcome.ledger_rows(entry, 'admm_nn_s/d/n/a', 'd test', {'top1': 40.0})
  assert {r.metric: r.reached for r in rows}['top1'] == 'yes'
  assert {r.metric: r.value for r in rows}['compression'] == 10
  with pytest.raises(ValueError, match='speed'):
    outcome.ledger_rows(entry, 'admm_nn_s/d/n/a', 'd test', {'speed': 1.0})
