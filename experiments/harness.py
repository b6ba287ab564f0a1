"""What the commands of all experiments share: flags, the folder of a run, small files."""

from collections.abc import Callable, Iterator
import contextlib
import fcntl
import json
import pathlib
import re
from typing import Any

from absl import app, flags, logging
from flax.traverse_util import flatten_dict, unflatten_dict
from ml_collections import config_flags
import numpy as np

from experiments import ledger
from fqjax import files, train

PyTree = Any


# ---------------------------------------------------------------------------- command line


def define_flags(flag_values=flags.FLAGS):
  """The command line: `--config`, overrides of its fields, `--workdir`."""
  config = config_flags.DEFINE_config_file('config', lock_config=True, flag_values=flag_values)
  workdir = flags.DEFINE_string(
    'workdir', None, 'Folder of checkpoints, metrics and the report.', flag_values=flag_values
  )
  return config, workdir


def parse_command(argv, check: Callable[[Any], None]):
  """Parses what follows `python -m experiments.NAME`; raises where it would not run."""
  values = ledger.parse_flags(argv, define_flags)
  check(values.config)
  return values


def run(experiment: Callable[[Any, pathlib.Path], Any]) -> None:
  """The body of an experiment's `__main__`: parses the flags, calls `experiment(config, workdir)`."""
  config, workdir = define_flags()
  flags.mark_flags_as_required(['config', 'workdir'])

  def main(argv):
    if len(argv) > 1:
      raise app.UsageError(f'unexpected arguments: {" ".join(argv[1:])}')
    logging.set_verbosity(logging.WARNING)  # Orbax narrates every save
    experiment(config.value, pathlib.Path(workdir.value))

  app.run(main)


# ---------------------------------------------------------------------------- folder of a run


def check_same_experiment(workdir: pathlib.Path, config, free: re.Pattern) -> None:
  """Refuses to go on in a folder that holds runs of another configuration.

  Sections that the program did not have yet at the time of the earlier run may be as they like, at
  any depth; a field that came later into a section may be empty or zero: it switches nothing on.

  Args:
    workdir: the folder; its `config.json`, if any, is of the earlier run.
    config: of this run.
    free: names of fields (joined by dots) that may change between a run and its continuation.

  Raises:
    ValueError: naming the fields that differ.
  """
  path = workdir / 'config.json'
  if not path.exists():
    return
  before = json.loads(path.read_text())
  old = flatten_dict(before, sep='.')
  new = flatten_dict(json.loads(config.to_json_best_effort()), sep='.')
  differ = [
    f'{k}: {old.get(k)} there, {new.get(k)} now'
    for k in sorted(old.keys() | new.keys())
    if old.get(k) != new.get(k) and not free.fullmatch(k) and not came_later(before, k, new.get(k))
  ]
  if differ:
    raise ValueError(
      f'{workdir} holds runs of another configuration:\n  ' + '\n  '.join(differ) + '\n'
      'Name another --workdir, or repeat the flags of the earlier run to go on with it.'
    )


def came_later(before: dict, field: str, value) -> bool:
  """Whether an older configuration had no such section, or no such field and the value is empty."""
  *sections, name = field.split('.')
  for section in sections:
    if section not in before:
      return True
    before = before[section]
  return name not in before and not value


def begin(config, workdir: pathlib.Path, free: re.Pattern):
  """Opens a folder for a run: its processes, its configuration, its compiled programs.

  Args:
    config: of this run.
    workdir: the folder.
    free: as `check_same_experiment`.

  Returns:
    The mesh of all devices.
  """
  train.initialize_distributed()
  mesh = train.make_mesh()
  train.check_workdir(workdir)
  check_same_experiment(workdir, config, free)
  train.synchronize('configuration read')
  if train.is_main():
    files.write_text(workdir / 'config.json', config.to_json_best_effort(indent=2))
  train.enable_compile_cache((workdir / 'jax_cache').absolute())
  return mesh


@contextlib.contextmanager
def alone(path: pathlib.Path) -> Iterator[None]:
  """Waits until no other program works on `path`, so that several can share a workdir."""
  with contextlib.ExitStack() as stack:
    if train.is_main():
      path.parent.mkdir(parents=True, exist_ok=True)
      lock = stack.enter_context(open(path.with_name(f'.{path.name}.lock'), 'w'))
      try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
      except BlockingIOError:
        say(f'{path}: another program is at it, waiting')
        fcntl.flock(lock, fcntl.LOCK_EX)
    train.synchronize(f'{path} is ours')
    yield


def data_label(name: str) -> str:
  """A data set's name as it stands in `run`: a path of this machine means nothing elsewhere."""
  kind, _, place = name.rpartition(':')
  return f'{kind}-{pathlib.Path(place).name}' if '/' in place else place


def record_once(path: pathlib.Path, numbers, rows: list[ledger.Row]) -> None:
  """Appends `rows` to the ledger, unless the same `numbers` were recorded from this folder before.

  Args:
    path: the note of what was recorded, in the workdir.
    numbers: what the rows were made from, as JSON.
    rows: one per metric.
  """
  if path.exists() and json.loads(path.read_text()) == json.loads(json.dumps(numbers)):
    say(f'These numbers are in the ledger already ({path}).')
    return
  ledger.append(rows)
  files.write_text(path, json.dumps(numbers))


# ---------------------------------------------------------------------------- small files


def say(text: str) -> None:
  """Prints once per cluster."""
  if train.is_main():
    print(text, flush=True)


def save_arrays(path: pathlib.Path, **arrays) -> None:
  """Writes an .npz that is either whole or not there."""
  with files.replacing(path) as unfinished, unfinished.open('wb') as f:
    np.savez_compressed(f, **arrays)


def save_tree(path: pathlib.Path, tree: PyTree) -> None:
  """Writes nested dicts of arrays as one .npz, keys joined by '/'."""
  save_arrays(path, **{k: np.asarray(v) for k, v in flatten_dict(tree, sep='/').items()})


def load_tree(path: pathlib.Path) -> dict:
  """Reads what `save_tree` wrote."""
  with np.load(path, allow_pickle=False) as z:
    return unflatten_dict({k: z[k] for k in z.files}, sep='/')


def read_result(folder: pathlib.Path) -> dict | None:
  """Outcome of a finished run, if there is one."""
  path = folder / 'result.json'
  return json.loads(path.read_text()) if path.exists() else None
