"""Sparsity: the price of a rule in a training step, masks without sorting, projections, decoding.

  python -m benchmarks.sparsity [--only step,jaxpruner,threshold,projection,decode] [--small]

step        ResNet-20 on CIFAR images, batch 128: a plain optax chain, the same and `keep_masked`, the
            same and `admm`, whose refresh is shared out over `--every` updates (an epoch of 50,000).
jaxpruner   gradual magnitude pruning against jaxpruner's algorithm: that step, and the optimizer alone
            on the weights of ResNet-50, with and without a renewal of the masks.
threshold   masks of the largest tenth of ResNet-50's weights against a sort; `--resnet50 BATCH` sets
            them beside a training step of that network, `--top-k` beside `jax.lax.top_k` too.
projection  weights per second of every structure; the ratio is the share of a plain copy's bandwidth.
decode      an LSTM's 6000 x 1500 matrix at 13x, from stored arrays to the dense matrix, per non-zero.

Contenders take turns in one process. Rows in bytes count what a call holds at most as the compiler
plans it: arguments, results and temporaries.
"""

from collections.abc import Callable, Mapping, Sequence
import functools
from typing import Any, NamedTuple

import flax.linen as nn
import jax
from jax import lax
import jax.numpy as jnp
import numpy as np
import optax

from benchmarks import common, decoders, magnitude_peer
from fqjax import models, rules
from fqjax import sparsity as sp
from fqjax.tracing import leaf_name

PARTS = ('step', 'jaxpruner', 'threshold', 'projection', 'decode')
KEEP = 0.1
NEVER = 1 << 30
_PLAIN = 'plain optax chain'


class Program(NamedTuple):
  """A compiled call and the bytes it holds at most."""

  run: Callable[[], Any]
  bytes: int


def compiled(function: Callable, *args) -> Program:
  """Compiles a function for its arguments."""
  program = jax.jit(function).lower(*args).compile()
  return Program(functools.partial(program, *args), held(program))


def held(program) -> int:
  """Bytes a call holds at most, as the compiler plans them; donated arguments count once."""
  plan = program.memory_analysis()
  total = plan.argument_size_in_bytes + plan.output_size_in_bytes + plan.temp_size_in_bytes
  return total - plan.alias_size_in_bytes


class Task(NamedTuple):
  """What is trained: `gradients(params, data)`."""

  params: Any
  data: Any
  gradients: Callable[[Any, Any], Any]


def update_program(
  task: Task, tx: optax.GradientTransformation, after: Callable = lambda params, opt_state: params
) -> Program:
  """One update after the other; `after` is what a peer has to be called with behind each."""

  def step(state, data):
    params, opt_state = state
    updates, opt_state = tx.update(task.gradients(params, data), opt_state, params)
    return after(optax.apply_updates(params, updates), opt_state), opt_state

  params = jax.tree.map(jnp.copy, task.params)  # the step donates its state
  holder = [(params, jax.jit(tx.init)(params))]
  program = jax.jit(step, donate_argnums=0).lower(holder[0], task.data).compile()

  def run():
    holder[0] = program(holder[0], task.data)
    return holder[0]

  return Program(run, held(program))


def seconds_of(programs: Mapping[str, Program], repeats: int) -> dict[str, list[float]]:
  return common.compare(
    {name: program.run for name, program in programs.items()}, repeats, warmup=2
  )


def memory_rows(title: str, programs: Mapping[str, Program], peer: str) -> list[common.Row]:
  """Bytes of every program, those of `peer` over them as the ratio."""
  rows = []
  for name, program in programs.items():
    ratio = None if name == peer else programs[peer].bytes / program.bytes
    rows.append({
      'name': f'{title}/{name}, memory', 'value': program.bytes, 'unit': 'bytes held',
      'peer': None if name == peer else peer, 'ratio': ratio, 'goal': None, 'spread': None,
    })  # fmt: skip
  return rows


# Training steps


class _Tiny(nn.Module):
  """Stands in for a network where only the program is tried."""

  @nn.compact
  def __call__(self, x, train=False):
    return nn.Dense(10, name='fc')(x.mean((1, 2)))


def network(batch: int, small: bool) -> Task:
  """ResNet-20 on one batch, in training mode."""
  net = _Tiny() if small else models.create_model('cifar_resnet20')
  rng = np.random.default_rng(0)
  side = 8 if small else 32
  x = jnp.asarray(rng.standard_normal((batch, side, side, 3), np.float32))
  labels = jnp.asarray(rng.integers(0, 10, batch), jnp.int32)
  variables = jax.jit(net.init)(jax.random.key(0), x[:1])
  state = {k: v for k, v in variables.items() if k != 'params'}

  def loss(params, data):
    x, labels = data
    # Running statistics are computed and dropped: nobody evaluates.
    logits, _ = net.apply({'params': params, **state}, x, train=True, mutable=['batch_stats'])
    return jnp.mean(optax.softmax_cross_entropy_with_integer_labels(logits, labels))

  return Task(variables['params'], (x, labels), jax.grad(loss))


def plan_of(params) -> sp.Plan:
  return sp.make_plan(params, [('.*kernel', sp.Unstructured(keep=KEEP))])


def step_rows(args) -> list[common.Row]:
  batch = 4 if args.small else args.batch
  task = network(batch, args.small)
  plan, sgd = plan_of(task.params), optax.sgd(0.1, momentum=0.9)
  masks = rules.finalize(plan, task.params)[1]
  chains = {
    _PLAIN: sgd,
    'keep_masked': optax.chain(sgd, rules.keep_masked(masks)),
    'admm': optax.chain(rules.admm(plan, 1e-3, NEVER), sgd),
    'admm, refreshing': optax.chain(rules.admm(plan, 1e-3, 1), sgd),
  }
  programs = {name: update_program(task, tx) for name, tx in chains.items()}
  seconds = seconds_of(programs, args.repeats)
  # One update in `every` refreshes.
  seconds['admm'] = [
    a + (b - a) / args.every
    for a, b in zip(seconds['admm'], seconds['admm, refreshing'], strict=True)
  ]
  title = f'step/batch {batch}'
  rows = [plain_row(f'{title}/{_PLAIN}', seconds[_PLAIN])]
  for name, goal in (('keep_masked', 1 / 1.05), ('admm', 1 / 1.15), ('admm, refreshing', None)):
    label = f'{title}/{name}' + f', a refresh in {args.every}' * (name == 'admm')
    rows.append(common.speedup_row(label, seconds, name, _PLAIN, goal))
  del programs['admm, refreshing']
  return rows + memory_rows(title, programs, _PLAIN)


def plain_row(name: str, seconds: Sequence[float]) -> common.Row:
  """Milliseconds without anything to compare them with."""
  value = float(np.median(seconds)) * 1e3
  return dict(name=name, value=value, unit='ms', peer=None, ratio=None, goal=None, spread=None)


# jaxpruner


def pruner_programs(task: Task, begin: int) -> dict[str, Program]:
  """Gradual pruning of ours and of the peer."""
  plan, end = plan_of(task.params), 2 * NEVER - 2
  pruned = {entry.path for entry in plan.pruned}
  keep = jax.tree_util.tree_map_with_path(
    lambda path, _: KEEP if leaf_name(path) in pruned else None, task.params
  )
  settings = dict(begin=begin, end=end, every=1)
  sgd = optax.sgd(0.1, momentum=0.9)
  programs = {'fqjax': update_program(task, rules.gradual(sgd, plan, **settings))}
  ways = {'argsort, as published': magnitude_peer.by_argsort, 'sort': magnitude_peer.by_sort}
  # Where no masks are made, the ways to make them are one.
  for way, top in list(ways.items())[: 1 if begin else None]:
    tx, after = magnitude_peer.magnitude_pruning(sgd, keep, top=top, **settings)
    programs[f'jaxpruner by {way}'] = update_program(task, tx, after)
  return programs


def jaxpruner_rows(args) -> list[common.Row]:
  batch = 4 if args.small else args.batch
  weights = resnet50_weights(args.small)
  alone = Task(weights, jax.tree.map(jnp.sin, weights), lambda params, data: data)
  cases = {
    f'step, batch {batch}': (network(batch, args.small), NEVER),
    f'update of {_size(weights)} weights': (alone, NEVER),
    f'renewal of {_size(weights)} masks': (alone, 0),
  }
  rows = []
  for title, (task, begin) in cases.items():
    programs = pruner_programs(task, begin)
    seconds = seconds_of(programs, args.repeats)
    peer = common.fastest(seconds, [n for n in seconds if n != 'fqjax'])
    rows.append(common.speedup_row(f'jaxpruner/{title}', seconds, 'fqjax', peer))
    used = {n: programs[n] for n in ('fqjax', peer)}
    rows += memory_rows(f'jaxpruner/{title}', used, peer)
  return rows


# Thresholds


def resnet50_weights(small: bool) -> dict[str, jax.Array]:
  """Random numbers in the shapes of ResNet-50's kernels."""
  if small:
    shapes = {'kernel': (3, 3, 8, 16)}
  else:
    net = models.create_model('resnet50')
    variables = jax.eval_shape(net.init, jax.random.key(0), jnp.zeros((1, 64, 64, 3)))
    found = jax.tree_util.tree_leaves_with_path(variables['params'])
    shapes = {leaf_name(path): x.shape for path, x in found if x.ndim > 1}
  rng = np.random.default_rng(0)
  return {k: jnp.asarray(rng.standard_normal(s, np.float32)) for k, s in shapes.items()}


def _size(leaves) -> str:
  count = sum(x.size for x in jax.tree.leaves(leaves))
  return f'{count / 1e6:.1f} M' if count >= 1e6 else f'{count}'


def mask_contenders(top_k: bool) -> dict[str, Callable]:
  def kept(w):
    return max(1, round(KEEP * w.size))

  def sort(w):
    return jnp.abs(w) >= jnp.sort(jnp.abs(w).reshape(-1))[w.size - kept(w)]

  def largest(w):
    return jnp.abs(w) >= lax.top_k(jnp.abs(w).reshape(-1), kept(w))[0][-1]

  found = {'fqjax': lambda w: sp.top_k_mask(jnp.abs(w), kept(w)), 'jnp.sort': sort}
  return found | ({'jax.lax.top_k': largest} if top_k else {})


def threshold_rows(args) -> list[common.Row]:
  weights = resnet50_weights(args.small)
  flat = {'all': jnp.concatenate([w.reshape(-1) for w in weights.values()])}
  rows = []
  for title, tree in (('leaf by leaf', weights), ('all in one', flat)):
    programs = {
      name: compiled(lambda tree, mask=mask: jax.tree.map(mask, tree), tree)
      for name, mask in mask_contenders(args.top_k).items()
    }
    check_masks(tree, {name: program.run() for name, program in programs.items()})
    peers = [name for name in programs if name != 'fqjax']
    if title == 'leaf by leaf' and args.resnet50:
      from benchmarks import train_step

      shape = (64, 64, 3) if args.small else (224, 224, 3)
      run = train_step.network_step('resnet50', shape, args.resnet50)
      programs[f'step of ResNet-50, batch {args.resnet50}'] = Program(run, 0)
      peers.append(f'step of ResNet-50, batch {args.resnet50}')
    seconds = seconds_of(programs, args.repeats)
    title = f'threshold/{title}, {_size(weights)}'
    for peer in peers:
      goal = 8.0 if peer == 'jnp.sort' else None
      rows.append(common.speedup_row(f'{title}, against {peer}', seconds, 'fqjax', peer, goal))
    rows += memory_rows(title, {n: programs[n] for n in ('fqjax', 'jnp.sort')}, 'jnp.sort')
  return rows


def check_masks(weights, masks: Mapping[str, Any]) -> None:
  """Stops unless all masks end at the same magnitude and keep as many, but for ties there."""
  for path, w in weights.items():
    size = np.abs(np.asarray(w))
    ours, *others = (np.asarray(tree[path]) for tree in masks.values())
    least = size[ours].min()
    for other in others:
      if not ((size > least) == (other & (size > least))).all() or size[other].min() != least:
        raise RuntimeError(f'{path}: the contenders {", ".join(masks)} keep other weights.')


# Projections


def structures(outputs: int) -> dict[str, sp.Structure]:
  both = sp.pattern_set('elog4+corner4')
  return {
    'unstructured': sp.Unstructured(keep=KEEP),
    '2:4': sp.NM(2, 4),
    'blocks of 4x4': sp.Blocks(4, 4, keep=KEEP),
    'filters': sp.Filters(keep=0.5),
    'columns': sp.Columns(keep=0.3),
    'block-punched': sp.BlockPunched(keep=0.3),
    'filters and columns': sp.Both(sp.Filters(keep=0.5), sp.Columns(keep=0.5)),
    'block maxima of 16': sp.BlockMax(16),
    'DARB': sp.Darb(tuple(1 + i % 6 for i in range(outputs))),
    'banks of 16': sp.Bank(16, tuple(i % 4 for i in range(outputs))),
    '8 patterns': sp.Patterns(both),
    '8 patterns, a third of the kernels': sp.Patterns(both, keep=1 / 3),
    '126 patterns': sp.Patterns(sp.pattern_set('any4')),
  }


def projection_rows(args) -> list[common.Row]:
  shape = (3, 3, 8, 16) if args.small else (3, 3, 512, 512)
  w = np.random.default_rng(0).standard_normal(shape, np.float32)
  device = jnp.asarray(w)
  programs = {
    name: compiled(lambda w, s=structure: s.project(w, 'HWIO'), device)
    for name, structure in structures(shape[3]).items()
  }
  seconds = common.compare(
    {**{name: p.run for name, p in programs.items()}, common.COPY: common.copier(w)}, args.repeats
  )
  rows = []
  for name, program in programs.items():
    row = common.speedup_row(f'projection/{name}', seconds, name, common.COPY)
    rows.append(row | {'value': w.size / float(np.median(seconds[name])), 'unit': 'weights/s'})
    times = program.bytes / w.nbytes
    print(f'{name}: holds {times:.1f} times the bytes of the weights')
  return rows


# Decoding


def decode_rows(args) -> list[common.Row]:
  found, dense = decoders.stored_matrices(args.small)
  for name, ways in found.items():
    for way, run in ways.items():
      if not np.array_equal(dense[name], run()):
        raise RuntimeError(f'{name}, {way}: the decoded matrix is another one.')
  contenders = {f'{n}, {way}': run for n, ways in found.items() for way, run in ways.items()}
  seconds = common.compare(contenders, args.repeats)
  each, way_of = {}, {}
  for name, ways in found.items():
    way_of[name] = common.fastest(seconds, [f'{name}, {way}' for way in ways])
    each[name] = [s / np.count_nonzero(dense[name]) for s in seconds[way_of[name]]]
  pairs = [(name, 'CSR') for name in found if name != 'CSR']
  pairs += [('DARB', 'blocks of 4x4'), ('DARB', 'blocks of 1x4')]
  rows = [
    common.speedup_row(f'decode/{way_of[a]}, against {way_of[b]}', each, a, b) for a, b in pairs
  ]
  for row, (name, _) in zip(rows, pairs, strict=True):
    row |= {'value': 1e-9 / float(np.median(each[name])), 'unit': 'non-zeros/ns'}
  return rows


def parse_command(argv=None):
  """Arguments of a command line; raises where the program would not run."""
  parser = common.parser(__doc__)
  parser.add_argument('--only', default=','.join(PARTS), help='parts to run, by comma')
  parser.add_argument('--small', action='store_true', help='tiny sizes, to try the program')
  parser.add_argument('--batch', type=int, default=128, help='images of a step of ResNet-20')
  parser.add_argument('--every', type=int, default=390, help='updates between refreshes of ADMM')
  parser.add_argument('--resnet50', type=int, default=0, metavar='BATCH')
  parser.add_argument('--top-k', action='store_true', help='jax.lax.top_k is a contender too')
  args = parser.parse_args(argv)
  args.only = args.only.split(',')
  if unknown := set(args.only) - set(PARTS):
    parser.error(f'--only: there is no {sorted(unknown)[0]!r}; parts are {", ".join(PARTS)}')
  if args.every < 1:
    parser.error(f'--every {args.every}: at least 1')
  return args


def main(argv=None) -> None:
  args = parse_command(argv)
  parts = {
    'step': step_rows, 'jaxpruner': jaxpruner_rows, 'threshold': threshold_rows,
    'projection': projection_rows, 'decode': decode_rows,
  }  # fmt: skip
  rows = [row for part in args.only for row in parts[part](args)]
  metrics = {row['name']: 'step_time' for row in rows if row['unit'] == 'ms' and not row['peer']}
  common.finish(args, rows, metrics=metrics)


if __name__ == '__main__':
  main()
