"""Every obstacle on the way out of JAX at once, before anything is trained."""

from collections.abc import Callable
import re
from typing import Any

from fqjax.tracing._graph import NeedsBatchError, collect, trace_any
from fqjax.tracing._source import Obstacle, Report, error_line

# Errors of networks called as for training, and of those JAX cannot trace: what they say (the
# error's name, then its text) -> what to do.
_ERRORS = (
  (
    r'ModifyScopeVariable|TraceContextError|Cannot mutate',
    'state is updated (batch norm in training mode): use_running_average=True (train=False)',
  ),
  (
    r'InvalidRng|PRNGKey|requires a key|\brngs?\b.*(None|provided|must)|needs PRNG',
    'randomness (dropout): deterministic=True (train=False)',
  ),
  (
    r'TracerBoolConversion|TracerArrayConversion|TracerIntegerConversion|ConcretizationType|'
    r'NonConcreteBoolean|ConcreteTypeError',
    'a number of Python made of values: jnp.where or lax.cond in place of if, jax.numpy in place '
    'of numpy',
  ),
)


def can_export(
  apply_fn: Callable,
  params: Any,
  example: Any,
  *,
  batch_axes: Any = 0,
  batch: str = 'open',
) -> Report:
  """Lists what keeps `apply_fn(params, example)` from becoming a graph; computes nothing.

  Args:
    apply_fn: any function JAX can trace; bind keyword arguments first
      (`functools.partial(model.apply, train=False)`).
    params: tree of the parameters; shapes are enough (`jax.eval_shape(model.init, key, x)`).
    example: the other arguments as `fqjax.export` takes them: an array, a tree of arrays or
      `jax.ShapeDtypeStruct`s (one argument), a tuple (several), anything with `args` and `kwargs`
      (`fqjax.exporter.Call`), or a list of such, one for each size of image.
    batch_axes: axis of the batch in every input, or a tuple with an entry for each (a tree of axes
      for an argument that is a tree); arguments by name have their batch first.
    batch: 'open' for any size of the batch, 'fixed' for the example's.

  Returns:
    A report: `report.ok`, `report.obstacles` (scope, primitive, line, remedy), `print(report)`.

  Raises:
    ValueError: `batch` is neither, the inputs differ in their batch, or the result holds something
      that is not an array.
    Exception: the function's own errors, where they are not about leaving JAX.

  Example:
    >>> def network(params, x):
    ...   return jnp.fft.fft(x @ params).real
    >>> report = can_export(network, jnp.eye(4), jnp.ones((1, 4)))
    >>> report.ok, report.obstacles[-1].primitive
    (False, 'fft')
  """
  if batch not in ('open', 'fixed'):
    raise ValueError(f"batch must be 'open' or 'fixed', got {batch!r}.")
  axes = None if batch == 'fixed' else batch_axes
  met: dict[Obstacle, Obstacle] = {}
  for inputs in example if isinstance(example, list) else [example]:
    args, kwargs = getattr(inputs, 'args', None), getattr(inputs, 'kwargs', None)
    if args is None or kwargs is None:
      args, kwargs = (inputs if type(inputs) is tuple else (inputs,)), {}
    # Several sizes of image meet the same obstacles.
    for obstacle in _find(apply_fn, params, tuple(args), dict(kwargs), axes):
      met[obstacle._replace(times=1)] = obstacle
  return Report(tuple(met.values()))


def _find(
  apply_fn: Callable, params: Any, args: tuple, kwargs: dict, axes: Any
) -> tuple[Obstacle, ...]:
  call = lambda params, args, kwargs: apply_fn(params, *args, **kwargs)
  inputs = (args, kwargs)
  if axes is not None and not isinstance(axes, int):
    axes = (axes if type(axes) is tuple else (axes,), 0)
  found: tuple[Obstacle, ...] = ()
  try:
    try:
      program, _, _ = trace_any(call, params, inputs, axes)
    except NeedsBatchError as error:
      found = (error.obstacle,)
      program, _, _ = trace_any(call, params, inputs, None)
  except Exception as error:
    name = type(error).__name__
    for pattern, remedy in _ERRORS:
      if re.search(pattern, f'{name}: {error}'):
        return (*found, Obstacle('', name, error_line(error.__traceback__), remedy))
    raise
  nodes, _, _ = collect(program)
  return (*found, *nodes.obstacles)
