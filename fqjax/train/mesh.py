"""Devices as a mesh, and arrays onto it."""

from collections.abc import Sequence
import hashlib
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
import numpy as np

PyTree = Any


def make_mesh(n: int | Sequence[int] | None = None, axes: Sequence[str] = ('data',)) -> Mesh:
  """Makes a mesh of devices; batches are split over its first axis.

  Axis types are `Auto` (the compiler propagates shardings); `jax.make_mesh` alone would make them
  `Explicit`, under which ordinary layers raise.

  Args:
    n: number of devices, or one number per axis; all devices of all processes by default.
    axes: axis names.

  Returns:
    A `jax.sharding.Mesh`.

  Raises:
    ValueError: if there are fewer devices than asked for, or `n` and `axes` differ in length.

  Examples:
    >>> dict(make_mesh(1).shape)
    {'data': 1}
  """
  devices = jax.devices()
  if n is None:
    n = (len(devices),) + (1,) * (len(axes) - 1)
  shape = (n,) if isinstance(n, int) else tuple(n)
  if len(shape) != len(axes):
    raise ValueError(
      f'make_mesh needs one size per axis, got sizes {shape} for axes {tuple(axes)}.'
      f' Write make_mesh({shape + (1,) * (len(axes) - len(shape))}, {tuple(axes)}).'
    )
  count = math.prod(shape)
  if count > len(devices) or count < 1:
    raise ValueError(
      f'make_mesh{shape} needs {count} devices, but JAX sees {len(devices)}'
      f' ({devices[0].platform}). Ask for at most {len(devices)}; to simulate more on a CPU set'
      f' XLA_FLAGS=--xla_force_host_platform_device_count={count}.'
    )
  return jax.make_mesh(
    shape, tuple(axes), axis_types=(AxisType.Auto,) * len(axes), devices=devices[:count]
  )


def batch_sharding(mesh: Mesh | None = None) -> NamedSharding:
  """The sharding of a batch: leading axis over the mesh's first axis.

  Args:
    mesh: all devices by default.

  Returns:
    A `NamedSharding`.
  """
  mesh = make_mesh() if mesh is None else mesh
  return NamedSharding(mesh, P(mesh.axis_names[0]))


def replicated_sharding(mesh: Mesh | None = None) -> NamedSharding:
  """The sharding of parameters: a whole copy on every device.

  Args:
    mesh: all devices by default.

  Returns:
    A `NamedSharding`.
  """
  return NamedSharding(make_mesh() if mesh is None else mesh, P())


def shard_batch(batch: PyTree, mesh: Mesh | None = None) -> PyTree:
  """Puts this process's part of a batch onto its devices, as one global array per leaf.

  Args:
    batch: pytree of host arrays `[b, ...]`, `b` the *local* batch size; arrays that are already
      sharded this way pass through.
    mesh: all devices by default.

  Returns:
    The same tree of `jax.Array`s of global batch size, split over the mesh's first axis.

  Raises:
    ValueError: if `b` is not divisible by the number of local devices on that axis.

  Examples:
    >>> batch = shard_batch({'image': np.zeros((8, 4, 4, 3), np.uint8)}, make_mesh(1))
    >>> batch['image'].shape
    (8, 4, 4, 3)
  """
  mesh = make_mesh() if mesh is None else mesh
  sharding = batch_sharding(mesh)
  # Devices of another axis hold copies; only distinct rows of the first axis split the batch.
  rows = mesh.devices.reshape(mesh.devices.shape[0], -1)
  local = sum(any(d.process_index == jax.process_index() for d in row) for row in rows)

  def put(path, x):
    if isinstance(x, jax.Array) and x.sharding.is_equivalent_to(sharding, x.ndim):
      return x
    shape = np.shape(x)
    if not shape or shape[0] % local:
      name = jax.tree_util.keystr(path, simple=True, separator='/') or 'the batch'
      raise ValueError(
        f'shard_batch cannot split {name}: {list(shape)} over {local} local devices of axis'
        f" '{mesh.axis_names[0]}'. Choose a batch size divisible by {local} per process"
        f' (pad the last batch and mask the padding), or a mesh of fewer devices.'
      )
    return jax.make_array_from_process_local_data(sharding, x)

  return jax.tree.map_with_path(put, batch)


def replicate(tree: PyTree, mesh: Mesh | None = None) -> PyTree:
  """Copies a tree onto every device of the mesh.

  Args:
    tree: pytree of arrays, the same on every process; arrays already on the mesh pass through.
    mesh: all devices by default.

  Returns:
    The same tree of replicated `jax.Array`s.

  Raises:
    ValueError: with several processes, if they do not hold the same values.

  Examples:
    >>> replicate({'w': np.ones(2)}, make_mesh(1))['w'].is_fully_replicated
    True
  """
  sharding = replicated_sharding(mesh)
  if jax.process_count() == 1:
    return jax.device_put(tree, sharding)
  leaves, treedef = jax.tree.flatten(tree)
  todo = [
    i
    for i, x in enumerate(leaves)
    if not (isinstance(x, jax.Array) and x.sharding.is_equivalent_to(sharding, x.ndim))
  ]
  host = [jax.device_get(key_data(leaves[i])) for i in todo]
  _check_agreement(host)
  for i, x in zip(todo, host, strict=True):
    x = np.asarray(x)
    x = jax.make_array_from_process_local_data(sharding, x, x.shape)
    leaves[i] = like_key(x, leaves[i])
  return jax.tree.unflatten(treedef, leaves)


def key_data(x: Any) -> Any:
  """The integers of a typed PRNG key; anything else unchanged."""
  return jax.random.key_data(x) if is_key(x) else x


def like_key(data: jax.Array, like: Any) -> jax.Array:
  """Turns integers back into a typed key where `like` is one (inverse of `key_data`)."""
  if not is_key(like):
    return data
  return jax.random.wrap_key_data(data, impl=jax.random.key_impl(like))


def is_key(x: Any) -> bool:
  """Whether `x` is a typed PRNG key array (or the shape of one)."""
  return hasattr(x, 'dtype') and jnp.issubdtype(x.dtype, jax.dtypes.prng_key)


def _check_agreement(arrays: Sequence[Any]) -> None:
  # One 32-byte exchange instead of comparing every leaf: different seeds per process would
  # otherwise train silently on parameters that are not copies of each other.
  from jax.experimental import multihost_utils

  digest = hashlib.sha256()
  for x in arrays:
    x = np.ascontiguousarray(x)
    digest.update(f'{x.shape}{x.dtype}'.encode() + x.tobytes())
  mine = np.frombuffer(digest.digest(), np.uint8)
  every = np.asarray(multihost_utils.process_allgather(mine))
  different = [p for p in range(len(every)) if not np.array_equal(every[p], every[0])]
  if different:
    raise ValueError(
      f'processes {different} hold other values than process 0, so the tree cannot be replicated.'
      ' Create the state from the same seed (and the same checkpoint) on every process.'
    )
