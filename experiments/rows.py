"""Pictures of the rows of pruned matrices: how dense they stayed, what they are worth, where."""

from collections.abc import Collection, Mapping
import itertools

from flax.traverse_util import flatten_dict, unflatten_dict
import jax
import numpy as np

from experiments import compression as cp
from experiments import tasks
from fqjax import sparsity, train
from fqjax.sparsity import plots

# Shares of the survivors of a group of rows that `sensitivity` takes away.
FRACTIONS = (0.25, 0.5, 1.0)


def pictures(
  rungs: Mapping[str, cp.Rung], task: tasks.Task, rate: str, free: Collection[str]
) -> list[train.Picture]:
  """What DARB looks at in unstructured matrices, and what structures make of the largest one.

  Args:
    rungs: setting -> network.
    task: to measure what rows are worth; without dropout.
    rate: of the networks, for titles.
    free: settings of `rungs` without structure.
  """
  out = []
  for name, rung in rungs.items():
    largest, masks = max(rung.plan.pruned, key=lambda e: e.size), flatten_dict(rung.masks, sep='/')
    if name in free:
      rows = {
        entry.path: sparsity.to_rows(np.asarray(masks[entry.path]), entry.layout)
        for entry in rung.plan.pruned
      }
      change, density = sensitivity(task, rung, largest)
      out += [
        train.Picture(
          f'Spread of row densities, {name} {rate}',
          plots.row_densities(rows),
          'How dense each row of each matrix stayed; even rows would be level lines.',
        ),
        train.Picture(
          f'Sensitivity of rows, {name} {rate}',
          plots.row_sensitivity(change, density, fractions=FRACTIONS, what='change of loss'),
          f'{largest.path}: rows in {len(change)} groups of like density; by how much the loss on '
          'training batches rises when a share of the survivors of one group is taken, the '
          'smallest first.',
        ),
      ]
    figure = plots.survivors(np.asarray(masks[largest.path]), largest.layout)
    out.append(train.Picture(f'Positions of survivors, {name} {rate}: {largest.path}', figure))
  return out


def sensitivity(
  task: tasks.Task, rung: cp.Rung, entry: sparsity.Entry, groups: int = 16, batches: int = 4
) -> tuple[np.ndarray, np.ndarray]:
  """What the loss gains when a group of rows loses a share of its survivors, smallest first.

  Args:
    task: without dropout.
    rung: a pruned network.
    entry: the matrix.
    groups: of rows with like density.
    batches: of training, to measure the loss on.

  Returns:
    Changes [groups, FRACTIONS] and mean densities [groups], from the emptiest to the densest.
  """
  params = flatten_dict(rung.variables.params, sep='/')
  rows = np.asarray(sparsity.to_rows(params[entry.path], entry.layout))
  data = list(itertools.islice(task.loader(0), batches))

  @jax.jit
  def loss_of(rows):
    w = sparsity.from_rows(rows, entry.layout, entry.shape)
    changed = unflatten_dict({**params, entry.path: w}, sep='/')
    state, total = rung.variables.model_state, 0.0
    for batch in data:
      loss, (state, _) = task.loss_fn(changed, state, batch, jax.random.key(0))
      total += loss / len(data)
    return total

  density = np.mean(rows != 0, 1)
  parts = np.array_split(np.argsort(density, kind='stable'), min(groups, len(rows)))
  # Rank of each survivor within its row, 0 the smallest; zeros come before.
  ranks = np.argsort(np.argsort(np.abs(rows), 1, kind='stable'), 1)
  ranks -= (rows == 0).sum(1, keepdims=True)
  before, change = float(loss_of(rows)), []
  for part in parts:
    count = (rows[part] != 0).sum(1, keepdims=True)
    for share in FRACTIONS:
      less = rows.copy()
      less[part] = np.where(ranks[part] < share * count, 0, rows[part])
      change.append(float(loss_of(less)) - before)
  return np.reshape(change, (len(parts), -1)), np.array([density[p].mean() for p in parts])
