"""The benchmarks run at tiny sizes and write rows of one form; their arithmetic is right."""

import importlib
import json
import sys

import jax.numpy as jnp
import numpy as np
import optax
import pytest

from benchmarks import common
from experiments import ledger

ROW = dict(
  name='haar level 1, NHWC, against X', value=2.5, unit='ms', peer='X', ratio=4.5, goal=4.0,
  spread=0.1,
)  # fmt: skip


def check_json(path, count=None):
  rows = json.loads(path.read_text())
  assert rows and (count is None or len(rows) == count)
  for row in rows:
    assert tuple(row) == common.KEYS
    assert isinstance(row['name'], str) and isinstance(row['unit'], str)
    assert isinstance(row['value'], int | float) and np.isfinite(row['value'])
    assert row['peer'] is None or isinstance(row['peer'], str | int | float)
    for key in ('ratio', 'goal', 'spread'):
      assert row[key] is None or np.isfinite(row[key])
  names = [row['name'] for row in rows]
  assert len(set(names)) == len(names)
  return rows


def test_transforms(tmp_path):
  pytest.importorskip('jaxwt')
  from benchmarks import transforms

  path = tmp_path / 'rows.json'
  transforms.main(['--small', '--repeats', '2', '--json', str(path)])
  rows = check_json(path, 7 * 3)
  goals = {row['name']: row['goal'] for row in rows}
  assert goals['haar level 1, NHWC, against PyWavelets'] == 4.0
  assert goals['db4 level 3, NCHW, against jaxwt'] == 2.0
  assert transforms.parse_command(['--keep-memory']).keep_memory
  assert goals['DCT of 8x8 blocks, NHWC to channels, against jax.scipy'] == 4.0


def test_export(tmp_path):
  from benchmarks import export

  path = tmp_path / 'rows.json'
  export.main(['--model', 'lenet5', '--repeats', '2', '--json', str(path)])
  rows = {row['name'].split('/')[0]: row for row in check_json(path, 4)}
  assert list(rows) == list(export.PARTS)
  assert rows['run']['goal'] == pytest.approx(2 / 3) and rows['load']['goal'] == 0.2
  with pytest.raises(SystemExit):
    export.parse_command(['--only', 'walk'])


def test_compare_takes_turns_and_waits():
  calls = []
  contenders = {name: lambda name=name: calls.append(name) or jnp.ones(3) for name in 'abc'}
  seconds = common.compare(contenders, 3)
  assert {name: len(times) for name, times in seconds.items()} == {'a': 3, 'b': 3, 'c': 3}
  assert ''.join(calls) == 'abc' + 'abc' + 'bca' + 'cab'
  with pytest.raises(ValueError, match='at least 1'):
    common.compare(contenders, 0)


def test_speedup():
  ratio, spread = common.speedup([1.0, 2.0, 1.0], [4.0, 10.0, 3.0])
  assert ratio == 4.0
  np.testing.assert_allclose(spread, 1.2533 / np.sqrt(3), rtol=1e-4)
  assert common.speedup([1.0], [2.0]) == (2.0, None)
  row = common.speedup_row('n', {'us': [0.001] * 2, 'p': [0.003] * 2}, 'us', 'p', 2.0)
  assert tuple(row) == common.KEYS and row['value'] == 1.0
  np.testing.assert_allclose(row['ratio'], 3.0)
  assert common.fastest({'a': [3, 1, 3], 'b': [2, 2, 2]}, ['a', 'b']) == 'b'


def test_table_says_what_falls_short():
  text = common.table([ROW, {**ROW, 'ratio': 3.5}, {**ROW, 'goal': None, 'peer': 7}])
  assert [('ok' in line, 'BELOW' in line) for line in text.splitlines()[1:]] == [
    (True, False), (False, True), (False, False),
  ]  # fmt: skip


def test_finish_records(tmp_path, monkeypatch, capsys):
  written = []
  monkeypatch.setattr(ledger, 'append', written.extend)
  args = common.parser('text').parse_args(['--record', '--json', str(tmp_path / 'rows.json')])
  bandwidth = {**ROW, 'name': 'b', 'peer': common.COPY, 'ratio': np.float32(0.5), 'goal': None}
  common.finish(args, [ROW, bandwidth], data='64x224x224x3')
  check_json(tmp_path / 'rows.json', 2)
  assert 'haar level 1' in capsys.readouterr().out
  assert [row.metric for row in written] == ['ratio', 'bandwidth_fraction']
  run = written[0].run.split('/')
  assert run[1:] == ['64x224x224x3', 'cpu', 'haar-level-1-NHWC-against-X']
  assert (written[0].value, written[0].goal, written[0].milliseconds) == (4.5, 4.0, 2.5)
  with pytest.raises(ValueError, match='has the keys'):
    common.finish(args, [{'name': 'x'}])


def test_rows_without_a_ratio_are_recorded_as_what_they_are(tmp_path, monkeypatch, capsys):
  written = []
  monkeypatch.setattr(ledger, 'append', written.extend)
  args = common.parser('text').parse_args(['--record', '--json', str(tmp_path / 'rows.json')])
  plain = {**ROW, 'peer': None, 'ratio': None, 'goal': None}
  sent = {**ROW, 'value': 300, 'unit': 'bytes per step and device', 'peer': 'one gradient'}
  rows = [
    {**plain, 'name': 'host', 'unit': 'ms per step', 'goal': 2.0},
    {**plain, 'name': 'compiled', 'value': 0, 'unit': 'programs', 'goal': 0},
    {**plain, 'name': 'pillow', 'unit': 'images/s per core'},
    {**sent, 'name': 'sent'},
    {**sent, 'name': 'sent, as ratio'},
    {**sent, 'name': 'sent, not recorded'},
  ]
  metrics = {'sent': 'collective_bytes', 'sent, not recorded': None}
  common.finish(args, rows, metrics=metrics)
  check_json(tmp_path / 'rows.json', 6)
  assert [(r.metric, r.value, r.goal, r.spread, r.reference, r.reached) for r in written] == [
    ('step_overhead', 2.5, 2.0, 0.1, '', 'no'),
    ('compilations', 0, 0, 0.1, '', 'yes'),
    ('images_per_second', 2.5, None, 0.1, '', ''),
    ('collective_bytes', 300, None, None, '', ''),
    ('ratio', 4.5, 4.0, 0.1, 'one gradient', 'yes'),
  ]
  # Beside a ratio stands the number it was made of, and only there.
  assert [r.bytes for r in written] == [None, None, None, None, 300]
  assert [r.milliseconds for r in written] == [None] * 5
  lines = capsys.readouterr().out.splitlines()
  shown = {line.split('  ')[0]: line for line in lines}
  assert 'BELOW' in shown['host'] and 'ok' in shown['compiled']
  for metric in common.METRICS.values():
    assert metric in ledger.METRICS
  with pytest.raises(ValueError, match="c: no metric is known for values in 'furlong'"):
    common.finish(args, [{**plain, 'name': 'c', 'unit': 'furlong'}])


def test_collectives_keep_the_ledger_short(monkeypatch, capsys):
  from benchmarks import collectives

  written = []
  monkeypatch.setattr(ledger, 'append', written.extend)
  result = {'bytes': {'all-reduce': 100, 'all-gather': 20}, 'count': 2, 'parameter_bytes': 96}
  alone = {'bytes': {}, 'count': 0, 'parameter_bytes': 96}
  monkeypatch.setattr(collectives, 'in_process', lambda model, n, *_: alone if n == 1 else result)
  collectives.main(['--record', '--models', 'a,b', '--devices', '1,4,8,256'])
  assert {(row.metric, row.value) for row in written} == {('collective_bytes', 120)}
  assert [row.run.split('/', 3)[1::2] for row in written] == [
    ['4-examples-per-device', f'{model}-{n}-devices-batch-norm-{norm}']
    for model in 'ab' for n in (8, 256) for norm in ('over-all', 'per-device')
  ]  # fmt: skip
  assert '| 4 | 2 | 0.000 |' in capsys.readouterr().out


def _ratios(rows, part):
  return {row['name']: row['ratio'] for row in rows if row['name'].startswith(part + '/')}


@pytest.mark.parametrize('part', ['step', 'jaxpruner', 'threshold', 'projection', 'decode'])
def test_sparsity(part, tmp_path, monkeypatch):
  from benchmarks import sparsity

  written, path = [], tmp_path / 'rows.json'
  monkeypatch.setattr(ledger, 'append', written.extend)
  flags = ['--top-k'] if part == 'threshold' else []
  sparsity.main(
    ['--only', part, '--small', '--repeats', '2', '--json', str(path), '--record', *flags]
  )
  rows = check_json(path)
  assert _ratios(rows, part).keys() == {row['name'] for row in rows}
  goals = {row['name']: row['goal'] for row in rows if row['goal']}
  if part == 'step':
    assert goals == {
      'step/batch 4/keep_masked': 1 / 1.05, 'step/batch 4/admm, a refresh in 390': 1 / 1.15,
    }  # fmt: skip
    assert {row.metric for row in written} == {'ratio', 'step_time', 'peak_memory'}
  if part == 'threshold':
    assert set(goals.values()) == {8.0} and len(goals) == 2
    assert sum('jax.lax.top_k' in name for name in _ratios(rows, part)) == 2
  if part == 'projection':
    assert {row.metric for row in written} == {'bandwidth_fraction'}
  if part == 'decode':
    assert sum('DARB' in name for name in _ratios(rows, part)) == 3
  assert len(written) == len(rows)


def test_sparsity_refuses_parts_there_are_not(capsys):
  from benchmarks import sparsity

  with pytest.raises(SystemExit):
    sparsity.parse_command(['--only', 'step,steps'])
  assert "no 'steps'; parts are step, jaxpruner" in capsys.readouterr().err


def test_break_even_is_where_the_speedup_passes_one():
  from benchmarks.quantize import break_even

  assert break_even((2, 4, 8), (0.25, 0.5, 4.0)) == pytest.approx(4 * 2 ** (1 / 3))
  assert break_even((2, 4, 8), (1.5, 0.5, 2.0)) == pytest.approx(4 * 2**0.5)
  assert break_even((2, 4), (1.5, 2.0)) == 2.0
  assert break_even((2, 4), (0.1, 0.9)) is None


@pytest.mark.parametrize('part', ['step', 'start', 'memory', 'calibration', 'sparse_kernel'])
def test_quantize(part, tmp_path, monkeypatch):
  from benchmarks import quantize

  written, path = [], tmp_path / 'rows.json'
  monkeypatch.setattr(ledger, 'append', written.extend)
  quantize.main(['--only', part, '--small', '--repeats', '2', '--json', str(path), '--record'])
  rows = check_json(path)
  goals = {row['name']: row['goal'] for row in rows if row['goal']}
  if part == 'step':
    assert goals == {'step/batch 4, K = 16/soft': 1 / 1.3}
    assert {row.metric for row in written} == {'ratio', 'step_time', 'peak_memory'}
  if part == 'calibration':
    assert list(goals.values()) == [0.8]
    assert {row.metric for row in written} == {'ratio', 'step_time', 'peak_memory'}
    # Calibration holds the network's pass and the samples of it besides.
    assert _ratios(rows, part)[next(n for n in _ratios(rows, part) if 'calibration, mem' in n)] < 1
  if part == 'sparse_kernel':
    pytest.importorskip('threadpoolctl')
    assert {row.metric for row in written} <= {'ratio', 'needed_rate', 'step_time'}
    ratios = _ratios(rows, part)
    each = {row['name']: row['value'] for row in rows if row['unit'] == 'x'}
    for rate in quantize.RATES:
      name = f'sparse_kernel/small, 1 image/{rate}x sparse rows'
      assert each[f'{name}, rate per speed-up'] == pytest.approx(rate / ratios[name])
  if part == 'start':
    assert goals == {'start/0.0 M weights, K = 16': 20.0}
    assert [row.metric for row in written] == ['duration'] and written[0].reached == 'yes'
  if part == 'memory':
    assert goals == {'memory/batch 32, K = 16/soft': 1 / 1.5}
    # Tests compile without fusion, so the ratios themselves say nothing here.
    assert [row.metric for row in written] == ['peak_memory', 'ratio', 'ratio']
    assert all(0 < ratio <= 1 for ratio in _ratios(rows, part).values() if ratio)
  assert len(written) == len([row for row in rows if 'per speed-up' not in row['name']])


def test_the_peer_prunes_as_its_authors_do():
  from benchmarks import magnitude_peer

  scores = jnp.array([[3.0, 1.0], [2.0, 2.0]])
  assert magnitude_peer.by_argsort(scores, 2).tolist() == [[1, 0], [1, 0]]  # the first of equals
  assert magnitude_peer.by_sort(scores, 2).tolist() == [[1, 0], [1, 1]]
  params, keep = {'w': jnp.array([4.0, -1.0, 3.0, 2.0]), 'b': jnp.ones(1)}, {'w': 0.5, 'b': None}
  tx, after = magnitude_peer.magnitude_pruning(optax.sgd(0.0), keep, begin=1, end=3, every=2)
  state, kept = tx.init(params), []
  for _ in range(5):
    updates, state = tx.update(params, state, params)
    params = after(optax.apply_updates(params, updates), state)
    kept.append(int(state.masks['w'].sum()))
  assert kept == [4, 4, 4, 2, 2] and params['w'].tolist() == [4, 0, 3, 0] and params['b'] == 1


@pytest.mark.parametrize('name', ['jaxwt', 'pywt', 'scipy.fft'])
def test_a_missing_peer_is_named_where_it_is_used(monkeypatch, name):
  for missing in ('jaxwt', 'pywt', 'scipy', 'scipy.fft'):
    monkeypatch.setitem(sys.modules, missing, None)
  monkeypatch.delitem(sys.modules, 'benchmarks.transforms', raising=False)
  # The ledger's check of a command needs no peer.
  ledger.check_command.cache_clear()
  assert ledger.check_command('python -m benchmarks.transforms --repeats 3') is None
  with pytest.raises(SystemExit, match=rf"{name} is missing.*pip install -e '\.\[bench\]'"):
    common.import_peer(name)
  x = np.zeros((1, 8, 8, 1), np.float32)
  transforms = importlib.import_module('benchmarks.transforms')
  for use in (
    lambda: transforms.wavelet_contenders(x, (1, 2), 'haar', 1),
    lambda: transforms.dct_contenders(x, (1, 2)),
    lambda: transforms.channel_contenders(x),
  ):
    with pytest.raises(SystemExit, match='pip install'):
      use()


def test_machine():
  source = np.arange(1000.0)
  assert common.copier(source)() is None
  assert common.copy_bandwidth(1, 2) > 1e6
  assert common.peak_memory() > 1e6


def test_every_benchmark_takes_the_common_flags(tmp_path):
  for name in ('collectives', 'input', 'quantize', 'sparsity', 'train_step', 'transforms'):
    module = importlib.import_module(f'benchmarks.{name}')
    args = module.parse_command(['--json', str(tmp_path / 'x.json'), '--record', '--repeats', '3'])
    assert args.record and args.repeats == 3 and args.json.name == 'x.json'


@pytest.mark.full
@pytest.mark.parametrize(
  'name, flags',
  [('input', ['--images', '10']), ('train_step', ['--small']), ('collectives', ['--small'])],
)
def test_small_runs_write_rows(tmp_path, monkeypatch, name, flags):
  if name == 'input':
    pytest.importorskip('cv2'), pytest.importorskip('simplejpeg'), pytest.importorskip('jpeglib')
  path = tmp_path / 'rows.json'
  module = importlib.import_module(f'benchmarks.{name}')
  written = []
  monkeypatch.setattr(ledger, 'append', written.extend)
  module.main([*flags, '--repeats', '2', '--json', str(path), '--record'])
  rows = check_json(path)
  # All that was measured; of the collectives only counts that --small leaves out.
  assert len(written) == (0 if name == 'collectives' else len(rows))


@pytest.mark.full
def test_peak_memory_of_a_fresh_process():
  small, large = (common.peak_memory(np.ones, n) for n in (1, 50_000_000))
  assert 3e8 < large - small < 6e8
