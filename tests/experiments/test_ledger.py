"""The ledger: rows, the file under several writers and after a kill, commands, tables."""

import dataclasses
import fcntl
import os
import pathlib
import shutil
import subprocess
import sys
import textwrap

import numpy as np
import pytest

import experiments
from experiments import ledger

RUN = 'imagenet_freq/cifar10/cifar_resnet20_dct/static6'


def make(run=RUN, metric='top1', value=87.5, **fields):
  defaults = dict(
    hardware='one core', command='python -m experiments.ledger', revision='abc1234',
    date='2026-01-31T12:00:00Z',
  )  # fmt: skip
  return ledger.Row(run, metric, value, **{**defaults, **fields})


@pytest.fixture
def path(tmp_path):
  return tmp_path / 'results.csv'


def run_python(code, *args, **kwargs):
  return subprocess.run(
    [sys.executable, '-c', textwrap.dedent(code), *map(str, args)],
    cwd=ledger.ROOT, capture_output=True, text=True, timeout=60, **kwargs,
  )  # fmt: skip


# -------------------------------------------------------------------- rows


def test_columns_are_the_published_ones():
  assert ','.join(ledger.COLUMNS) == (
    'run,metric,unit,value,spread,samples,seeds,reference,goal,reached,bytes,milliseconds,data,'
    'hardware,command,revision,date'
  )
  header = (ledger.ROOT / 'results.csv').read_text().split('\n')[0]
  assert header == ','.join(ledger.COLUMNS)


def test_row_survives_the_file(path):
  rows = [
    make(spread=0.25, samples=10000, seeds=3, goal=86, reference='a "quoted", odd | name'),
    make(metric='macs', value=np.int64(4_089_284_608), bytes=150528, milliseconds=1.25),
    make(metric='ratio', value=np.float32(1 / 3), data='64x224x224x3 float32, ü'),
  ]
  ledger.append(rows, path)
  back, problems = ledger.read(path)
  assert problems == []
  assert back[:2] == rows[:2]
  assert back[2].value == 0.333333
  assert [row.unit for row in back] == ['%', 'MAC', 'x']


@pytest.mark.parametrize(
  ('metric', 'value', 'goal', 'reached'),
  [
    ('top1', 90.0, 90.0, 'yes'), ('top1', 89.9, 90.0, 'no'), ('top1', 89.9, None, ''),
    ('step_overhead', 1.5, 2.0, 'yes'), ('step_overhead', 2.5, 2.0, 'no'),
    ('gain', -0.2, 0.0, 'no'),
  ],
)  # fmt: skip
def test_reached_follows_value_goal_and_direction(metric, value, goal, reached):
  assert make(metric=metric, value=value, goal=goal).reached == reached


def test_judged_by_what_is_written():
  """A rounding error below the goal neither misses it nor makes a row that contradicts itself."""
  row = make(metric='change', value=0.1 - 0.4, goal=-0.3)
  assert row.value == -0.3 and row.reached == 'yes'
  assert ledger.Row.from_cells(row.cells()) == row


@pytest.mark.parametrize(
  ('fields', 'message'),
  [
    (dict(run='a/b/c'), 'experiment/data/network/setting'),
    (dict(run='a/b//d'), 'experiment/data/network/setting'),
    (dict(run='a/b/c/d/e'), 'experiment/data/network/setting'),
    (dict(run='a/b/c/d e'), 'experiment/data/network/setting'),
    (dict(metric='top_1'), 'did you mean top1'),
    (dict(value=float('nan')), 'value must be a finite number'),
    (dict(value='87'), 'value must be a finite number'),
    (dict(goal=float('inf')), 'goal must be a finite number'),
    (dict(spread=-1.0), 'spread must not be negative'),
    (dict(seeds=2.5), 'seeds must be whole'),
    (dict(date='yesterday'), 'date must read'),
  ],
)
def test_bad_rows_say_what_is_wrong(fields, message):
  with pytest.raises(ValueError, match=message):
    make(**fields)


def test_standard_errors():
  values = np.random.default_rng(0).normal(size=1000)
  assert abs(ledger.standard_error(values) - values.std(ddof=1) / 1000**0.5) < 1e-12
  assert ledger.standard_error([1.0]) is None
  # Pairing removes what both saw.
  shift = np.linspace(0, 100, 1000)
  assert ledger.paired_standard_error(shift + values, shift) < 1.1 * ledger.standard_error(values)
  with pytest.raises(ValueError, match='pairs'):
    ledger.paired_standard_error([1.0, 2.0], [1.0])
  with pytest.raises(ValueError, match='at least one'):
    ledger.standard_error([])


def test_error_of_seeds_and_images_adds_both_sources_of_variation():
  rng = np.random.default_rng(0)
  values = (rng.random((3, 400)) < np.array([[0.5], [0.6], [0.7]])).astype(float)
  expected = np.hypot(values.mean(0).std(ddof=1) / 20, np.std(values.mean(1), ddof=1) / np.sqrt(3))
  assert ledger.standard_error(values) == pytest.approx(expected)
  assert ledger.standard_error(values[:1]) == pytest.approx(values[0].std(ddof=1) / 20)
  assert ledger.standard_error(np.ones((1, 1))) is None


# -------------------------------------------------------------------- where a number comes from


@pytest.mark.parametrize(
  ('word', 'written'),
  [
    ('--workdir=/abs/path', '--workdir=DIR'),
    ('/abs/path', 'DIR'),
    ('--json=/tmp/rows.json', '--json=FILE'),
    ('--workdir=~/runs', '--workdir=DIR'),
    ('--workdir=/home/a b/runs', '--workdir=DIR'),
    ('--config.data.name=folder:/home/me/photos', '--config.data.name=folder:DIR'),
    ('--x=file:///home/me/photos', '--x=DIR'),
    (f'--config={ledger.ROOT}/configs/a.py:smoke', '--config=configs/a.py:smoke'),
    ('--config=configs/a.py:width=1/2,lr=0.1', '--config=configs/a.py:width=1/2,lr=0.1'),
    ('--workdir=gs://bucket/run', '--workdir=gs://bucket/run'),
    ('--workdir=runs/a', '--workdir=runs/a'),
  ],
)
def test_command_holds_no_path_of_this_machine(word, written):
  home = os.path.expanduser('~')
  text = ledger.command([word], 'experiments.a')
  assert text == ledger.shlex.join(['python', '-m', 'experiments.a', written])
  assert f'{home}/' not in text or home == '/'


def test_command_names_the_module_that_was_started(tmp_path):
  (tmp_path / 'tool.py').write_text('from experiments import ledger; print(ledger.command())')
  out = subprocess.run(
    [sys.executable, '-m', 'tool', '--workdir', str(tmp_path)],
    cwd=tmp_path, capture_output=True, text=True, timeout=60,
    env={**os.environ, 'PYTHONPATH': str(ledger.ROOT)},
  )  # fmt: skip
  assert out.stdout.strip() == 'python -m tool --workdir DIR', out.stderr


@pytest.mark.skipif(shutil.which('git') is None, reason='git is not installed')
def test_revision_of_a_tree(tmp_path):
  assert ledger.revision(tmp_path) == 'unknown'
  git = ['git', '-c', 'user.name=a', '-c', 'user.email=a@b', '-c', 'commit.gpgsign=false']
  for words in (['init', '-q'], ['commit', '-q', '--allow-empty', '-m', 'x']):
    subprocess.run([*git, *words], cwd=tmp_path, check=True, capture_output=True)
  clean = ledger.revision(tmp_path)
  assert 4 <= len(clean) <= 40 and clean.isalnum()
  (tmp_path / 'results.csv').write_text('a new row is no change of the code')
  assert ledger.revision(tmp_path) == clean
  (tmp_path / 'code.py').write_text('x = 1')
  assert ledger.revision(tmp_path) == clean + '-dirty'


def test_hardware():
  assert 'core' in ledger.hardware()


def test_revision_without_git(tmp_path, monkeypatch):
  monkeypatch.setenv('PATH', str(tmp_path))
  assert ledger.revision() == 'unknown'


def test_importing_the_ledger_starts_no_backend():
  out = run_python("""
    import sys
    from experiments import ledger
    ledger.Row('a/b/c/d', 'top1', 1.0)
    print('jax' in sys.modules)
  """)
  assert out.stdout.strip() == 'False', out.stderr


# -------------------------------------------------------------------- the file


def test_two_writers_lose_nothing(path):
  code = """
    import sys
    from experiments import ledger
    for i in range(100):
      ledger.append([ledger.Row(f'a/{sys.argv[2]}/{i}/{k}', 'top1', i, hardware='x' * 500)
                     for k in range(3)], sys.argv[1])
  """
  procs = [
    subprocess.Popen([sys.executable, '-c', textwrap.dedent(code), path, str(i)], cwd=ledger.ROOT)
    for i in range(2)
  ]
  assert [proc.wait(timeout=60) for proc in procs] == [0, 0]
  rows, problems = ledger.read(path)
  assert problems == []
  assert len({row.run for row in rows}) == len(rows) == 600
  # The three rows of one call stay together.
  assert all(
    len({row.run.rsplit('/', 1)[0] for row in rows[i : i + 3]}) == 1 for i in range(0, 600, 3)
  )


def test_a_writer_waits_for_the_one_before(path):
  ledger.append([make()], path)
  before = path.read_bytes()
  code = """
    import sys
    from experiments import ledger
    row = ledger.Row('a/b/c/d', 'top1', 1.0)
    print('ready', flush=True)
    ledger.append([row], sys.argv[1])
  """
  with open(path, 'rb') as file:
    fcntl.flock(file, fcntl.LOCK_EX)
    proc = subprocess.Popen(
      [sys.executable, '-c', textwrap.dedent(code), path], cwd=ledger.ROOT, stdout=subprocess.PIPE
    )
    assert proc.stdout.readline() == b'ready\n'
    with pytest.raises(subprocess.TimeoutExpired):
      proc.wait(timeout=0.5)
    assert path.read_bytes() == before
    fcntl.flock(file, fcntl.LOCK_UN)
  assert proc.wait(timeout=60) == 0
  proc.stdout.close()
  assert len(ledger.read(path)[0]) == 2


def test_a_line_cut_anywhere_is_reported_and_never_taken_for_whole(path):
  first, last = make(), make(metric='ratio', value=12.5, reference='a "b", c', goal=1.0)
  ledger.append([first], path)
  whole = path.read_bytes()
  ledger.append([last], path)
  line = path.read_bytes()[len(whole) :]
  for cut in range(1, len(line)):
    path.write_bytes(whole + line[:cut])
    rows, problems = ledger.read(path)
    assert rows == [first]
    assert len(problems) == 1 and 'results.csv:3: cut off' in problems[0]
  # Even with a newline put behind it by somebody's editor: only the full line is a row.
  for cut in range(1, len(line) - 1):
    path.write_bytes(whole + line[:cut] + b'\n')
    assert ledger.read(path)[0] == [first]


def test_append_after_a_cut_line_takes_it_out_and_says_so(path):
  ledger.append([make()], path)
  whole = path.read_bytes()
  path.write_bytes(whole + b'imagenet_freq/cifar10/"half')
  with pytest.warns(UserWarning, match='cut off.*half'):
    ledger.append([make(metric='top5')], path)
  rows, problems = ledger.read(path)
  assert [row.metric for row in rows] == ['top1', 'top5'] and problems == []
  path.write_bytes(whole[:20])  # killed within the header
  ledger.append([make()], path)
  assert path.read_bytes() == whole


def test_full_disk_leaves_the_file_as_it_was(path):
  ledger.append([make()], path)
  before = path.read_bytes()
  out = run_python(
    """
    import resource, signal, sys
    from experiments import ledger
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    size = int(sys.argv[2])
    resource.setrlimit(resource.RLIMIT_FSIZE, (size + 20, size + 20))
    try:
      ledger.append([ledger.Row('a/b/c/d', 'top1', 1.0)], sys.argv[1])
    except OSError as error:
      print('refused')
  """,
    path, len(before),
  )  # fmt: skip
  assert out.stdout.strip() == 'refused', out.stderr
  assert path.read_bytes() == before


def test_append_refuses_another_file(path):
  path.write_text('name,value\n')
  with pytest.raises(ValueError, match='does not start with the columns'):
    ledger.append([make()], path)
  assert path.read_text() == 'name,value\n'


@pytest.mark.parametrize(
  ('change', 'message'),
  [
    (lambda c: c[:-1], '16 cells instead of 17'),
    (lambda c: [*c[:1], 'topp1', *c[2:]], 'unknown metric'),
    (lambda c: [*c[:2], 'images', *c[3:]], "unit is 'images'"),
    (lambda c: [*c[:3], '87,5', *c[4:]], 'value is not a number'),
    (lambda c: [*c[:3], '', *c[4:]], 'value is not a number'),
    (lambda c: [*c[:6], '3.0', *c[7:]], 'seeds is not a number'),
    (lambda c: [*c[:9], 'no', *c[10:]], "reached says 'no'"),
    (lambda c: ['a/b', *c[1:]], 'experiment/data/network/setting'),
  ],
)
def test_check_names_line_and_fault(path, change, message):
  cells = make(goal=80.0, seeds=3).cells()
  path.write_text(
    ','.join(ledger.COLUMNS) + '\n' + ','.join(f'"{c}"' for c in change(cells)) + '\n'
  )
  rows, problems = ledger.read(path)
  assert rows == []
  assert len(problems) == 1 and problems[0].startswith('results.csv:2: ') and message in problems[0]


def test_check_finds_repeats_and_foreign_columns(path):
  ledger.append([make(), make(metric='top5'), make(value=80.0)], path)
  (problem,) = ledger.read(path)[1]
  assert problem.startswith('results.csv:4: repeats line 2')
  path.write_text(','.join([*ledger.COLUMNS[:-1], 'who']) + '\n')
  assert ledger.read(path)[1] == ['results.csv:1: unknown columns who and missing columns date']


# -------------------------------------------------------------------- commands


@pytest.fixture
def programs(tmp_path, monkeypatch):
  folder = tmp_path / 'experiments'
  folder.mkdir()
  (folder / 'with_argparse.py').write_text(
    textwrap.dedent("""
    import argparse
    def parse_command(argv):
      parser = argparse.ArgumentParser()
      parser.add_argument('--repeats', type=int)
      return parser.parse_args(argv)
  """)
  )
  (folder / 'with_config.py').write_text(
    textwrap.dedent("""
    from absl import flags
    from experiments import ledger
    from ml_collections import config_flags
    def define(values):
      config_flags.DEFINE_config_file('config', flag_values=values)
      flags.DEFINE_string('workdir', None, '', required=True, flag_values=values)
    def parse_command(argv):
      return ledger.parse_flags(argv, define)
  """)
  )
  (folder / 'without.py').write_text('')
  (folder / 'broken.py').write_text('from experiments import with_argparse\nwith_argparse.gone')
  (tmp_path / 'config.py').write_text(
    textwrap.dedent("""
    import ml_collections
    def get_config(arg=''):
      if arg not in ('', 'smoke'):
        raise ValueError(f'unknown config argument {arg!r}')
      return ml_collections.ConfigDict({'optim': {'lr': 0.1}})
  """)
  )
  # As if the folder were the source tree, with this repository's programs outside of it.
  monkeypatch.setattr(ledger, 'ROOT', tmp_path)
  monkeypatch.setattr(experiments, '__path__', [str(folder), *experiments.__path__])
  ledger.check_command.cache_clear()
  yield tmp_path
  ledger.check_command.cache_clear()
  for path in folder.glob('*.py'):
    sys.modules.pop(f'experiments.{path.stem}', None)
    vars(experiments).pop(path.stem, None)


# Raised inside ml_collections when it loads a config file.
@pytest.mark.filterwarnings('ignore:the load_module:DeprecationWarning')
@pytest.mark.parametrize(
  ('words', 'wrong'),
  [
    ('experiments.with_argparse --repeats 3', None),
    ('experiments.with_argparse --repeat=three', 'invalid int value'),
    ('experiments.with_argparse --json=x', 'unrecognized arguments: --json'),
    ('experiments.with_config --config=config.py --workdir=DIR', None),
    ('experiments.with_config --config=config.py:smoke --config.optim.lr=0.2 --workdir=DIR', None),
    ('experiments.with_config --config=config.py', 'workdir'),
    (
      'experiments.with_config --config=config.py:big --workdir=DIR',
      "unknown config argument 'big'",
    ),
    ('experiments.with_config --config=config.py --config.optim.rate=0.2 --workdir=DIR', 'rate'),
    ('experiments.with_config --config=config.py --config.optim.lr=fast --workdir=DIR', 'fast'),
    ('experiments.with_config --config=gone.py --workdir=DIR', 'gone.py'),
    ('experiments.with_config --config=config.py --workdir=DIR --colour=red', 'colour'),
    ('experiments.with_config --config=config.py --workdir=DIR leftover', 'takes no leftover'),
    ('experiments.without', None),
    ('experiments.without --lr=1', 'offers no parse_command'),
    ('experiments.broken', 'gone'),
    ('experiments.gone', 'no module experiments.gone'),
    ('experiments.with_config.gone', 'no module experiments.with_config.gone'),
  ],
)
def test_commands_that_no_longer_parse_are_found(programs, words, wrong):
  before = list(sys.argv)
  found = ledger.check_command('python -m ' + words)
  assert sys.argv == before
  if wrong is None:
    assert found is None
  else:
    assert found is not None and wrong in found


@pytest.mark.parametrize(
  ('words', 'wrong'),
  [
    ('this', 'this is not run: only modules of experiments and benchmarks'),
    ('elsewhere', 'elsewhere is not run: only modules'),
    ('experiments', 'experiments is not run: only modules'),
    ('experimentsx.a', 'only modules of experiments and benchmarks'),
    ('experiments.ledger', 'lies outside of the source tree'),
    ('experiments.with_config --config=../evil.py --workdir=DIR', '../evil.py is not read'),
    ('experiments.with_config --config ../evil.py:smoke --workdir=DIR', '../evil.py is not read'),
    ('experiments.with_config -config=../evil --workdir=DIR', '../evil is not read'),
    ('experiments.with_config --config={0}/config.py --workdir=DIR', 'config.py is not read'),
    ('experiments.with_config --config=link.py --workdir=DIR', 'link.py is not read'),
    ('experiments.with_config --flagfile=more --workdir=DIR', 'flags are read from no file'),
    ("experiments.with_config '--config=a", 'is no command line'),
  ],
)
def test_a_row_runs_no_code_from_elsewhere(programs, tmp_path_factory, monkeypatch, words, wrong):
  outside = tmp_path_factory.mktemp('outside')
  trap = f'import pathlib; pathlib.Path({str(outside / "ran")!r}).touch()'
  for path in (outside / 'elsewhere.py', outside / 'evil.py', programs.parent / 'evil.py'):
    path.write_text(trap)
  (programs.parent / 'evil').write_text(trap)
  (programs / 'link.py').symlink_to(outside / 'evil.py')
  (programs / 'more').write_text('--config=../evil.py')
  monkeypatch.syspath_prepend(outside)
  found = ledger.check_command('python -m ' + words.format(programs))
  assert found is not None and wrong in found
  assert not (outside / 'ran').exists() and 'elsewhere' not in sys.modules


def test_a_command_that_is_no_module_is_found():
  assert 'python -m' in ledger.check_command('./train.sh')


# -------------------------------------------------------------------- tables and command line

README = """# A project

<!-- results:frequency -->
<!-- /results:frequency -->

between

<!-- results:benchmarks -->
stale
<!-- /results:benchmarks -->
end
"""


@pytest.fixture
def tree(tmp_path):
  (tmp_path / 'README.md').write_text(README)
  ledger.append(
    [
      make(value=50.0, spread=0.5, seeds=3),
      make(metric='input_bytes', value=768, seeds=3),
      make(metric='macs', value=41_200_000),
      make(spread=0.314, seeds=3, goal=88.0, reference='RGB', date='2026-02-01T12:00:00Z'),
      make('benchmarks.transforms/noise/block_dct/cpu', 'ratio', 4.5, goal=4, reference='a|b'),
    ],
    tmp_path / 'results.csv',
  )
  return tmp_path


def test_write_makes_tables_that_check_accepts(tree, capsys):
  assert ledger.main(['--check'], tree) == 1
  assert 'README.md is out of date' in capsys.readouterr().err
  assert ledger.main([], tree) == 0
  assert (tree / 'README.md').read_text() == README
  assert ledger.main(['--write'], tree) == 0
  out = capsys.readouterr().out
  assert f'short of its goal: {RUN} top1 87.50 ± 0.31 %, goal 88 % (RGB)' in out
  assert '5 rows, 1 short of their goal, 0 problems' in out
  text = (tree / 'README.md').read_text()
  assert text.startswith('# A project\n') and text.endswith('\nend\n') and '\nbetween\n' in text
  assert 'stale' not in text
  lines = text.split('\n')
  assert '| data | network | setting | top-1 % | input bytes | million MACs | seeds |' in lines
  assert '| cifar10 | cifar_resnet20_dct | static6 | 87.50 ± 0.31 | 768 | 41.2 | 3 |' in lines
  assert '| noise/block_dct/cpu | ratio | 4.5 x | a\\|b | 4 x | yes |' in lines
  assert ledger.main(['--check'], tree) == 0
  assert ledger.main(['--write'], tree) == 0
  assert (tree / 'README.md').read_text() == text


def test_problems_fail_and_leave_the_readme(tree, capsys):
  ledger.append([make(metric='top5', command='python -m experiments.gone')], tree / 'results.csv')
  assert ledger.main(['--write'], tree) == 1
  assert 'no module experiments.gone' in capsys.readouterr().err
  assert (tree / 'README.md').read_text() == README


@pytest.mark.parametrize(
  ('text', 'message'),
  [
    ('<!-- results:other -->\n<!-- /results:other -->\n', "asks for table 'other'"),
    ('<!-- results:frequency -->\n', 'does not close'),
  ],
)
def test_bad_markers_are_named(text, message):
  with pytest.raises(ValueError, match=message):
    ledger.render(text, [])


def test_no_rows_no_table():
  text = '<!-- results:frequency -->\n<!-- /results:frequency -->'
  assert 'No rows yet.' in ledger.render(text, [])


def test_every_metric_is_explained():
  for name, metric in ledger.METRICS.items():
    assert name.isidentifier() and metric.unit and metric.text


def test_rows_are_frozen():
  with pytest.raises(dataclasses.FrozenInstanceError):
    make().value = 99.0


def test_default_ledger_is_the_one_in_the_tree():
  assert pathlib.Path(__file__).resolve().parents[2] == ledger.ROOT
  rows, problems = ledger.read()
  assert problems == [], problems
