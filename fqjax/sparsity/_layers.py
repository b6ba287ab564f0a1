"""What a network does with each of its weights, read from its trace: work, order, groups, layout."""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from fqjax.tracing import Operation, Value
from fqjax.tracing.reader import Reader, trace_parameters


class Layer(NamedTuple):
  """A weight that is multiplied with.

  Attributes:
    macs: multiply-accumulates per call, for the whole batch given.
    groups: of its convolution; 1 elsewhere.
    times: how many operations (or iterations of a loop) use it.
    layout: how the operation reads its axes ('HWIO', 'OI', ...); '' where the weight is reshaped,
      cut or computed with before.
  """

  macs: int
  groups: int = 1
  times: int = 1
  layout: str = ''


def trace_layers(apply_fn: Callable, *args, **kwargs) -> dict[str, Layer]:
  """Follows every weight of `apply_fn(*args, **kwargs)` to the products it enters.

  Nothing is computed. What counts as parameters, and how loops and branches count, is said in
  `fqjax.summary`. Where several weights make up one operand (low-rank products, masks), the work is
  the largest one's.

  Args:
    apply_fn: any function that JAX can trace, or a module that is called.
    *args: its arguments; arrays or `jax.ShapeDtypeStruct`s as leaves.
    **kwargs: likewise.

  Returns:
    Path -> `Layer`, in order of execution: the first key is the first layer. Weights that enter no
    product (biases, norms, embedding tables) are not there.

  Example:
    >>> params = {'conv': jnp.ones((3, 3, 2, 8)), 'fc': jnp.ones((8, 5))}
    >>> def apply(p, x):
    ...   x = jax.lax.conv(x, p['conv'].transpose(3, 2, 0, 1), (1, 1), 'SAME')
    ...   return x.mean((2, 3)) @ p['fc']
    >>> layers = trace_layers(apply, params, jnp.ones((1, 2, 6, 6)))
    >>> layers['conv'].macs, layers['fc']
    (5184, Layer(macs=40, groups=1, times=1, layout='IO'))
  """
  program, parameters = trace_parameters(apply_fn, *args, **kwargs)
  if not parameters:
    raise ValueError(
      'no parameters among the arguments; pass them, e.g. '
      'trace_layers(model.apply, variables, images).'
    )
  reader = _LayoutReader(parameters)
  layers: dict[str, Layer] = {}
  for found in reader.read(program):
    if not found.macs or not found.used:
      continue
    path = max(sorted(found.used), key=lambda p: reader.sizes[p][0])
    old = layers.get(path, Layer(0, reader.groups.get(path, 1), 0, reader.layouts.get(path, '')))
    layers[path] = old._replace(macs=old.macs + found.macs, times=old.times + found.times)
  return layers


class _LayoutReader(Reader):
  """A reader that notes besides how products read their weights."""

  def __init__(self, parameters: Mapping[Value, str]):
    super().__init__(parameters)
    self.groups: dict[str, int] = {}
    self.layouts: dict[str, str] = {}
    self._whole = dict(parameters)  # as they came in

  def read_plain(self, op: Operation, times: int):
    """Looks at the operation first."""
    for i, value in enumerate(op.inputs[:2]):
      for path in self.origins(value):
        self.groups.setdefault(path, op.params.get('feature_group_count', 1))
      if op.name == 'convert_element_type' and value in self._whole:
        self._whole[op.outputs[0]] = self._whole[value]
      elif value in self._whole and (layout := _layout(op, i)):
        self.layouts.setdefault(self._whole[value], layout)
    return super().read_plain(op, times)


def _layout(op: Operation, operand: int) -> str:
  ndim = len(op.inputs[operand].shape)
  numbers: Any = op.params.get('dimension_numbers')
  if op.name == 'conv_general_dilated' and operand == 1 and op.params['batch_group_count'] == 1:
    letters = [''] * ndim
    taps = 'HW' if ndim == 4 else 'DHW' if ndim == 5 else 'H' * (ndim - 2)
    for axis, letter in zip(numbers.rhs_spec, 'OI' + taps, strict=True):
      letters[axis] = letter
    return ''.join(letters)
  if op.name == 'dot_general':
    contracted, batch = (side[operand] for side in numbers)
    if not batch and 0 < len(contracted) < ndim:
      return ''.join('I' if axis in contracted else 'O' for axis in range(ndim))
  return ''
