"""A small training run as a process of its own, to be killed and started again.

  python -m tests.train.kill_target WORKDIR [--steps 40] [--every 4] [--delay 0.0] ...

Writes the final parameters to WORKDIR/final.npz.
"""

import argparse
import os
import pathlib
import time

parser = argparse.ArgumentParser()
parser.add_argument('workdir', type=pathlib.Path)
parser.add_argument('--steps', type=int, default=40)
parser.add_argument('--every', type=int, default=4)
parser.add_argument('--log-every', type=int, default=2)
parser.add_argument('--delay', type=float, default=0.0, help='seconds a step takes at least')
parser.add_argument('--devices', type=int, default=1)
parser.add_argument('--size', type=int, default=0, help='floats of ballast in the model state')
parser.add_argument('--file-limit', type=int, help='bytes a file may have from --limit-at on')
parser.add_argument('--limit-at', type=int, default=0, help='step at which the limit begins')
parser.add_argument('--limit-on', type=int, help='the one process that has the limit')
parser.add_argument('--no-manifest', action='store_true', help='step 8 cannot be marked complete')
parser.add_argument('--nan-at', type=int)
parser.add_argument('--damaged', type=int, default=0, help='batches per undecodable sample')
parser.add_argument('--seed-per-process', action='store_true', help='a mistake on purpose')
parser.add_argument('--coordinator')
parser.add_argument('--processes', type=int, default=1)
parser.add_argument('--process', type=int, default=0)


def main():
  args = parser.parse_args()
  os.environ['JAX_PLATFORMS'] = 'cpu'
  os.environ['XLA_FLAGS'] = (
    f'--xla_force_host_platform_device_count={args.devices}'
    ' --xla_backend_optimization_level=0'  # compiles faster
  )

  from fqjax.train import fit, initialize_distributed, make_mesh

  if args.coordinator:
    initialize_distributed(args.coordinator, args.processes, args.process, timeout=60)

  import jax
  import jax.numpy as jnp
  import numpy as np

  from tests.train import toy

  mesh = make_mesh()
  state, step = toy.setup(mesh, seed=args.process if args.seed_per_process else 0)
  if args.size:
    ballast = np.random.default_rng(0).normal(size=args.size).astype(np.float32)
    params = state.params | {'ballast': jnp.asarray(ballast)}
    state, step = toy.setup(mesh, params=params)

  def slow_step(state, batch):
    limited = args.limit_on in (None, args.process)
    if args.file_limit and limited and int(state.step) >= args.limit_at:
      import resource
      import signal

      while not any(args.workdir.glob('checkpoints/*/fqjax.json')):
        time.sleep(0.01)  # the checkpoint before it is still being written
      signal.signal(signal.SIGXFSZ, signal.SIG_IGN)  # writing fails with EFBIG, as on a full disk
      resource.setrlimit(resource.RLIMIT_FSIZE, (args.file_limit, args.file_limit))
    time.sleep(args.delay)
    return step(state, batch)

  if args.no_manifest:
    from fqjax.train import checkpoint

    write = checkpoint._write_manifest

    def fails(path, manifest):
      if manifest['step'] == 8:
        raise OSError(5, 'Input/output error')
      write(path, manifest)

    checkpoint._write_manifest = fails

  result = fit(
    state,
    slow_step,
    toy.Loader(
      process=args.process,
      processes=args.processes,
      bad_step=args.nan_at,
      damaged=args.damaged,
    ),
    workdir=args.workdir,
    total_steps=args.steps,
    mesh=mesh,
    log_every=args.log_every,
    checkpoint_every=args.every,
    keep=2,
    progress=False,
  )
  if jax.process_index() == 0:
    np.savez(args.workdir / 'final.npz', **toy.leaves(result.state))


if __name__ == '__main__':
  main()
