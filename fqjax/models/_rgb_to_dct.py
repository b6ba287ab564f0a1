"""Starting a DCT network from the weights of its RGB twin."""

from collections.abc import Mapping
import functools
from typing import Any, Literal

from flax import traverse_util
import jax
import jax.numpy as jnp
import numpy as np

from fqjax.models._network import DctNetwork, Network

_Flat = dict[tuple[str, ...], Any]

# Modules of the way in: replaced by, or without counterpart in, the other network.
_ENTRY = ('conv1', 'bn1', 'features_0', 'gate')
_HEADS = ('fc', 'classifier')


@functools.partial(jax.jit, static_argnums=0)
def entry_features(model: Network, variables: Mapping[str, Any], x: jax.Array) -> jax.Array:
  """What the first kernels shared by an RGB network and its DCT twin receive.

  For ResNets the map that enters the first stage (after the stem; a DCT network's own input), for
  MobileNetV2 the input of the first projection. These two, of the same images, are what
  `rgb_to_dct_variables(method='least_squares')` fits to each other.

  Args:
    model: From `create_model`.
    variables: Of `model`.
    x: Input of `model`, [n, h, w, c].

  Returns:
    [n, h', w', c'] in the computation type of `model`.

  Raises:
    ValueError: A network without a DCT twin.

  Example:
    >>> model = create_model('cifar_resnet20', stem_stride=2)
    >>> x = jnp.ones((1, 16, 16, 3))
    >>> variables = jax.eval_shape(model.init, jax.random.key(0), x)
    >>> jax.eval_shape(lambda v: entry_features(model, v, x), variables).shape
    (1, 8, 8, 16)
  """
  if not isinstance(model, DctNetwork):
    raise ValueError(
      f'entry_features needs a network with a DCT twin, got {type(model).__name__}.\n  Use a '
      'ResNet or a MobileNetV2.'
    )
  # Only this is returned, so the compiler drops the rest of the network.
  _, state = model.apply(variables, x, mutable=['features'])
  (features,) = jax.tree.leaves(state['features'])
  return features


def fit_linear(x: Any, y: Any, ridge: float = 1e-6) -> tuple[np.ndarray, np.ndarray]:
  """Least-squares fit y = x @ weights + intercept, in float64.

  Args:
    x: [..., n] inputs.
    y: [..., m] targets of the same leading sizes.
    ridge: Added to the diagonal of the covariance of `x`, in units of its mean.

  Returns:
    weights [n, m] and intercept [m], float64 NumPy arrays.

  Raises:
    ValueError: Leading sizes differ.

  Example:
    >>> weights, intercept = fit_linear([[0.0], [1.0], [2.0]], [[1.0], [3.0], [5.0]])
    >>> print(weights.round(3), intercept.round(3))
    [[2.]] [1.]
  """
  x, y = np.asarray(x, np.float64), np.asarray(y, np.float64)
  if x.shape[:-1] != y.shape[:-1]:
    raise ValueError(
      f'fit_linear needs x and y at the same places, got x: {list(x.shape)}, y: {list(y.shape)}.'
    )
  x, y = x.reshape(-1, x.shape[-1]), y.reshape(-1, y.shape[-1])
  x_mean, y_mean = x.mean(0), y.mean(0)
  x, y = x - x_mean, y - y_mean
  covariance = x.T @ x
  diagonal = ridge * np.trace(covariance) / len(covariance)
  weights = np.linalg.solve(covariance + diagonal * np.eye(len(covariance)), x.T @ y)
  return weights, y_mean - x_mean @ weights


def rgb_to_dct_variables(
  rgb_variables: Mapping[str, Any],
  dct_variables: Mapping[str, Any],
  *,
  method: Literal['cut', 'reinit', 'least_squares'] = 'cut',
  rgb_features: Any = None,
  dct_features: Any = None,
  ridge: float = 1e-6,
  new_head: bool = False,
) -> dict[str, Any]:
  """Fills a DCT (or patchify) network from a trained RGB one.

  All layers behind the first block are copied. Kernels that meet the DCT channels are made by

  - 'cut': the first channels of the RGB kernels by position, as the paper's public code; a
    MobileNetV2 also takes the first depthwise kernels with their batch norm. With more channels
    than the RGB kernels have (all 192) they are re-initialised, in MobileNetV2 tiled.
  - 'reinit': all of them stay as `dct_variables` has them.
  - 'least_squares': W' = argmin ||W * stem(x) - W' * dct(x)|| over given features, which starts
    near the RGB network. What a linear map cannot carry, the mean, goes into the batch norm
    behind the kernel. In MobileNetV2 the first depthwise layer stays as `dct_variables` has it.

  A projection the RGB network lacks (ResNet-18/34, CIFAR) stands for its identity.

  Args:
    rgb_variables: {'params', 'batch_stats'} of the RGB network.
    dct_variables: Initialised variables of the DCT network.
    method: See above.
    rgb_features: `entry_features` of the RGB network, [..., c], for 'least_squares'. A few
      thousand images; some places of each map are enough.
    dct_features: `entry_features` of the DCT network at the same places, [..., n].
    ridge: Of the fit, see `fit_linear`.
    new_head: Keep the classifier of `dct_variables`.

  Returns:
    {'params', 'batch_stats'} of the DCT network, new arrays where anything changed.

  Raises:
    ValueError: Networks of different families or sizes, or features that do not fit them.

  Example:
    >>> rgb, dct = create_model('resnet18'), create_model('resnet18_dct', channels=24)
    >>> key = jax.random.key(0)  # Shapes only, to be quick; arrays go the same way.
    >>> rgb_variables = jax.eval_shape(rgb.init, key, jnp.ones((1, 32, 32, 3)))
    >>> dct_variables = jax.eval_shape(dct.init, key, jnp.ones((1, 8, 8, 24)))
    >>> start = jax.eval_shape(rgb_to_dct_variables, rgb_variables, dct_variables)
    >>> start['params']['layer1_0']['conv1']['kernel'].shape
    (3, 3, 24, 64)

  Source: arXiv 2002.12416 and its public code ('cut').
  """
  if method not in ('cut', 'reinit', 'least_squares'):
    raise ValueError(f"method is 'cut', 'reinit' or 'least_squares', got {method!r}.")
  rgb, dct = _flatten(rgb_variables), _flatten(dct_variables)
  mobilenet = ('params', 'features_1', 'project', 'kernel') in dct
  first = 'features_1' if mobilenet else 'layer1_0'
  # The first kernels meet the channels; so does the norm of a depthwise kernel, and a projection
  # without counterpart brings its own.
  meeting = ('depthwise', 'depthwise_bn', 'project') if mobilenet else ('conv1', 'downsample_conv')
  own_projection = ('params', first, 'downsample_conv', 'kernel') not in rgb
  if own_projection:
    meeting += ('downsample_bn',)

  out, differ = dict(dct), []
  for path, value in dct.items():
    if path[1] in _ENTRY or (path[1] == first and path[2] in meeting):
      continue
    if new_head and path[1] in _HEADS:
      continue
    if path not in rgb or rgb[path].shape != value.shape:
      has = f'RGB {list(rgb[path].shape)}' if path in rgb else 'RGB none'
      differ.append(f'{"/".join(path)} ({has}, DCT {list(value.shape)})')
      continue
    out[path] = rgb[path]
  if differ:
    raise ValueError(
      f'the RGB and the DCT network differ in {len(differ)} arrays behind the first block: '
      f'{"; ".join(differ[:3])}.\n  Use twins such as resnet50 and resnet50_dct; where only '
      'num_classes differs, pass new_head=True.'
    )

  if method == 'cut':
    (_cut_mobilenet if mobilenet else _cut_resnet)(rgb, dct, out)
  elif method == 'least_squares':
    if rgb_features is None or dct_features is None:
      raise ValueError(
        "method='least_squares' needs rgb_features and dct_features: entry_features of both "
        'networks for the same images.'
      )
    fit = _fit_mobilenet if mobilenet else _fit_resnet
    fit(rgb, dct, out, rgb_features, dct_features, ridge)
  return traverse_util.unflatten_dict({path: jnp.asarray(v) for path, v in out.items()})


def _flatten(variables: Mapping[str, Any]) -> _Flat:
  flat: Any = traverse_util.flatten_dict(dict(variables))
  return flat


def _cut_resnet(rgb: _Flat, dct: _Flat, out: _Flat) -> None:
  for layer in ('conv1', 'downsample_conv'):
    path = ('params', 'layer1_0', layer, 'kernel')
    kernel = rgb[path] if path in rgb else np.eye(dct[path].shape[3], dtype=np.float32)[None, None]
    channels = dct[path].shape[2]
    if channels <= kernel.shape[2]:
      out[path] = kernel[:, :, :channels]


def _cut_mobilenet(rgb: _Flat, dct: _Flat, out: _Flat) -> None:
  depthwise = ('params', 'features_1', 'depthwise', 'kernel')
  project = ('params', 'features_1', 'project', 'kernel')
  hidden = dct[depthwise].shape[3]
  if hidden > rgb[depthwise].shape[3]:
    return
  # One input per kernel, or the tiled kernels of the grouped convolution.
  out[depthwise] = jnp.tile(rgb[depthwise][..., :hidden], (1, 1, dct[depthwise].shape[2], 1))
  out[project] = rgb[project][:, :, :hidden]
  for path in dct:
    if path[1:3] == ('features_1', 'depthwise_bn'):
      out[path] = rgb[path][:hidden]


def _fit_resnet(
  rgb: _Flat, dct: _Flat, out: _Flat, rgb_features: Any, dct_features: Any, ridge: float
) -> None:
  kernel = rgb['params', 'layer1_0', 'conv1', 'kernel']
  channels = dct['params', 'layer1_0', 'conv1', 'kernel'].shape[2]
  _check_features(rgb_features, kernel.shape[2], dct_features, channels)
  weights, intercept = fit_linear(dct_features, rgb_features, ridge)
  for layer, norm in (('conv1', 'bn1'), ('downsample_conv', 'downsample_bn')):
    path = ('params', 'layer1_0', layer, 'kernel')
    if path in rgb:
      _compose(rgb, out, ('layer1_0', layer), ('layer1_0', norm), weights, intercept)
    elif path in dct:
      # The norm behind a new projection is set to undo itself, in training as in evaluation.
      out[path] = np.float32(weights[None, None])
      mapped = np.asarray(dct_features, np.float64).reshape(-1, channels) @ weights
      mean, var = mapped.mean(0), mapped.var(0)
      out['batch_stats', 'layer1_0', norm, 'mean'] = np.float32(mean)
      out['batch_stats', 'layer1_0', norm, 'var'] = np.float32(var)
      out['params', 'layer1_0', norm, 'scale'] = np.float32(np.sqrt(var + 1e-5))
      out['params', 'layer1_0', norm, 'bias'] = np.float32(mean + intercept)


def _fit_mobilenet(
  rgb: _Flat, dct: _Flat, out: _Flat, rgb_features: Any, dct_features: Any, ridge: float
) -> None:
  path = ('params', 'features_1', 'project', 'kernel')
  _check_features(rgb_features, rgb[path].shape[2], dct_features, dct[path].shape[2])
  weights, intercept = fit_linear(dct_features, rgb_features, ridge)
  _compose(rgb, out, path[1:3], ('features_1', 'project_bn'), weights, intercept)


def _compose(
  rgb: _Flat,
  out: _Flat,
  layer: tuple[str, ...],
  norm: tuple[str, ...],
  weights: np.ndarray,
  intercept: np.ndarray,
) -> None:
  """Sets `layer` to the RGB kernel of (x @ weights + intercept)."""
  # The fit is linear in its target, so fitting the features once serves every kernel on them.
  kernel = np.asarray(rgb['params', *layer, 'kernel'], np.float64)
  out['params', *layer, 'kernel'] = np.float32(np.einsum('nc,hwco->hwno', weights, kernel))
  # The constant is the same everywhere but at the border of a padded map.
  constant = intercept @ kernel.sum((0, 1))
  mean = ('batch_stats', *norm, 'mean')
  out[mean] = np.float32(np.asarray(rgb[mean], np.float64) - constant)


def _check_features(rgb: Any, rgb_channels: int, dct: Any, dct_channels: int) -> None:
  for name, features, channels in (
    ('rgb_features', rgb, rgb_channels),
    ('dct_features', dct, dct_channels),
  ):
    if np.shape(features)[-1:] != (channels,):
      raise ValueError(
        f'{name} must have {channels} channels, got {list(np.shape(features))}.\n'
        '  Take them from entry_features of the same network.'
      )
