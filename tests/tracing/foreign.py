"""Networks for images as other people write them, small; none of it is ours."""

from collections.abc import Callable, Sequence
import functools
from typing import Any, NamedTuple

import equinox as eqx
from flax import linen as nn
from flax import nnx
import haiku as hk
import jax
from jax import lax
import jax.numpy as jnp
import numpy as np

from fqjax.tracing import leaf_name


class Foreign(NamedTuple):
  """A network.

  Attributes:
    apply: (variables, inputs) -> outputs, as at inference.
    variables: shapes.
    shape: of one input, without the batch.
  """

  apply: Callable
  variables: Any
  shape: tuple[int, ...]


def numbers(shapes, seed=0):
  """Values a trained network might have: compiling initialisers would take longer than the test."""
  rng = np.random.default_rng(seed)

  def one(path, leaf):
    if not isinstance(leaf, jax.ShapeDtypeStruct):
      return leaf
    if jnp.issubdtype(leaf.dtype, jax.dtypes.extended):
      return jax.random.key(0)
    if not jnp.issubdtype(leaf.dtype, jnp.floating):
      return np.zeros(leaf.shape, leaf.dtype)
    if any(word in leaf_name(path) for word in ('var', 'scale')):
      return np.asarray(rng.uniform(0.5, 1.5, leaf.shape), leaf.dtype)
    width = np.sqrt(max(1, np.prod(leaf.shape[:-1]))) if len(leaf.shape) > 1 else 5
    return np.asarray(rng.normal(size=leaf.shape) / width, leaf.dtype)

  return jax.tree_util.tree_map_with_path(one, shapes)


# Vision transformer.


class MlpBlock(nn.Module):
  mlp_dim: int
  dropout_rate: float = 0.1

  @nn.compact
  def __call__(self, inputs, *, deterministic):
    x = nn.Dense(self.mlp_dim, kernel_init=nn.initializers.xavier_uniform())(inputs)
    x = nn.gelu(x)
    x = nn.Dropout(rate=self.dropout_rate)(x, deterministic=deterministic)
    x = nn.Dense(inputs.shape[-1])(x)
    return nn.Dropout(rate=self.dropout_rate)(x, deterministic=deterministic)


class EncoderBlock(nn.Module):
  mlp_dim: int
  num_heads: int

  @nn.compact
  def __call__(self, inputs, *, deterministic):
    x = nn.LayerNorm()(inputs)
    x = nn.MultiHeadDotProductAttention(num_heads=self.num_heads, deterministic=deterministic)(x, x)
    x = x + inputs
    y = MlpBlock(self.mlp_dim)(nn.LayerNorm()(x), deterministic=deterministic)
    return x + y


class ViT(nn.Module):
  num_classes: int = 10
  hidden: int = 24
  patch: int = 8
  layers: int = 2

  @nn.compact
  def __call__(self, x, *, train=False):
    x = nn.Conv(self.hidden, (self.patch,) * 2, strides=(self.patch,) * 2, padding='VALID')(x)
    n, h, w, c = x.shape
    x = jnp.reshape(x, [n, h * w, c])
    cls = self.param('cls', nn.initializers.zeros, (1, 1, c))
    x = jnp.concatenate([jnp.tile(cls, [n, 1, 1]), x], axis=1)
    x = x + self.param('posembed', nn.initializers.normal(0.02), (1, x.shape[1], c))
    for i in range(self.layers):
      x = EncoderBlock(48, 3, name=f'encoderblock_{i}')(x, deterministic=not train)
    x = nn.LayerNorm(name='encoder_norm')(x)
    return nn.Dense(self.num_classes, name='head')(x[:, 0])


# ConvNeXt.


class ConvNeXtBlock(nn.Module):
  dim: int

  @nn.compact
  def __call__(self, x):
    shortcut = x
    x = nn.Conv(self.dim, (7, 7), feature_group_count=self.dim, name='dwconv')(x)
    x = nn.LayerNorm(epsilon=1e-6, name='norm')(x)
    x = nn.Dense(4 * self.dim, name='pwconv1')(x)
    x = nn.gelu(x, approximate=False)
    x = nn.Dense(self.dim, name='pwconv2')(x)
    gamma = self.param('gamma', nn.initializers.constant(1e-6), (self.dim,))
    return shortcut + jnp.expand_dims(gamma, (0, 1, 2)) * x


class ConvNeXt(nn.Module):
  depths: Sequence[int] = (1, 1, 2)
  dims: Sequence[int] = (8, 16, 24)

  @nn.compact
  def __call__(self, x):
    for i, (depth, dim) in enumerate(zip(self.depths, self.dims, strict=True)):
      if i == 0:
        x = nn.LayerNorm()(nn.Conv(dim, (4, 4), (4, 4), padding='VALID', name='stem')(x))
      else:
        x = nn.Conv(dim, (2, 2), (2, 2), padding='VALID', name=f'down{i}')(nn.LayerNorm()(x))
      for _ in range(depth):
        x = ConvNeXtBlock(dim)(x)
    x = nn.LayerNorm()(jnp.mean(x, axis=(1, 2)))
    return nn.Dense(10)(x)


# EfficientNet.


def round_filters(filters, width, divisor=8):
  new = max(divisor, int(filters * width + divisor / 2) // divisor * divisor)
  return int(new + divisor if new < 0.9 * filters * width else new)


class SqueezeAndExcite(nn.Module):
  filters: int

  @nn.compact
  def __call__(self, inputs):
    x = inputs.mean(axis=(1, 2), keepdims=True)
    x = nn.swish(nn.Conv(self.filters, (1, 1), name='reduce')(x))
    x = nn.Conv(inputs.shape[-1], (1, 1), name='expand')(x)
    return nn.sigmoid(x) * inputs


class MBConv(nn.Module):
  filters: int
  kernel: int
  stride: int
  expand: int = 6
  norm: Any = nn.BatchNorm

  @nn.compact
  def __call__(self, inputs):
    channels = inputs.shape[-1]
    x = inputs
    if self.expand > 1:
      x = nn.Conv(channels * self.expand, (1, 1), use_bias=False)(x)
      x = nn.swish(self.norm()(x))
    x = nn.Conv(
      x.shape[-1],
      (self.kernel,) * 2,
      strides=self.stride,
      padding='SAME',
      feature_group_count=x.shape[-1],
      use_bias=False,
    )(x)
    x = nn.swish(self.norm()(x))
    x = SqueezeAndExcite(max(1, channels // 4))(x)
    x = self.norm()(nn.Conv(self.filters, (1, 1), use_bias=False)(x))
    return x + inputs if self.stride == 1 and channels == self.filters else x


class EfficientNet(nn.Module):
  width: float = 0.5

  @nn.compact
  def __call__(self, x, train=False):
    norm = functools.partial(nn.BatchNorm, use_running_average=not train, momentum=0.99)
    x = nn.Conv(round_filters(32, self.width), (3, 3), 2, use_bias=False, name='stem')(x)
    x = nn.swish(norm()(x))
    for filters, kernel, stride, expand, repeats in (
      (16, 3, 1, 1, 1),
      (24, 3, 2, 6, 2),
      (40, 5, 2, 6, 1),
    ):
      for i in range(repeats):
        filters_here = round_filters(filters, self.width)
        x = MBConv(filters_here, kernel, stride if i == 0 else 1, expand, norm)(x)
    x = nn.swish(norm()(nn.Conv(32, (1, 1), use_bias=False)(x)))
    x = nn.avg_pool(x, x.shape[1:3]).reshape(x.shape[0], -1)
    return nn.Dense(10)(nn.Dropout(0.2, deterministic=not train)(x))


# U-Net.


class DoubleConv(nn.Module):
  features: int

  @nn.compact
  def __call__(self, x, train):
    for _ in range(2):
      x = nn.Conv(self.features, (3, 3), padding=1, use_bias=False)(x)
      x = nn.relu(nn.BatchNorm(use_running_average=not train)(x))
    return x


class UNet(nn.Module):
  features: Sequence[int] = (6, 12, 18)
  bilinear: bool = False

  @nn.compact
  def __call__(self, x, train=False):
    skips = []
    for features in self.features[:-1]:
      x = DoubleConv(features)(x, train)
      skips.append(x)
      x = nn.max_pool(x, window_shape=(2, 2), strides=(2, 2))
    x = DoubleConv(self.features[-1])(x, train)
    for i, (features, skip) in enumerate(zip(self.features[-2::-1], skips[::-1], strict=True)):
      if i == 0:
        x = nn.ConvTranspose(features, (2, 2), strides=(2, 2))(x)
      else:
        n, h, w, c = x.shape
        x = jax.image.resize(x, (n, 2 * h, 2 * w, c), method='bilinear')
      x = jnp.concatenate([skip, x], axis=-1)
      x = DoubleConv(features)(x, train)
    logits = nn.Conv(3, (1, 1))(x)
    return {'logits': logits, 'mask': jnp.argmax(logits, axis=-1)}


# Detection.


def anchors(height, width, stride, sizes=(1.0, 1.6)):
  y, x = np.meshgrid(np.arange(height) + 0.5, np.arange(width) + 0.5, indexing='ij')
  centers = np.stack([y, x], -1).reshape(-1, 1, 2) * stride
  extents = 4.0 * stride * np.asarray(sizes).reshape(1, -1, 1) * np.ones((1, 1, 2))
  extents = np.broadcast_to(extents, (height * width, len(sizes), 2))
  centers = np.broadcast_to(centers, extents.shape)
  return np.concatenate([centers, extents], -1).reshape(-1, 4).astype(np.float32)


class Detector(nn.Module):
  num_classes: int = 3
  width: int = 12
  detections: int = 8

  @nn.compact
  def __call__(self, images, train=False):
    norm = functools.partial(nn.BatchNorm, use_running_average=not train)
    x, levels = images, []
    for i, features in enumerate((6, 8, 10, 12)):
      x = nn.relu(norm()(nn.Conv(features, (3, 3), (2, 2), use_bias=False, name=f'c{i}')(x)))
      levels.append(x)
    # Feature pyramid, from the top down.
    laterals = [
      nn.Conv(self.width, (1, 1), name=f'lateral{i}')(c) for i, c in enumerate(levels[1:])
    ]
    outs = [laterals[-1]]
    for lateral in laterals[-2::-1]:
      n, h, w, c = lateral.shape
      outs.insert(0, lateral + jax.image.resize(outs[0], (n, h, w, c), 'nearest'))
    tower = nn.Conv(self.width, (3, 3), name='tower')
    classify = nn.Conv(
      2 * self.num_classes, (3, 3), name='class', bias_init=nn.initializers.constant(-4.6)
    )
    regress = nn.Conv(2 * 4, (3, 3), name='box')
    logits, deltas, priors = [], [], []
    for i, feature in enumerate(outs):
      y = nn.relu(nn.GroupNorm(num_groups=4)(tower(feature)))
      logits.append(classify(y).reshape(y.shape[0], -1, self.num_classes))
      deltas.append(regress(y).reshape(y.shape[0], -1, 4))
      priors.append(anchors(*feature.shape[1:3], 4 * 2**i))
    logits, deltas = jnp.concatenate(logits, 1), jnp.concatenate(deltas, 1)
    priors = jnp.asarray(np.concatenate(priors))[None]
    centers = deltas[..., :2] * priors[..., 2:] + priors[..., :2]
    extents = jnp.exp(jnp.clip(deltas[..., 2:], -4.0, 4.0)) * priors[..., 2:]
    boxes = jnp.concatenate([centers - extents / 2, centers + extents / 2], -1)
    boxes = jnp.clip(boxes, 0.0, float(images.shape[1]))
    scores = jax.nn.sigmoid(logits)
    best, where = lax.top_k(scores.max(-1), self.detections)
    return {
      'scores': best,
      'boxes': jnp.take_along_axis(boxes, where[..., None], axis=1),
      'classes': jnp.take_along_axis(jnp.argmax(scores, -1), where, axis=1),
    }


# Generator.


class Generator(nn.Module):
  features: int = 16

  @nn.compact
  def __call__(self, z):
    x = nn.Dense(4 * 4 * self.features)(z).reshape(z.shape[0], 4, 4, self.features)
    for i in range(3):
      x = nn.ConvTranspose(self.features // 2**i, (4, 4), (2, 2), padding='SAME', use_bias=False)(x)
      x = nn.leaky_relu(nn.InstanceNorm()(x), negative_slope=0.2)
    x = jnp.pad(x, ((0, 0), (3, 3), (3, 3), (0, 0)), mode='reflect')
    return nn.tanh(nn.Conv(3, (7, 7), padding='VALID')(x))


# Other libraries.


class NnxBlock(nnx.Module):
  def __init__(self, channels, out, stride, *, rngs):
    self.conv1 = nnx.Conv(channels, out, (3, 3), strides=stride, use_bias=False, rngs=rngs)
    self.norm1 = nnx.BatchNorm(out, rngs=rngs)
    self.conv2 = nnx.Conv(out, out, (3, 3), use_bias=False, rngs=rngs)
    self.norm2 = nnx.BatchNorm(out, rngs=rngs)
    self.down = nnx.Conv(channels, out, (1, 1), strides=stride, rngs=rngs) if stride > 1 else None

  def __call__(self, x):
    y = nnx.relu(self.norm1(self.conv1(x)))
    y = self.norm2(self.conv2(y))
    return nnx.relu(y + (x if self.down is None else self.down(x)))


class NnxResNet(nnx.Module):
  def __init__(self, rngs):
    self.stem = nnx.Conv(3, 8, (3, 3), rngs=rngs)
    self.blocks = nnx.List([NnxBlock(8, 8, 1, rngs=rngs), NnxBlock(8, 12, 2, rngs=rngs)])
    self.dropout = nnx.Dropout(0.3, rngs=rngs)
    self.head = nnx.Linear(12, 10, rngs=rngs)

  def __call__(self, x):
    x = self.stem(x)
    for block in self.blocks:
      x = block(x)
    return self.head(self.dropout(x.mean(axis=(1, 2))))


class EqxNet(eqx.Module):
  layers: list
  norm: eqx.nn.GroupNorm
  up: eqx.nn.ConvTranspose2d
  attention: eqx.nn.MultiheadAttention
  head: eqx.nn.MLP

  def __init__(self, key):
    keys = jax.random.split(key, 6)
    self.layers = [
      eqx.nn.Conv2d(3, 8, 4, stride=2, padding=1, key=keys[0]),
      jax.nn.relu,
      eqx.nn.MaxPool2d(3, 2),
      eqx.nn.Conv2d(8, 12, 3, padding=1, groups=4, key=keys[1]),
      jax.nn.silu,
      eqx.nn.AvgPool2d(2, 2),
    ]
    self.norm = eqx.nn.GroupNorm(3, 12)
    self.up = eqx.nn.ConvTranspose2d(12, 6, 4, stride=2, padding=1, key=keys[2])
    self.attention = eqx.nn.MultiheadAttention(2, 6, key=keys[3])
    self.head = eqx.nn.MLP(6, 10, 16, 1, key=keys[4])

  def __call__(self, x):
    for layer in self.layers:
      x = layer(x)
    x = self.up(self.norm(x))
    tokens = x.reshape(6, -1).T
    tokens = tokens + self.attention(tokens, tokens, tokens)
    return self.head(jnp.mean(tokens, axis=0))


def haiku_net(x, is_training=False):
  x = hk.Conv2D(8, 3, stride=2, with_bias=False)(x)
  x = jax.nn.relu(hk.BatchNorm(True, True, 0.9)(x, is_training))
  x = hk.avg_pool(x, (3, 3, 1), (2, 2, 1), 'SAME')
  x = jax.nn.relu(hk.DepthwiseConv2D(2, 3)(x))
  x = hk.max_pool(x, (2, 2, 1), (2, 2, 1), 'VALID')
  x = hk.GroupNorm(4)(hk.Conv2DTranspose(8, 3, stride=2)(x))
  x = hk.LayerNorm(-1, True, True)(jnp.mean(x, axis=[1, 2]))
  return hk.nets.MLP([16, 10])(x)


def _linen(module, shape=(32, 32, 3)):
  x = jax.ShapeDtypeStruct((1, *shape), jnp.float32)
  return Foreign(module.apply, jax.eval_shape(module.init, jax.random.key(0), x), shape)


def _nnx():
  graph, state = nnx.split(nnx.eval_shape(lambda: NnxResNet(nnx.Rngs(0))))

  def apply(state, x):
    model = nnx.merge(graph, state)
    model.eval()
    return model(x)

  return Foreign(apply, state, (16, 16, 3))


def _equinox():
  model = eqx.filter_eval_shape(EqxNet, jax.random.key(0))
  return Foreign(lambda m, x: jax.vmap(m)(x), model, (3, 32, 32))


def _haiku():
  net = hk.without_apply_rng(hk.transform_with_state(haiku_net))
  x = jax.ShapeDtypeStruct((1, 32, 32, 3), jnp.float32)
  variables = jax.eval_shape(lambda k, x: net.init(k, x, True), jax.random.key(0), x)
  return Foreign(lambda v, x: net.apply(*v, x)[0], variables, x.shape[1:])


NETWORKS: dict[str, Callable[[], Foreign]] = {
  'vit': lambda: _linen(ViT()),
  'convnext': lambda: _linen(ConvNeXt()),
  'efficientnet': lambda: _linen(EfficientNet()),
  'unet': lambda: _linen(UNet()),
  'detector': lambda: _linen(Detector()),
  'generator': lambda: _linen(Generator(), (8,)),
  'nnx': _nnx,
  'equinox': _equinox,
  'haiku': _haiku,
}


@functools.cache
def network(name: str) -> Foreign:
  """One of `NETWORKS`, with numbers for variables."""
  made = NETWORKS[name]()
  return made._replace(variables=numbers(made.variables))
