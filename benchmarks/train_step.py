"""What a training step costs: the host's part, compilations, and DCT input against RGB.

  python -m benchmarks.train_step [--small]

Host overhead is measured with a program that does nothing but carries ResNet-50's state (every
leaf of parameters, momentum and batch statistics, donated), so it is dispatch alone. The ResNet-50
steps take equal feature maps: RGB 224 x 224 x 3 and DCT 56 x 56 x 24, and also 448 x 448 uint8
pixels turned into those 24 channels inside the step.
"""

import pathlib
import tempfile
import time

import jax
import jax.numpy as jnp
import numpy as np
import optax

from benchmarks import common
from experiments import ledger
from fqjax import data, models, ops, train

_GOAL_MS = 2.0


def resnet50_state(tx: optax.GradientTransformation) -> train.TrainState:
  """Shapes of ResNet-50's training state."""
  net = models.create_model('resnet50')

  def init():
    variables = net.init(jax.random.key(0), jnp.zeros((1, 64, 64, 3)))
    model_state = {'batch_stats': variables['batch_stats']}
    return train.create_state(variables['params'], model_state, tx, jax.random.key(0))

  return jax.eval_shape(init)


def trivial_step(mesh: jax.sharding.Mesh):
  """A state with ResNet-50's leaves, one number each, and a step that only counts."""
  tx = optax.sgd(0.1, momentum=0.9)
  shapes = resnet50_state(tx)
  state = jax.tree.map(lambda x: jnp.zeros((), jnp.float32), shapes._replace(key=shapes.step))
  state = state._replace(step=jnp.zeros((), jnp.int32), key=jax.random.key(0))
  everywhere = train.replicated_sharding(mesh)
  count = jax.jit(
    lambda state, batch: (state._replace(step=state.step + 1), {'loss': batch['x'][0]}),
    donate_argnums=0,
    in_shardings=(everywhere, train.batch_sharding(mesh)),
    out_shardings=(everywhere, everywhere),
  )
  return train.replicate(state, mesh), train.TrainStep(count, mesh)


def dispatch_milliseconds(steps: int, repeats: int) -> tuple[list[float], int]:
  """Milliseconds per call of the step, and the number of leaves."""
  mesh = train.make_mesh(1)
  state, step = trivial_step(mesh)
  batch = train.shard_batch({'x': np.zeros(1, np.float32)}, mesh)
  times = []
  for _ in range(repeats + 1):
    jax.block_until_ready(state)
    began = time.perf_counter()
    for _ in range(steps):
      state, _ = step(state, batch)
    times.append((time.perf_counter() - began) / steps * 1e3)
    jax.block_until_ready(state)
  return times[1:], len(jax.tree.leaves(state))  # the first compiles


def loop_milliseconds(steps: int, repeats: int) -> list[float]:
  """Milliseconds per step of `fit` around the trivial step: loader, placing, dispatch, reports."""

  class Clock:
    def __init__(self):
      self.seen = []

    def resume(self, step):
      pass

    def write(self, step, scalars):
      self.seen.append(time.perf_counter())

    def flush(self):
      pass

    def close(self):
      pass

  def batches():
    while True:
      yield {'x': np.zeros(1, np.float32)}

  mesh = train.make_mesh(1)
  state, step = trivial_step(mesh)
  clock, total = Clock(), steps * (repeats + 2)
  with tempfile.TemporaryDirectory() as workdir:
    train.fit(
      state, step, batches(), workdir=pathlib.Path(workdir), total_steps=total, mesh=mesh,
      log_every=steps, checkpoint_every=total, writers=[clock], progress=False,
    )  # fmt: skip
  # The last interval ends with a checkpoint.
  return list(np.diff(clock.seen)[:repeats] / steps * 1e3)


def network_step(name: str, shape: tuple[int, ...], batch_size: int, spec=None):
  """A function that runs one real step, blocking; inputs drawn once."""
  options = {'channels': 24} if name.endswith('_dct') else {}
  net = models.create_model(name, **options)
  tx = optax.sgd(0.1, momentum=0.9)

  def loss_fn(params, model_state, batch, key):
    x = batch['x']
    if spec is not None:
      x = data.preprocess(spec, x, key, train=True)
    logits, updates = net.apply(
      {'params': params, **model_state}, x, train=True, mutable=['batch_stats']
    )
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, batch['label'])
    return jnp.mean(losses), ({'batch_stats': updates['batch_stats']}, {})

  rng = np.random.default_rng(0)
  if spec is None:
    x = rng.normal(size=(batch_size, *shape)).astype(np.float32)
    inside = shape
  else:
    x = rng.integers(0, 256, size=(batch_size, *shape), dtype=np.uint8)
    inside = spec.output_shape[-3:]
  variables = jax.jit(net.init)(jax.random.key(0), jnp.zeros((1, *inside)))
  model_state = {'batch_stats': variables['batch_stats']}
  mesh = train.make_mesh(1)
  batch = train.shard_batch(
    {'x': x, 'label': rng.integers(0, 1000, size=batch_size).astype(np.int32)}, mesh
  )
  step = train.make_train_step(loss_fn, tx, mesh=mesh)
  state = train.create_state(variables['params'], model_state, tx, jax.random.key(0))
  holder = [state]

  def run():
    holder[0], metrics = step(holder[0], batch)
    return jax.block_until_ready(metrics)

  run()  # compiles
  return run


def parse_command(argv=None):
  """Arguments of a command line; raises where the program would not run."""
  parser = common.parser(__doc__, repeats=5)
  parser.add_argument('--small', action='store_true', help='tiny images, to try the program')
  parser.add_argument('--batch', type=int, default=8)
  return parser.parse_args(argv)


def main(argv=None) -> None:
  args = parse_command(argv)
  repeats = args.repeats
  rows = []

  times, leaves = dispatch_milliseconds(50 if args.small else 300, repeats)
  loop = loop_milliseconds(50 if args.small else 300, repeats)
  for name, values in (
    (f'step dispatch, {leaves} leaves', times),
    (f'fit loop, {leaves} leaves', loop),
  ):
    rows.append(
      {
        'name': f'host overhead/{name}',
        'value': float(np.median(values)),
        'unit': 'ms per step',
        'peer': None,
        'ratio': None,
        'goal': _GOAL_MS,
        'spread': ledger.standard_error(values),
      }
    )

  pixels, batch = (64, 2) if args.small else (224, args.batch)
  # Twice the pixels, an eighth of the blocks: the stem of the RGB network divides by 4.
  spec = data.InputSpec(
    kind='dct', size=2 * pixels, channels=ops.channel_subset('square24'), chroma='full'
  )
  runs = {
    'rgb': network_step('resnet50', (pixels, pixels, 3), batch),
    'dct24': network_step('resnet50_dct', (pixels // 4, pixels // 4, 24), batch),
    'dct24 from uint8 pixels': network_step(
      'resnet50_dct', (2 * pixels, 2 * pixels, 3), batch, spec
    ),
  }
  before = train.compile_count()
  seconds = common.compare(runs, repeats)
  compiled = train.compile_count() - before
  rows.append(
    {
      'name': 'compilations after the first step',
      'value': compiled,
      'unit': 'programs',
      'peer': None,
      'ratio': None,
      'goal': 0,
      'spread': None,
    }
  )
  for name in ('dct24', 'dct24 from uint8 pixels'):
    row = common.speedup_row(f'resnet50 step/{name}, batch {batch}', seconds, name, 'rgb', 1.0)
    rows.append(row | {'peer': f'rgb {pixels}'})
  common.finish(args, rows)


if __name__ == '__main__':
  main()
