"""Bytes a training step exchanges between devices, read from the compiled program.

  python -m benchmarks.collectives [--models cifar_resnet20,resnet50] [--devices 1,2,4,...,256]
  python -m benchmarks.collectives --write docs/pods.md

Compiles the step for simulated devices (a process per count; nothing runs) and adds up the operands
of its collectives. `--write` replaces the table between the markers of a Markdown file; `--record`
keeps the totals of 8 and of 256 devices.
"""

import json
import os
import pathlib
import re
import subprocess
import sys

import numpy as np

from benchmarks import common

_WIDTH = {'pred': 1, 's8': 1, 'u8': 1, 'bf16': 2, 'f16': 2, 's32': 4, 'u32': 4, 'f32': 4}
_WIDTH |= {'s64': 8, 'u64': 8, 'f64': 8}
_SHAPE = re.compile(r'(\w+)\[([\d,]*)\]')
_COLLECTIVE = re.compile(
  r'= (.*?) (all-reduce|all-gather|reduce-scatter|all-to-all|collective-permute)(?:-start)?\('
)
_RECORDED = (8, 256)
_BEGIN, _END = '<!-- collectives: begin -->', '<!-- collectives: end -->'


def collective_bytes(hlo: str) -> dict[str, int]:
  """Adds up the result bytes per device of every collective in a compiled program's text.

  For an all-reduce, of which data-parallel training consists, results and operands are the same
  size. Asynchronous pairs count once (the `-start`).

  Example:
    >>> collective_bytes('%r = (f32[2,3]{1,0}, f32[]) all-reduce(%a, %b), replica_groups={}')
    {'all-reduce': 28}
  """
  total: dict[str, int] = {}
  for result, kind in _COLLECTIVE.findall(hlo):
    size = sum(
      int(np.prod([int(d) for d in dims.split(',') if d])) * _WIDTH[dtype]
      for dtype, dims in _SHAPE.findall(result)
    )
    total[kind] = total.get(kind, 0) + size
  return total


def compile_step(model: str, devices: int, per_device: int, grouped: bool) -> dict:
  """Compiles one step for the devices of this process; returns its collectives."""
  import jax
  import jax.numpy as jnp
  import optax

  from fqjax import models, train

  small = model.startswith('cifar')
  shape = {True: (32, 32, 3), False: (224, 224, 3)}[small]
  if model.endswith('_dct'):
    shape = (8, 8, 24) if small else (56, 56, 24)
  options = {'channels': 24} if model.endswith('_dct') else {}
  net = models.create_model(model, norm_groups=devices if grouped else 1, **options)
  tx = optax.sgd(0.1, momentum=0.9)

  def loss_fn(params, model_state, batch, key):
    del key
    logits, updates = net.apply(
      {'params': params, **model_state}, batch['x'], train=True, mutable=['batch_stats']
    )
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, batch['label'])
    return jnp.mean(losses), ({'batch_stats': updates['batch_stats']}, {})

  def init():
    variables = net.init(jax.random.key(0), jnp.zeros((1, *shape)))
    state = {'batch_stats': variables['batch_stats']}
    return train.create_state(variables['params'], state, tx, jax.random.key(0))

  state = jax.eval_shape(init)
  n = devices * per_device
  batch = {
    'x': jax.ShapeDtypeStruct((n, *shape), jnp.float32),
    'label': jax.ShapeDtypeStruct((n,), jnp.int32),
  }
  compiled = train.make_train_step(loss_fn, tx, mesh=train.make_mesh(devices)).lower(state, batch)
  text = compiled.compile().as_text()
  parameters = sum(x.size * 4 for x in jax.tree.leaves(state.params))
  return {
    'bytes': collective_bytes(text),
    'count': len(_COLLECTIVE.findall(text)),
    'parameter_bytes': parameters,
  }


def in_process(model: str, devices: int, per_device: int, grouped: bool) -> dict:
  """`compile_step` in a process with so many simulated devices."""
  environment = os.environ | {
    'JAX_PLATFORMS': 'cpu',
    # The code generator's effort does not change which collectives there are.
    'XLA_FLAGS': f'--xla_force_host_platform_device_count={devices}'
    ' --xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true',
  }
  arguments = ['--worker', model, str(devices), str(per_device), str(int(grouped))]
  done = subprocess.run(
    [sys.executable, '-m', 'benchmarks.collectives', *arguments],
    env=environment,
    capture_output=True,
    text=True,
  )
  if done.returncode:
    raise RuntimeError(f'{model} on {devices} devices did not compile:\n{done.stderr[-2000:]}')
  return json.loads(done.stdout.splitlines()[-1])


def table(model: str, per_device: int, results: list[tuple[int, dict, dict]]) -> str:
  """The Markdown table of one model."""
  parameters = results[0][1]['parameter_bytes'] / 1e6
  lines = [
    f'`{model}`, {per_device} examples per device, float32, {parameters:.2f} MB of parameters:',
    '',
    '| devices | collectives | MB per device | sent by each (ring), MB | sent by all, MB'
    ' | collectives, BN per device | MB, BN per device |',
    '|---:|---:|---:|---:|---:|---:|---:|',
  ]
  for n, shared, grouped in results:
    size, per = (sum(r['bytes'].values()) / 1e6 for r in (shared, grouped))
    ring = 2 * (n - 1) / n * size
    lines.append(
      f'| {n} | {shared["count"]} | {size:.3f} | {ring:.3f} | {ring * n:.1f}'
      f' | {grouped["count"]} | {per:.3f} |'
    )
  return '\n'.join(lines)


def write_table(path: pathlib.Path, text: str) -> None:
  """Replaces what stands between the markers of a Markdown file."""
  page = path.read_text()
  if _BEGIN not in page or _END not in page:
    raise ValueError(f'{path} has no place for the table: it needs {_BEGIN} and {_END}.')
  head, rest = page.split(_BEGIN)
  path.write_text(f'{head}{_BEGIN}\n\n{text}\n\n{_END}{rest.split(_END)[1]}')


def parse_command(argv=None):
  """Arguments of a command line; raises where the program would not run."""
  parser = common.parser(__doc__)
  parser.add_argument('--models', default='cifar_resnet20,resnet50')
  parser.add_argument('--devices', default='1,2,4,8,16,32,64,128,256')
  parser.add_argument('--per-device', type=int, default=4)
  parser.add_argument('--small', action='store_true', help='1, 2 and 4 devices')
  parser.add_argument('--write', type=pathlib.Path, help='Markdown file to put the table into')
  return parser.parse_args(argv)


def main(argv=None) -> None:
  args = parse_command(argv)
  counts = [1, 2, 4] if args.small else [int(n) for n in args.devices.split(',')]
  names = args.models.split(',')[: 1 if args.small else None]
  tables, rows = [], []
  metrics: dict[str, str | None] = {}
  for model in names:
    results = []
    for n in counts:
      shared, grouped = (in_process(model, n, args.per_device, g) for g in (False, True))
      results.append((n, shared, grouped))
      for norm, result in (('batch norm over all', shared), ('batch norm per device', grouped)):
        size = sum(result['bytes'].values())
        # What data parallelism cannot do without: one float32 gradient of every parameter.
        least = result['parameter_bytes'] if n > 1 else 0
        name = f'{model}/{n} devices/{norm}'
        metrics[name] = 'collective_bytes' if n in _RECORDED else None
        rows.append(
          {
            'name': name,
            'value': size,
            'unit': 'bytes per step and device',
            'peer': 'one gradient' if size else None,
            'ratio': least / size if size else None,
            'goal': None,
            'spread': None,
          }
        )
    tables.append(table(model, args.per_device, results))
  text = '\n\n'.join(tables)
  print(text)
  if args.write:
    write_table(args.write, text)
  common.finish(args, rows, data=f'{args.per_device} examples per device', metrics=metrics)


if __name__ == '__main__':
  if sys.argv[1:2] == ['--worker']:
    _model, _devices, _per_device, _grouped = sys.argv[2:]
    print(json.dumps(compile_step(_model, int(_devices), int(_per_device), _grouped == '1')))
  else:
    main()
