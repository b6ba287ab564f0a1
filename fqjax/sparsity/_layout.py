"""The two views in which weights are pruned, whatever the layout they are stored in.

A layout names every axis of a leaf with one letter: O output, I input, any other capital a tap axis
(H, W, ...). Letters may repeat ('IOO' for an attention projection [in, heads, head size]); axes of
one kind are merged row-major in the order in which they stand.
"""

import math


def axes(layout: str, ndim: int) -> tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]:
  """Positions of the output, input and tap axes.

  Args:
    layout: one capital per axis, e.g. 'HWIO'.
    ndim: rank of the leaf.

  Raises:
    ValueError: when letters and axes do not match in number, or O or I is missing.

  Example:
    >>> axes('HWIO', 4)
    ((3,), (2,), (0, 1))
  """
  if not (layout.isalpha() and layout.isupper()) or not {'O', 'I'} <= set(layout):
    raise ValueError(
      f'layout {layout!r} must be capitals, one per axis, with an O (output) and an I (input); '
      "e.g. 'HWIO', 'OIHW', 'IO'."
    )
  if len(layout) != ndim:
    raise ValueError(
      f'layout {layout!r} names {len(layout)} axes, the leaf has {ndim}; name each axis once.'
    )
  kinds = ['OI'.find(letter) for letter in layout]  # O 0, I 1, tap -1
  outputs, inputs, taps = (tuple(a for a in range(ndim) if kinds[a] == k) for k in (0, 1, -1))
  return outputs, inputs, taps


def kernel_shape(shape: tuple[int, ...], layout: str) -> tuple[int, int, int]:
  """Shape (O, I, M) of `to_kernels`, without an array.

  Args:
    shape: shape of the leaf.
    layout: one capital per axis.

  Raises:
    ValueError: when the layout does not fit the shape.

  Example:
    >>> kernel_shape((3, 3, 16, 32), 'HWIO')
    (32, 16, 9)
  """
  outputs, inputs, taps = (math.prod(shape[a] for a in kind) for kind in axes(layout, len(shape)))
  return outputs, inputs, taps


def to_kernels(w, layout: str):
  """Leaf to [O, I, M]: one kernel of M taps per output and input.

  Args:
    w: a leaf, `jax.Array` or NumPy, any dtype.
    layout: one capital per axis, e.g. 'HWIO'.

  Returns:
    [O, I, M]; taps row-major (t = row*width + column), M = 1 for dense layers. An array of the same
    kind and dtype.

  Raises:
    ValueError: when the layout does not fit the rank.

  Example:
    >>> to_kernels(jnp.zeros((3, 3, 16, 32)), 'HWIO').shape
    (32, 16, 9)
  """
  outputs, inputs, taps = axes(layout, w.ndim)
  return w.transpose(outputs + inputs + taps).reshape(kernel_shape(w.shape, layout))


def from_kernels(kernels, layout: str, shape: tuple[int, ...]):
  """Inverse of `to_kernels`.

  Args:
    kernels: [O, I, M].
    layout: one capital per axis.
    shape: shape of the leaf.

  Returns:
    The leaf, of that shape.

  Raises:
    ValueError: when `kernels` is not the view of a leaf of that shape.

  Example:
    >>> w = jnp.arange(12.0).reshape(2, 1, 2, 3)
    >>> bool((from_kernels(to_kernels(w, 'HWIO'), 'HWIO', w.shape) == w).all())
    True
  """
  if tuple(kernels.shape) != kernel_shape(shape, layout):
    raise ValueError(
      f'kernels {list(kernels.shape)} are not the view of a {layout} leaf {list(shape)}, which is '
      f'{list(kernel_shape(shape, layout))}.'
    )
  order = sum(axes(layout, len(shape)), ())
  back = tuple(order.index(a) for a in range(len(shape)))
  return kernels.reshape([shape[a] for a in order]).transpose(back)


def to_rows(w, layout: str):
  """Leaf to the matrix [O, M*I]: one row per output, columns by tap, inputs fastest.

  Args:
    w: a leaf, `jax.Array` or NumPy.
    layout: one capital per axis.

  Returns:
    [O, M*I]; consecutive columns are consecutive inputs of one tap.

  Raises:
    ValueError: when the layout does not fit the rank.

  Example:
    >>> w = jnp.arange(4).reshape(2, 1, 2, 1)  # two taps, two inputs, one output
    >>> print(to_rows(w, 'HWIO'))
    [[0 1 2 3]]
  """
  outputs, inputs, taps = axes(layout, w.ndim)
  o, i, m = kernel_shape(w.shape, layout)
  return w.transpose(outputs + taps + inputs).reshape(o, m * i)


def from_rows(rows, layout: str, shape: tuple[int, ...]):
  """Inverse of `to_rows`.

  Args:
    rows: [O, M*I].
    layout: one capital per axis.
    shape: shape of the leaf.

  Returns:
    The leaf, of that shape.

  Raises:
    ValueError: when `rows` is not the matrix of a leaf of that shape.

  Example:
    >>> print(from_rows(jnp.array([[1, 2], [3, 4]]), 'IO', (2, 2)))
    [[1 3]
     [2 4]]
  """
  o, i, m = kernel_shape(shape, layout)
  if tuple(rows.shape) != (o, m * i):
    raise ValueError(
      f'rows {list(rows.shape)} are not the matrix of a {layout} leaf {list(shape)}, which is '
      f'{[o, m * i]}.'
    )
  outputs, inputs, taps = axes(layout, len(shape))
  order = outputs + taps + inputs
  back = tuple(order.index(a) for a in range(len(shape)))
  return rows.reshape([shape[a] for a in order]).transpose(back)
