"""The training loop: resume, steps, reports, evaluation, checkpoints, and every way it can end."""

import collections
from collections.abc import Callable, Iterable, Mapping, Sequence
import math
import os
import pathlib
import signal
import threading
import time
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from fqjax.data import Corrupt
from fqjax.train._corrupt import METRIC, CorruptLog
from fqjax.train._log import Log
from fqjax.train.checkpoint import Checkpoints, check_workdir, state_bytes
from fqjax.train.distributed import fail_together, is_main, synchronize
from fqjax.train.mesh import make_mesh, replicate, shard_batch
from fqjax.train.metrics import Writer, compile_count
from fqjax.train.state import TrainState

PyTree = Any

# Steps the host may run ahead of the device. While it computes, the batches of those steps are read
# and copied to it, which needs no prefetching; the number bounds how many of them it holds.
_IN_FLIGHT = 4


class NonFiniteError(FloatingPointError):
  """The loss or the parameters became NaN or infinite."""


class FitResult(NamedTuple):
  """What `fit` returns.

  Attributes:
    state: the state after the last step.
    history: the records of `metrics.jsonl`, of earlier starts too; on process 0, else empty.
    corrupt: samples the loader could not decode, of earlier starts and other processes too (of
      those, the first five files' names); none where the loader does not count them.
  """

  state: TrainState
  history: list[dict[str, Any]]
  corrupt: Corrupt


def fit(
  state: TrainState,
  step: Callable[[TrainState, PyTree], tuple[TrainState, Mapping[str, jax.Array]]],
  loader: Iterable[PyTree],
  *,
  workdir: str | os.PathLike,
  total_steps: int,
  mesh: Mesh | None = None,
  evaluators: Sequence[Callable[[TrainState], Mapping[str, float]]] = (),
  log_every: int = 50,
  eval_every: int | None = None,
  checkpoint_every: int | None = None,
  keep: int = 3,
  progress: bool | None = None,
  profile: tuple[int, int] | None = None,
  writers: Sequence[Writer] | None = None,
) -> FitResult:
  """Trains until `total_steps`, from the newest intact checkpoint in `workdir` if there is one.

  Writes `workdir/checkpoints` (state and loader position), `workdir/metrics.jsonl`, `workdir/tb` and,
  if there are any, the names of images that could not be decoded in `workdir/corrupt.json`; their
  count is the metric `data/corrupt`.
  Killed at any moment and started again with the same arguments, the run ends with the very same
  parameters. SIGTERM and Ctrl-C save a checkpoint first; SIGTERM then exits with status 143. They
  do so after the last step too: a program that trains several networks must not go on to the next.

  A report covers the steps since the one before it (means of the step's metrics) and is fetched
  while the next steps already run. Reports are written every `log_every` steps and wherever there
  is an evaluation or a checkpoint. A checkpoint is only written of finite parameters after finite
  losses, so a run that diverges keeps its last good one.

  Args:
    state: the state of step 0, e.g. of `create_state`; donated.
    step: of `make_train_step`. Its metrics need a `loss`.
    loader: endless process-local batches; `iter(loader)` with `get_state` and `set_state` makes the
      resumed data exact.
    workdir: folder of the run, shared by all processes.
    total_steps: the step to stop at.
    mesh: the mesh of `step`.
    evaluators: functions of the state that return named numbers; called on every process.
    log_every: steps per report.
    eval_every: steps between evaluations; always also at the end. None: at the end only.
    checkpoint_every: steps between checkpoints; always also at the end. None: ten in the run.
    keep: number of checkpoints kept.
    progress: True a bar, False a line per report, None a bar on a terminal.
    profile: first and last step of a profiler trace into `workdir/profile`.
    writers: instead of JSON lines and TensorBoard.

  Returns:
    A `FitResult`.

  Raises:
    OSError: before the first step, if `workdir` cannot be written to or is too full; later, if the
      metrics cannot be written.
    NonFiniteError: naming the step and the checkpoint that is good.
    CheckpointError: if a checkpoint could not be written; the ones before it are kept.
    RuntimeError: on the other processes, if one cannot write metrics or finish a checkpoint.
    ValueError: for settings that make no sense, a loader that ends early, a checkpoint of another
      model.

  Examples:
    >>> import contextlib, io, itertools, tempfile, optax
    >>> from fqjax.train import create_state, make_train_step
    >>> tx, mesh = optax.sgd(0.1), make_mesh(1)
    >>> loss_fn = lambda params, model_state, batch, key: (
    ...   jnp.mean((batch['x'] * params['w'] - 1) ** 2),
    ...   (model_state, {}),
    ... )
    >>> state = create_state({'w': jnp.zeros(())}, {}, tx, jax.random.key(0))
    >>> step = make_train_step(loss_fn, tx, mesh=mesh)
    >>> batches = itertools.repeat({'x': jnp.ones(8)})
    >>> with tempfile.TemporaryDirectory() as workdir, contextlib.redirect_stdout(io.StringIO()):
    ...   result = fit(state, step, batches, workdir=workdir, total_steps=20, mesh=mesh)
    >>> print(int(result.state.step), f'{float(result.state.params["w"]):.2f}')
    20 0.99
  """
  for name, value in {
    'total_steps': total_steps,
    'log_every': log_every,
    'eval_every': eval_every,
    'checkpoint_every': checkpoint_every,
  }.items():
    if value is not None and value < 1:
      raise ValueError(f'fit counts {name} in steps, from 1; got {value}.')
  if profile is not None and not 1 <= profile[0] <= profile[1]:
    raise ValueError(f'profile=(first, last) names steps, from 1; got {profile}.')
  checkpoint_every = checkpoint_every or max(total_steps // 10, 1)
  mesh = make_mesh() if mesh is None else mesh

  folder = pathlib.Path(workdir).absolute()
  checkpoints = Checkpoints(folder / 'checkpoints', keep)
  with fail_together():
    missing = max(keep + 1 - len(checkpoints.steps()), 1)
    check_workdir(folder, missing * state_bytes(state))
  state = replicate(state, mesh)
  batches = iter(loader)
  restored = checkpoints.restore(state, repair=True)
  if restored is not None:
    state = restored.state
    if restored.position is not None and hasattr(batches, 'set_state'):
      batches.set_state(restored.position)  # pyright: ignore[reportAttributeAccessIssue]
  start = int(state.step)

  with fail_together():
    log = Log(folder, start, total_steps, writers, progress)
    corrupt = CorruptLog(folder, batches, log.history)
  if restored is not None:
    log.say(f'Continuing from step {start} of {total_steps} ({folder}).')
  run = _Run(state, batches, checkpoints, log, corrupt, start)
  try:
    with _Stopper() as stopper:
      if start < total_steps:
        run.check_finite()  # also compiles the check, before steps are counted
      for i in range(start + 1, total_steps + 1):
        if profile is not None and i == max(profile[0], start + 1) <= profile[1]:
          jax.block_until_ready(run.state)
          jax.profiler.start_trace(str(folder / 'profile'))
          run.tracing = True
        run.advance(step, mesh, i)
        if run.tracing and profile is not None and i == profile[1]:
          run.end_trace()
        last = i == total_steps
        evaluate_now = bool(evaluators) and (last or (eval_every and i % eval_every == 0))
        save_now = last or i % checkpoint_every == 0
        stop = stopper.asked(i)
        if i % log_every == 0 or evaluate_now or save_now or stop:
          corrupt.collect()
          with fail_together():
            run.report(i, fetch=bool(evaluate_now or save_now or stop))
            checkpoints.check()
        if evaluate_now:
          run.evaluate(evaluators, i)
        if save_now or stop:
          run.save(i)
        if stop:
          break
      with fail_together():
        checkpoints.wait()
      if stopper.asked(total_steps + 1):  # also for a signal since the last step was asked
        log.say(
          f'{stopper.reason} at step {run.saved}: checkpoint saved, the same command continues.'
        )
        stopper.leave()
    log.report_corrupt(corrupt.total)
  finally:
    run.end_trace()
    if hasattr(batches, 'close'):
      batches.close()  # pyright: ignore[reportAttributeAccessIssue]
    log.close()
    checkpoints.close()
  synchronize('fqjax.train.fit: end')
  return FitResult(run.state, log.history, corrupt.total)


class _Run:
  """The state of a run and the steps whose metrics have not been looked at."""

  def __init__(
    self, state, batches, checkpoints: Checkpoints, log: Log, corrupt: CorruptLog, start: int
  ):
    self.state = state
    self.batches = batches
    self.checkpoints = checkpoints
    self.log = log
    self.corrupt = corrupt
    self.start = start
    self.saved = start  # step of the last good checkpoint (or of the given state)
    self.steps: list[tuple[int, Mapping[str, jax.Array]]] = []
    self.waiting: tuple[list, dict] | None = None
    self.flying: collections.deque[tuple[jax.Array, int]] = collections.deque()
    self.recompiled = 0
    self.tracing = False
    compile_count()

  def advance(self, step, mesh: Mesh, i: int) -> None:
    try:
      batch = next(self.batches)
    except StopIteration:
      raise ValueError(
        f'the loader ended after {i - 1} of {self.log.total} steps. Train with an endless one'
        ' (Loader(..., repeat=True)).'
      ) from None
    batch = shard_batch(batch, mesh)
    size = jax.tree.leaves(batch)[0].shape[0]
    self.log.images += size
    before = compile_count()
    began = time.perf_counter()
    self.state, metrics = step(self.state, batch)
    compiled = compile_count() - before
    if 'loss' not in metrics:
      raise ValueError(f"the step's metrics {sorted(metrics)} need a 'loss'.")
    self.flying.append((metrics['loss'], size))
    if i == self.start + 1:
      self._land(0)
      self.log.say(
        f'First step (compiling {compiled} programs): {time.perf_counter() - began:.1f} s'
      )
      self.log.begin(i)
    elif compiled:
      self.recompiled += compiled
      self.log.say(
        f'Warning: step {i} compiled {compiled} more programs. Batches must keep their shapes and'
        ' dtypes; JAX_EXPLAIN_CACHE_MISSES=1 names the cause.'
      )
    self.steps.append((i, metrics))
    self._land(_IN_FLIGHT - 1)

  def _land(self, flying: int) -> None:
    """Waits until no more than so many steps are under way."""
    while len(self.flying) > flying:
      loss, size = self.flying.popleft()
      jax.block_until_ready(loss)
      self.log.finished += size

  def end_trace(self) -> None:
    if self.tracing:
      self.tracing = False
      jax.block_until_ready(self.state)
      jax.profiler.stop_trace()
      self.log.say(f'Profiler trace written to {self.log.folder / "profile"}')

  def report(self, i: int, fetch: bool) -> None:
    """Hands the steps since the last report to the log: the previous ones now, these next time."""
    if fetch:  # what is under way belongs to this stretch, not to the pause that follows
      self._land(0)
    counts = self.log.measure()
    counts['compiles'] = compile_count()
    counts['recompiles'] = self.recompiled
    if self.corrupt.counted:
      counts[METRIC] = self.corrupt.total.count
    ahead = self.steps, counts
    self.steps = []
    self._emit()
    self.waiting = ahead if ahead[0] else None
    if fetch:
      self._emit()

  def _emit(self) -> None:
    if self.waiting is None:
      return
    (steps, counts), self.waiting = self.waiting, None
    values = jax.device_get([metrics for _, metrics in steps])
    for (i, _), metrics in zip(steps, values, strict=True):
      if not math.isfinite(float(metrics['loss'])):
        self._stop(f'the loss is {float(metrics["loss"])} at step {i}', steps[0][0], steps[-1][0])
    means = {name: sum(float(m[name]) for m in values) / len(values) for name in sorted(values[0])}
    means = {'loss': means.pop('loss'), **means}
    self.log.record(steps[-1][0], {**means, **counts})

  def check_finite(self) -> None:
    state = self.state
    if not bool(_all_finite((state.params, state.model_state, state.ema))):
      i = int(state.step)
      self._stop(
        f'the parameters (or model state) are not finite after step {i}', self.saved + 1, i
      )

  def evaluate(self, evaluators, i: int) -> None:
    with self.log.paused():
      results: dict[str, float] = {}
      for evaluator in evaluators:
        results.update({k: float(v) for k, v in evaluator(self.state).items()})
      with fail_together():
        self.log.record(i, results, evaluation=True)

  def save(self, i: int) -> None:
    if i == self.saved:
      return
    with self.log.paused():
      self.check_finite()
      with fail_together():
        self.log.flush()
        if is_main():
          self.corrupt.write()
      get_state = getattr(self.batches, 'get_state', None)
      self.checkpoints.save(i, self.state, get_state() if get_state else None)
      self.saved = i

  def _stop(self, what: str, first: int, last: int):
    self.checkpoints.wait()
    steps = self.checkpoints.steps()
    good = (
      f'The last good checkpoint is step {steps[-1]}' if steps else 'There is no checkpoint yet'
    )
    raise NonFiniteError(
      f'{what} (found in the report of steps {first} to {last}). {good} in'
      f' {self.checkpoints.root}; nothing was written after it. Lower the learning rate, clip'
      ' gradients (optax.clip_by_global_norm), or look at the data of that step.'
    )


class _Stopper:
  """Turns SIGTERM and the first Ctrl-C into "stop after this step"."""

  def __init__(self):
    self.reason = ''
    self._signal = 0
    self._old: dict[int, Any] = {}

  def __enter__(self):
    # Several processes must stop after the same step. JAX's preemption service takes their SIGTERM
    # and agrees on one, so its handler stays in place.
    if jax.process_count() == 1 and threading.current_thread() is threading.main_thread():
      for number in (signal.SIGTERM, signal.SIGINT):
        self._old[number] = signal.signal(number, self._on_signal)
    return self

  def __exit__(self, *unused):
    for number, handler in self._old.items():
      signal.signal(number, handler)

  def _on_signal(self, number, frame):
    del frame
    if self._signal == signal.SIGINT == number:  # the second Ctrl-C means now
      raise KeyboardInterrupt
    self._signal = number

  def asked(self, i: int) -> bool:
    if jax.process_count() > 1:
      from jax.experimental import multihost_utils

      try:
        if multihost_utils.reached_preemption_sync_point(i):
          self._signal = signal.SIGTERM
      except RuntimeError:  # the service is switched off
        pass
    if self._signal:
      self.reason = f'{signal.Signals(self._signal).name} received'
    return bool(self._signal)

  def leave(self):
    if self._signal == signal.SIGINT:
      raise KeyboardInterrupt
    synchronize('fqjax.train.fit: terminated')
    raise SystemExit(128 + self._signal)


@jax.jit
def _all_finite(tree: PyTree) -> jax.Array:
  leaves = [x for x in jax.tree.leaves(tree) if jnp.issubdtype(x.dtype, jnp.inexact)]
  return (
    jnp.all(jnp.stack([jnp.all(jnp.isfinite(x)) for x in leaves])) if leaves else jnp.array(True)
  )
