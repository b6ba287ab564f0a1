"""Mixtures: their price in a training step, in time and in memory, and how long they take to start.

  python -m benchmarks.quantize [--only step,start,memory] [--small]

step     ResNet-20 on CIFAR images, batch 128, every kernel a mixture of 16 components: the float step,
         soft weights (exact gradients to everything), and straight-through ones.
start    mixtures of ResNet-50's kernels from random numbers in their shapes: seconds of the whole.
memory   bytes that the training step of ResNet-50 holds at most as the compiler plans it, batch 8,
         224x224, float and with mixtures; nothing is run.

Contenders take turns in one process.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import optax

from benchmarks import common, sparsity
from fqjax import models, quantize
from fqjax.tracing import leaf_name

PARTS = ('step', 'start', 'memory')
COMPONENTS = 16
_FLOAT = 'float'
MODES = ('soft', 'ste')


def plan_of(params) -> quantize.Plan:
  return quantize.make_plan(params, [('.*kernel', quantize.Mixture(COMPONENTS))])


def mixed(task: sparsity.Task, codebooks: Any, mode: str) -> sparsity.Task:
  """The same task for `{'params', 'codebooks'}`."""

  def gradients(both, data):
    seen, backward = jax.vjp(
      lambda both: quantize.effective_params(both['params'], both['codebooks'], mode), both
    )
    return backward(task.gradients(seen, data))[0]

  return sparsity.Task({'params': task.params, 'codebooks': codebooks}, task.data, gradients)


def step_rows(args) -> list[common.Row]:
  batch = 4 if args.small else args.batch
  task, sgd = sparsity.network(batch, args.small), optax.sgd(0.01, momentum=0.9)
  codebooks = quantize.init_dgms(task.params, plan_of(task.params))
  programs = {_FLOAT: sparsity.update_program(task, sgd)}
  for mode in MODES:
    programs[mode] = sparsity.update_program(mixed(task, codebooks, mode), sgd)
  seconds = sparsity.seconds_of(programs, args.repeats)
  title = f'step/batch {batch}, K = {COMPONENTS}'
  rows = [sparsity.plain_row(f'{title}/{_FLOAT}', seconds[_FLOAT])]
  for mode in MODES:
    goal = 1 / 1.3 if mode == 'soft' else None
    rows.append(common.speedup_row(f'{title}/{mode}', seconds, mode, _FLOAT, goal))
  return rows + sparsity.memory_rows(title, programs, _FLOAT)


def start_rows(args) -> list[common.Row]:
  weights = sparsity.resnet50_weights(args.small)
  start = functools.partial(quantize.init_dgms, weights, plan_of(weights))
  # Once: there is nothing to warm up, and nobody starts twice.
  seconds = common.compare({'start': start}, 1, warmup=0)['start']
  count = sum(w.size for w in weights.values())
  return [
    {
      'name': f'start/{count / 1e6:.1f} M weights, K = {COMPONENTS}', 'value': seconds[0],
      'unit': 's', 'peer': None, 'ratio': None, 'goal': 20.0, 'spread': None,
    }
  ]  # fmt: skip


def abstract_mixtures(params) -> Any:
  """What `init_dgms` gives, without numbers."""
  one = quantize.Mixture(COMPONENTS).start(jnp.zeros(1))
  leaf = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), one)
  paths = {entry.path for entry in plan_of(params).quantized}
  return jax.tree_util.tree_map_with_path(
    lambda path, _: leaf if leaf_name(path) in paths else None, params
  )


def network(batch: int, small: bool) -> sparsity.Task:
  """ResNet-50 in training mode, without numbers; small, LeNet-5."""
  net = models.create_model('lenet5' if small else 'resnet50')
  shape = (28, 28, 1) if small else (224, 224, 3)
  x = jax.ShapeDtypeStruct((batch, *shape), jnp.float32)
  variables = jax.eval_shape(net.init, jax.random.key(0), x)
  state = {k: v for k, v in variables.items() if k != 'params'}

  def loss(params, data):
    x, labels, state = data
    logits, new = net.apply({'params': params, **state}, x, train=True, mutable=['batch_stats'])
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
    return jnp.mean(losses), new

  def gradients(params, data):
    return jax.grad(loss, has_aux=True)(params, data)[0]

  data = x, jax.ShapeDtypeStruct((batch,), jnp.int32), state
  return sparsity.Task(variables['params'], data, gradients)


def planned_bytes(task: sparsity.Task, tx: optax.GradientTransformation) -> int:
  """Bytes of one update; see `sparsity.held`."""

  def step(state, data):
    params, opt_state = state
    updates, opt_state = tx.update(task.gradients(params, data), opt_state, params)
    return optax.apply_updates(params, updates), opt_state

  state = task.params, jax.eval_shape(tx.init, task.params)
  return sparsity.held(jax.jit(step, donate_argnums=0).lower(state, task.data).compile())


def memory_rows(args) -> list[common.Row]:
  batch = 32 if args.small else 8
  task, sgd = network(batch, args.small), optax.sgd(0.01, momentum=0.9)
  codebooks = abstract_mixtures(task.params)
  sizes = {_FLOAT: planned_bytes(task, sgd)}
  for mode in MODES:
    sizes[mode] = planned_bytes(mixed(task, codebooks, mode), sgd)
  rows = []
  for name, size in sizes.items():
    against = name != _FLOAT
    rows.append({
      'name': f'memory/batch {batch}, K = {COMPONENTS}/{name}', 'value': size,
      'unit': 'bytes held', 'peer': _FLOAT if against else None,
      'ratio': sizes[_FLOAT] / size if against else None,
      'goal': 1 / 1.5 if name == 'soft' else None, 'spread': None,
    })  # fmt: skip
  return rows


def parse_command(argv=None):
  """Arguments of a command line; raises where the program would not run."""
  parser = common.parser(__doc__)
  parser.add_argument('--only', default=','.join(PARTS), help='parts to run, by comma')
  parser.add_argument('--small', action='store_true', help='tiny sizes, to try the program')
  parser.add_argument('--batch', type=int, default=128, help='images of a step of ResNet-20')
  args = parser.parse_args(argv)
  args.only = args.only.split(',')
  if unknown := set(args.only) - set(PARTS):
    parser.error(f'--only: there is no {sorted(unknown)[0]!r}; parts are {", ".join(PARTS)}')
  return args


def main(argv=None) -> None:
  args = parse_command(argv)
  parts = {'step': step_rows, 'start': start_rows, 'memory': memory_rows}
  rows = [row for part in args.only for row in parts[part](args)]
  metrics = {row['name']: 'step_time' for row in rows if row['unit'] == 'ms' and not row['peer']}
  common.finish(args, rows, metrics=metrics)


if __name__ == '__main__':
  main()
