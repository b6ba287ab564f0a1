"""From a dense or a pruned network to one on few levels: what the experiments on them share.

Two ways lead there, both inside the masks of a network that is pruned already: ADMM pulls the weights
to their levels and progressive mapping holds them there, a part at a time; or the loss sees levels
and its gradients reach the float weights behind them. At the end the weights are exact levels.
"""

from collections.abc import Callable
import pathlib
from typing import Any, NamedTuple

from flax.traverse_util import flatten_dict
import jax
import jax.numpy as jnp
import numpy as np

from experiments import compression as cp
from experiments.tasks import Task, Variables
import fqjax
from fqjax import files, quantize, rules, runtime, sparsity, train
from fqjax.quantize import plots

PyTree = Any

# When parts are mapped, in shares of the phase. The whole is before the last fifth: batch norm and
# biases settle around it.
_MAPPED_AT = (0.0, 0.3, 0.55, 0.8)
# What biases may be in a file.
FLOATS = ('float32', 'bfloat16', 'int8', 'int6')
_MADE: dict[str, Callable[[int, str], quantize.Quantizer]] = {
  'interval': lambda bits, per: quantize.Interval(bits, per),
  'power_of_two': lambda bits, per: quantize.PowerOfTwo(bits, per),
  'ternary': lambda bits, per: quantize.Ternary(per),
  'binary': lambda bits, per: quantize.Binary(per),
  'uniform': lambda bits, per: quantize.Uniform(bits, per, 'mse'),
}


class Quantized(NamedTuple):
  """A network on its levels.

  Attributes:
    plan: what every layer gets.
    variables: dense parameters on levels; statistics taken anew.
    codebooks: of `quantize.fit`, or trained mixtures.
    start: codebooks at the beginning.
    masks: of weights that live; None where all do.
  """

  plan: quantize.Plan
  variables: Variables
  codebooks: PyTree
  start: PyTree
  masks: PyTree = None


def quantizer(levels: str, bits: int, per: str = 'layer') -> quantize.Quantizer:
  """Levels by name.

  Args:
    levels: 'interval', 'power_of_two', 'ternary', 'binary', 'uniform'.
    bits: of a weight; 'ternary' and 'binary' have their own.
    per: 'layer' or 'channel', what shares a scale.

  Raises:
    ValueError: for another name, or bits it cannot have.
  """
  if levels not in _MADE:
    raise ValueError(f'levels={levels!r}: choose {", ".join(_MADE)}')
  return _MADE[levels](bits, per)


# ---------------------------------------------------------------------------- files


def as_file(
  model, task: Task, variables: Variables, path: pathlib.Path, floats: str = 'float32'
) -> dict[str, float]:
  """Writes the network as a file and scores what NumPy makes of it.

  Args:
    model: the network.
    task: what it is scored on.
    variables: on levels.
    path: of the file.
    floats: of biases, see `FLOATS`; rounded after what nothing reads is gone, and it is the rounded
      network that is scored.

  Returns:
    file_bytes: all of the file, header and checksums included.
    file_top1: of the file, run by NumPy, on the test items, in percent.
  """
  apply, stored = model.apply, {'params': variables.params, **variables.model_state}
  if floats != 'float32':
    small = sparsity.remove_unused(apply, stored, jnp.asarray(task.sample[:1]))
    few = lambda x: rounded(np.asarray(x), floats) if np.ndim(x) < 2 else x
    apply, stored = small.apply, jax.tree.map(few, small.variables)
  artifact = fqjax.export(apply, stored, task.sample[:1], optimize='size', progress=False)
  artifact.save(path)
  files.write_text(path.with_suffix('.txt'), artifact.report())
  assert task.elsewhere is not None
  right = task.elsewhere(runtime.load(path))['test']
  return {'file_bytes': float(path.stat().st_size), 'file_top1': 100 * float(right.mean())}


def rounded(x: np.ndarray, floats: str) -> np.ndarray:
  """An array of `FLOATS`, in its own type: integers are whole multiples of a part of its largest."""
  if floats in ('float32', 'bfloat16'):
    return np.asarray(jnp.asarray(x).astype(floats).astype(x.dtype))
  most = 2 ** (int(floats.removeprefix('int')) - 1) - 1
  step = x.dtype.type(np.abs(x).max(initial=0) / most)
  # Plus 0: -0.0 is no step.
  return np.rint(x / step).astype(x.dtype) * step + 0 if step else x


# ---------------------------------------------------------------------------- training


def by_admm(
  run: cp.Run, pull, mapping, plan: quantize.Plan, variables: Variables, masks: PyTree = None
) -> Variables:
  """Pulls the weights to their levels, then maps 50, 75, 90 and 100 % while the others retrain.

  Args:
    run: the network on its way.
    pull: an ADMM recipe.
    mapping: a recipe.
    plan: the levels of every layer.
    variables: to start from.
    masks: of a pruned network; what is dead stays dead.
  """
  target = quantize.target(plan, masks)
  pulled = cp.phase(run, 'pull', variables, pull, target=target, held=masks)
  total = round(mapping.epochs * run.task.steps_per_epoch)
  last = None
  if total:
    at = tuple(round(total * part) for part in _MAPPED_AT)
    last = rules.progressive_mapping(plan, at, masks=masks)
  return cp.phase(run, 'mapping', pulled, mapping, last=last, held=masks)


def straight_through(
  run: cp.Run, recipe, plan: quantize.Plan, variables: Variables, masks: PyTree = None
) -> Variables:
  """Trains the float weights behind the levels; arguments as in `by_admm`."""
  seen = quantize.straight_through(plan)
  inside = run._replace(task=seen_as(run.task, lambda params: seen(params, masks)))
  return cp.phase(inside, 'straight', variables, recipe, held=masks)


def seen_as(task: Task, view: Callable[[PyTree], PyTree]) -> Task:
  """The task of a network that sees `view(params)` in place of its params."""

  def loss_fn(params, model_state, batch, key):
    return task.loss_fn(view(params), model_state, batch, key)

  return task._replace(loss_fn=loss_fn)


def finish(
  run: cp.Run,
  plan: quantize.Plan,
  before: Variables,
  trained: Variables,
  *,
  masks: PyTree = None,
  start: PyTree = None,
  codebooks: PyTree = None,
) -> tuple[Quantized, dict[str, np.ndarray]]:
  """Puts a network exactly on its levels.

  Args:
    run: the network on its way.
    plan: the levels of every layer.
    before: where the training began.
    trained: where it ended.
    masks: of a pruned network.
    start: codebooks at the beginning; fitted to `before` by default.
    codebooks: at the end; fitted to `trained` by default.

  Returns:
    The network, and its scores right at the start: rounded, not trained.
  """
  if start is None:
    start = quantize.fit(plan, before.params, masks)
  if codebooks is None:
    codebooks = quantize.fit(plan, trained.params, masks)
  rounded = quantize.project(plan, before.params, masks, codebooks=start)
  cut = cp.scores(run, 'start', Variables(rounded, before.model_state))
  exact = quantize.project(plan, trained.params, masks, codebooks=codebooks)
  done = cp.settled(run, Variables(exact, trained.model_state))
  return Quantized(plan, done, codebooks, start, masks), cut


# ---------------------------------------------------------------------------- sizes


def measure(network: Quantized) -> cp.Sizes:
  """Counts the bytes of a network on its levels: values, index, codebooks, and what stayed float."""
  params, state = network.variables
  found = quantize.sizes(network.plan, params, network.masks, codebooks=network.codebooks)
  kernels = {entry.path for entry in network.plan.entries if len(entry.shape) > 1}
  return cp.network_sizes(found, kernels, state)


def weights_only(network: Quantized) -> dict[str, float]:
  """What papers count: the bits of weights that live, without index, codebooks and biases.

  Returns:
    'value_bytes', and 'compression_values', the float32 bytes of all kernels over them.
  """
  living = {} if network.masks is None else flatten_dict(network.masks, sep='/')
  weights, bits = 0, 0
  for entry in network.plan.entries:
    if len(entry.shape) < 2:
      continue
    mask = living.get(entry.path)
    live = entry.size if mask is None else int(np.sum(np.asarray(mask)))
    weights += entry.size
    bits += live * (32 if entry.quantizer is None else entry.quantizer.index_bits)
  return {'value_bytes': bits / 8, 'compression_values': 32 * weights / bits}


# ---------------------------------------------------------------------------- pictures


def largest(plan: quantize.Plan) -> str:
  """Path of the layer with the most weights among those on the setting's own levels."""
  return max(
    (e for e in plan.quantized if not isinstance(e.quantizer, quantize.Uniform) or e.shape[0] > 1),
    key=lambda e: np.prod(e.shape),
  ).path


def histogram(name: str, network: Quantized, dense: Variables) -> train.Picture:
  """Live weights of the largest layer before and after, with their levels.

  Args:
    name: of the setting.
    network: quantized.
    dense: before.
  """
  path = largest(network.plan)

  def leaf(tree):
    return flatten_dict(tree, sep='/', is_leaf=lambda _, x: not isinstance(x, dict)).get(path)

  before, after = (np.asarray(leaf(tree)) for tree in (dense.params, network.variables.params))
  if network.masks is not None and (mask := leaf(network.masks)) is not None:
    before, after = before[np.asarray(mask)], after[np.asarray(mask)]
  return train.Picture(
    f'Weights of {path}: {name}',
    plots.level_histogram(before, leaf(network.start), after, leaf(network.codebooks)),
    'Above the weights that live, with the levels they begin on; below them quantized.',
  )
