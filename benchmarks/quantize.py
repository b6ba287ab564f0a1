"""Quantization: the price of mixtures and of calibration, and what sparse kernels save.

  python -m benchmarks.quantize [--only step,start,memory,calibration,sparse_kernel] [--small]

step     ResNet-20 on CIFAR images, batch 128, every kernel a mixture of 16 components: the float step,
         soft weights (exact gradients to everything), and straight-through ones.
start    mixtures of ResNet-50's kernels from random numbers in their shapes: seconds of the whole.
memory   bytes that the training step of ResNet-50 holds at most as the compiler plans it, batch 8,
         224x224, float and with mixtures; nothing is run.
calibration
         MobileNetV2 with its batch norm folded, 224x224, batch 8: a batch of calibration of all
         activations against plain inference of the same graph on the same batch.
sparse_kernel
         matrices of LeNet-5 and ResNet-20, unstructured zeros as SciPy's compressed sparse rows and
         smaller dense matrices (filters and columns) against the dense product of the BLAS, one
         thread each. `break-even` is the rate from which on a product is faster than the dense one,
         `rate per speed-up` is 1 where every weight left away saves its time.

Contenders take turns in one process.
"""

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from benchmarks import common, sparsity
from fqjax import models, quantize, tracing
from fqjax.exporter import passes
from fqjax.quantize._observe import compiled_pass, ends_and_samples, watching
from fqjax.tracing import leaf_name

PARTS = ('step', 'start', 'memory', 'calibration', 'sparse_kernel')
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


def frozen(small: bool) -> tuple[Any, np.ndarray]:
  """A network as a frozen graph, and a batch of what it takes."""
  net = models.create_model('lenet5') if small else models.create_model('mobilenet_v2')
  shape = (2, 28, 28, 1) if small else (8, 224, 224, 3)
  x = np.random.default_rng(0).standard_normal(shape, np.float32)
  variables = jax.jit(net.init)(jax.random.key(0), x[:1])
  return passes.freeze(tracing.to_graph(net.apply, variables, x), variables), x


def calibration_rows(args) -> list[common.Row]:
  graph, x = frozen(args.small)
  names = quantize.activations(graph)
  states, watch = watching(graph, names)
  infer, arrays = compiled_pass(graph, graph.outputs, lambda values: values)
  seconds = common.compare(
    {'inference': lambda: infer(arrays, (x,)), 'calibration': lambda: watch(states, x)},
    args.repeats,
    warmup=2,
  )
  title = f'calibration/batch {len(x)}, {len(names)} tensors'
  rows = [
    sparsity.plain_row(f'{title}/inference', seconds['inference']),
    common.speedup_row(f'{title}/calibration', seconds, 'calibration', 'inference', 0.8),
  ]
  # What calibration holds besides, the bytes of the samples of a batch among it.
  look, _ = compiled_pass(graph, names, ends_and_samples)
  programs = {
    name: sparsity.held(call.lower(arrays, (x,)).compile())
    for name, call in (('inference', infer), ('calibration', look))
  }
  for name, size in programs.items():
    ratio = None if name == 'inference' else programs['inference'] / size
    rows.append({
      'name': f'{title}/{name}, memory', 'value': size, 'unit': 'bytes held',
      'peer': None if ratio is None else 'inference', 'ratio': ratio, 'goal': None, 'spread': None,
    })  # fmt: skip
  return rows


# name -> matrix [inputs, outputs] and columns it is applied to: one image, or a batch of places.
MATRICES = {
  'LeNet-5 fc1, 1 image': (800, 500, 1),
  'LeNet-5 fc1, 64 images': (800, 500, 64),
  'ResNet-20 3x3x64x64, 64 places': (576, 64, 64),
}
RATES = (4, 8, 16, 36, 71, 348)


def sparse_kernel_rows(args) -> list[common.Row]:
  sparse = common.import_peer('scipy.sparse')
  # The sparse product of SciPy has one thread.
  with common.import_peer('threadpoolctl').threadpool_limits(1):
    rows = []
    matrices = {'small, 1 image': (16, 8, 1)} if args.small else MATRICES
    for name, (inputs, outputs, places) in matrices.items():
      rows += kernel_rows(sparse, name, inputs, outputs, places, args.repeats)
  return rows


def kernel_rows(sparse, name, inputs, outputs, places, repeats) -> list[common.Row]:
  """Dense, sparse and smaller dense products of one matrix at every rate."""
  rng = np.random.default_rng(0)
  shape = (inputs,) if places == 1 else (inputs, places)
  x, w = (rng.standard_normal(s, np.float32) for s in (shape, (outputs, inputs)))
  contenders = {'dense': repeated(w, x)}
  for rate in RATES:
    zeros = np.where(rng.random(w.shape) < 1 / rate, w, 0)
    contenders[f'{rate}x sparse rows'] = repeated(sparse.csr_array(zeros), x)
    o, i = (max(1, round(n / math.sqrt(rate))) for n in (outputs, inputs))
    contenders[f'{rate}x filters and columns'] = repeated(
      np.ascontiguousarray(w[:o, :i]), np.ascontiguousarray(x[:i])
    )
  seconds = common.compare(contenders, repeats, warmup=2)
  seconds = {key: [t / CALLS for t in times] for key, times in seconds.items()}
  title, rows = f'sparse_kernel/{name}', []
  for kind in ('sparse rows', 'filters and columns'):
    speedups = []
    for rate in RATES:
      key = f'{rate}x {kind}'
      rows.append(common.speedup_row(f'{title}/{key}', seconds, key, 'dense'))
      speedups.append(rows[-1]['ratio'])
      rows.append(rate_row(f'{title}/{key}, rate per speed-up', rate / speedups[-1]))
    found = break_even(RATES, speedups)
    if found is not None:
      rows.append(rate_row(f'{title}/{kind}, break-even', found))
  return rows


# Products of one timed call: one alone takes microseconds.
CALLS = 20


def repeated(matrix, x):
  """A function that computes the product so often that it can be timed."""

  def run():
    for _ in range(CALLS):
      y = matrix @ x
    return y

  return run


def break_even(rates, speedups) -> float | None:
  """The rate from which on the speed-up stays above 1, interpolated in logarithms; None if none."""
  below = [k for k, speedup in enumerate(speedups) if speedup <= 1]
  if not below:
    return float(rates[0])
  k = below[-1]
  if k + 1 == len(rates):
    return None
  a, b = math.log(speedups[k]), math.log(speedups[k + 1])
  part = -a / (b - a)
  return float(rates[k] * (rates[k + 1] / rates[k]) ** part)


def rate_row(name: str, value: float) -> common.Row:
  return dict(name=name, value=value, unit='x', peer=None, ratio=None, goal=None, spread=None)


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
  programs = {
    'step': step_rows, 'start': start_rows, 'memory': memory_rows,
    'calibration': calibration_rows, 'sparse_kernel': sparse_kernel_rows,
  }  # fmt: skip
  rows = [row for part in args.only for row in programs[part](args)]
  metrics: dict[str, str | None] = {
    row['name']: 'step_time' for row in rows if row['unit'] == 'ms' and not row['peer']
  }
  # What follows from rows that are recorded is printed only.
  metrics |= {
    row['name']: 'needed_rate' if row['name'].endswith('break-even') else None
    for row in rows
    if row['unit'] == 'x'
  }
  common.finish(args, rows, metrics=metrics)


if __name__ == '__main__':
  main()
