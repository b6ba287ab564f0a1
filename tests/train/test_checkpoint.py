import errno
import os
import pathlib
import shutil

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
import numpy as np
import optax
import pytest

from fqjax.train import (
  CheckpointError,
  Checkpoints,
  check_workdir,
  create_state,
  make_mesh,
  replicate,
  shard_batch,
  state_bytes,
)
from tests.train import toy


@pytest.fixture
def checkpoints(tmp_path):
  result = Checkpoints(tmp_path / 'checkpoints', keep=3)
  yield result
  result.close()


def toy_state(seed=0, mesh=None, ema=True):
  state = create_state(
    toy.make_params(seed), toy.model_state(), toy.optimizer(), jax.random.key(7), ema=ema
  )
  return replicate(state, make_mesh(1) if mesh is None else mesh)


def test_round_trip_keeps_every_bit_type_and_key(checkpoints):
  tree = {
    'bf16': jnp.asarray([1.5, -0.0, jnp.inf], jnp.bfloat16),
    'uint8': jnp.arange(5, dtype=jnp.uint8),
    'bool': jnp.array([True, False]),
    'scalar': jnp.asarray(-3, jnp.int32),
    'nan': jnp.asarray([np.nan, 1e-45], jnp.float32),
    'typed': jax.random.key(3, impl='rbg'),
    'keys': jax.random.split(jax.random.key(4), 3),
    'raw': jax.random.PRNGKey(5),
    'empty': jnp.zeros((0, 3)),
    'opt': (optax.EmptyState(), None, [optax.MaskedNode(), jnp.ones(2)]),
    'a/b': {'c.d': jnp.ones(1)},
  }
  checkpoints.save(7, tree, position={'epoch': 1, 'list': [1, 'x', None]})
  checkpoints.wait()
  restored = checkpoints.restore(jax.tree.map(jnp.zeros_like, tree))
  assert restored.step == 7
  assert restored.position == {'epoch': 1, 'list': [1, 'x', None]}
  assert jax.tree.structure(restored.state) == jax.tree.structure(tree)
  assert jax.random.key_impl(restored.state['typed']) == jax.random.key_impl(tree['typed'])
  toy.assert_identical(restored.state, tree)


@pytest.mark.parametrize(('before', 'after'), [(8, 1), (1, 8)])
def test_number_of_devices_does_not_matter(checkpoints, before, after):
  mesh = make_mesh(before)
  state, step = toy.setup(mesh)
  state, _ = step(state, toy.make_batch(0))
  checkpoints.save(1, state)
  expected = toy.leaves(state)
  step(state, toy.make_batch(1))  # donates what is being written
  template = toy_state(1, make_mesh(after))
  restored = checkpoints.restore(template).state
  toy.assert_identical(restored, expected)
  for x, like in zip(jax.tree.leaves(restored), jax.tree.leaves(template), strict=True):
    assert x.sharding == like.sharding
  _, other_step = toy.setup(make_mesh(after))
  other_step(restored, shard_batch(toy.make_batch(1), make_mesh(after)))


def test_sharded_parameters_and_shape_templates(checkpoints):
  big, small = make_mesh(8), make_mesh(2)
  x = jnp.arange(32.0).reshape(8, 4)
  checkpoints.save(1, {'w': jax.device_put(x, NamedSharding(big, P('data')))})
  template = jax.ShapeDtypeStruct(
    (8, 4), jnp.float32, sharding=NamedSharding(small, P(None, 'data'))
  )
  w = checkpoints.restore({'w': template}).state['w']
  np.testing.assert_array_equal(w, x)
  assert w.sharding == template.sharding


def test_donation_during_a_background_save_changes_nothing(checkpoints):
  add = jax.jit(lambda x: x + 1, donate_argnums=0)
  x = jnp.zeros((1000, 1000))
  checkpoints.save(1, {'x': x})
  for _ in range(20):
    x = add(x)
  checkpoints.wait()
  np.testing.assert_array_equal(checkpoints.restore({'x': x}).state['x'], 0)


def test_keeps_the_newest(checkpoints):
  for step in (2, 5, 10, 11):
    checkpoints.save(step, {'x': jnp.full(3, step)})
  checkpoints.wait()
  assert checkpoints.steps() == [5, 10, 11]
  assert {p.name for p in checkpoints.root.iterdir()} == {'5', '10', '11'}
  assert checkpoints.restore({'x': jnp.zeros(3, int)}).step == 11
  assert checkpoints.restore({'x': jnp.zeros(3, int)}, step=5).state['x'][0] == 5
  with pytest.raises(CheckpointError, match=r'no checkpoint of step 2 .* \[5, 10, 11\]'):
    checkpoints.restore({'x': jnp.zeros(3, int)}, step=2)
  assert Checkpoints(checkpoints.root / 'none').restore({'x': jnp.zeros(3)}) is None


def test_other_structure_is_an_error_that_lists_paths(checkpoints):
  checkpoints.save(1, toy_state())
  with pytest.raises(ValueError) as e:
    other = toy_state(ema=False)
    other.params['dense2']['kernel'] = jnp.zeros((16, 5))
    checkpoints.restore(other._replace(step=jnp.zeros((), jnp.uint32)))
  message = str(e.value)
  assert 'does not fit this run (saved / wanted)' in message
  assert 'params/dense2/kernel: float32[16, 4] / float32[16, 5]' in message
  assert 'step: int32[] / uint32[]' in message
  assert 'ema/params/dense1/bias: float32[16] / absent' in message


def damage_truncate(path):
  file = max((p for p in path.rglob('*') if p.is_file()), key=lambda p: p.stat().st_size)
  os.truncate(file, file.stat().st_size // 2)


def damage_flip_bit(path):
  file = max(
    (p for p in path.rglob('*') if p.is_file() and p.parent.name == 'd'),
    key=lambda p: p.stat().st_size,
  )
  data = bytearray(file.read_bytes())
  data[len(data) // 2] ^= 1
  file.write_bytes(data)


def damage_remove(path):
  next(p for p in path.rglob('*') if p.is_file() and p.parent.name == 'd').unlink()


def damage_position(path):
  manifest = path / 'fqjax.json'
  manifest.write_text(manifest.read_text().replace('"next": 3', '"next": 4'))


def damage_manifest(path):
  (path / 'fqjax.json').write_text('{"format": 1')


@pytest.mark.parametrize(
  ('damage', 'words'),
  [
    (damage_truncate, 'bytes, '),
    (damage_flip_bit, 'has changed since it was written'),
    (damage_remove, 'is missing'),
    (damage_position, 'fqjax.json is not readable'),
    (damage_manifest, 'fqjax.json is not readable'),
  ],
)
def test_damaged_checkpoint_is_reported_and_the_one_before_used(checkpoints, capsys, damage, words):
  for step in (1, 2, 3):
    checkpoints.save(step, {'x': jnp.arange(1000.0) * step}, position={'next': step})
  checkpoints.wait()
  damage(checkpoints.root / '3')
  template = {'x': jnp.zeros(1000)}
  restored = checkpoints.restore(template, repair=True)
  assert (restored.step, restored.position) == (2, {'next': 2})
  np.testing.assert_array_equal(restored.state['x'], np.arange(1000.0) * 2)
  out = capsys.readouterr().out
  assert str(checkpoints.root / '3') in out and words in out and 'step 2 instead' in out
  assert (checkpoints.root / 'damaged-3').is_dir()
  checkpoints.save(3, {'x': jnp.ones(1000)})  # its step can be written again
  assert checkpoints.restore(template).step == 3


def test_reading_alone_moves_nothing(checkpoints):
  for step in (1, 2):
    checkpoints.save(step, {'x': jnp.ones(3)})
  checkpoints.wait()
  damage_remove(checkpoints.root / '2')
  (checkpoints.root / '3.orbax-checkpoint-tmp').mkdir()
  before = sorted(checkpoints.root.rglob('*'))
  assert checkpoints.restore({'x': jnp.zeros(3)}).step == 1
  assert sorted(checkpoints.root.rglob('*')) == before


def test_nothing_intact_is_an_error(checkpoints):
  checkpoints.save(1, {'x': jnp.ones(3)})
  checkpoints.wait()
  damage_remove(checkpoints.root / '1')
  with pytest.raises(CheckpointError, match='No intact checkpoint is left'):
    checkpoints.restore({'x': jnp.zeros(3)})


def test_folder_that_cannot_be_looked_through_is_an_error(checkpoints, monkeypatch):
  checkpoints.save(1, {'x': jnp.ones(3)})
  checkpoints.wait()
  damage_truncate(checkpoints.root / '1')

  def fails(*unused):
    raise PermissionError(errno.EACCES, 'Permission denied')

  monkeypatch.setattr(pathlib.Path, 'rename', fails)  # setting the damaged one aside
  with pytest.raises(CheckpointError, match='could not be looked through.*Permission denied'):
    checkpoints.restore({'x': jnp.zeros(3)}, repair=True)


def test_unfinished_checkpoints_do_not_count(checkpoints, capsys):
  for step in (1, 2):
    checkpoints.save(step, {'x': jnp.full(3, step)})
  checkpoints.wait()
  (checkpoints.root / '2' / 'fqjax.json').unlink()  # killed between the rename and this file
  (checkpoints.root / '3.orbax-checkpoint-tmp').mkdir()  # killed before the rename
  assert checkpoints.restore({'x': jnp.zeros(3, int)}, repair=True).step == 1
  assert 'unfinished checkpoint' in capsys.readouterr().out
  assert {p.name for p in checkpoints.root.iterdir()} == {'1'}


def test_position_must_be_json(checkpoints):
  with pytest.raises(TypeError, match='must be JSON'):
    checkpoints.save(1, {'x': jnp.ones(3)}, position={1, 2})
  with pytest.raises(ValueError, match='keep counts'):
    Checkpoints('unused', keep=0)


def test_plain_orbax_can_open_it(checkpoints):
  import orbax.checkpoint as ocp

  checkpoints.save(1, toy_state())
  checkpoints.wait()
  tree = ocp.StandardCheckpointer().restore(checkpoints.root / '1')
  np.testing.assert_array_equal(
    tree['params']['dense1']['kernel'], toy.make_params()['dense1']['kernel']
  )


def test_unwritable_and_full_workdirs_are_named(tmp_path):
  (tmp_path / 'file').write_text('')
  for bad in (tmp_path / 'file' / 'run', '/proc/fqjax-run'):
    with pytest.raises(OSError, match='cannot write to the workdir') as e:
      check_workdir(bad)
    assert str(bad) in str(e.value)
  with pytest.raises(OSError, match='MB free, but the checkpoints of this run need') as e:
    check_workdir(tmp_path, needed=shutil.disk_usage(tmp_path).free + 10**9)
  assert e.value.errno == errno.ENOSPC
  assert check_workdir(tmp_path / 'a' / 'b', needed=1) == tmp_path / 'a' / 'b'
  assert list((tmp_path / 'a' / 'b').iterdir()) == []
  if os.geteuid():  # root may write anywhere
    (tmp_path / 'closed').mkdir(mode=0o500)
    with pytest.raises(OSError, match='cannot write'):
      check_workdir(tmp_path / 'closed')


def test_state_bytes():
  tree = {'a': jnp.zeros((3, 4)), 'b': jnp.zeros(5, jnp.bfloat16), 'k': jax.random.key(0)}
  assert state_bytes(tree) == 48 + 10 + 8
