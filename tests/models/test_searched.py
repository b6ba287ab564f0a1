"""MnasNet-A1 and ProxylessNAS-Mobile: sizes as published, values as an oracle's."""

import functools
import re
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import save_file

from fqjax.models import create_model, import_proxylessnas, import_timm, import_torchvision
from fqjax.models._searched import MnasNet, ProxylessNas, Stage
from fqjax.sparsity import trace_layers
from fqjax.tracing import summary, to_graph
from tests.models import reference


class Block(NamedTuple):
  kernel: int
  expansion: int
  out: int
  stride: int
  gate: bool = False


def stage(kernels, expansions, out, stride, gate=False):
  """One block per digit."""
  return [
    Block(int(k), int(e), out, stride if i == 0 else 1, gate)
    for i, (k, e) in enumerate(zip(kernels, expansions, strict=True))
  ]


# Written down once more, from the paper's figure and from the names of the layers in the authors'
# table of latencies.
STAGES = {
  'mnasnet_a1': [
    stage('3', '1', 16, 1),
    stage('33', '66', 24, 2),
    stage('555', '333', 40, 2, True),
    stage('3333', '6666', 80, 2),
    stage('33', '66', 112, 1, True),
    stage('555', '666', 160, 2, True),
    stage('3', '6', 320, 1),
  ],
  'proxylessnas_mobile': [
    stage('3', '1', 16, 1),
    stage('53', '33', 32, 2),
    stage('7355', '3333', 40, 2),
    stage('7555', '6333', 80, 2),
    stage('5555', '6333', 96, 1),
    stage('7777', '6633', 192, 2),
    stage('7', '6', 320, 1),
  ],
}
# A quarter of the width gives stem and first block the same eight channels.
SMALL = [stage('3', '1', 16, 1), stage('33', '66', 24, 2), stage('55', '33', 40, 2, True)]
SMALL_MNASNET = dict(
  stages=(Stage(3, 1, 16, 1, 1), Stage(3, 6, 24, 2, 2), Stage(5, 3, 40, 2, 2, squeeze=True)),
  width=0.25,
)
SMALL_PROXYLESS = dict(stages=(Stage(3, 1, 16, 1, 1), Stage(5, 3, 32, 1, 2), Stage(7, 3, 32, 1, 1)))


def wide(channels, width):
  """To the nearest multiple of eight; up where that would take more than a tenth away."""
  near = max(8, 8 * int(np.floor(channels * width / 8 + 0.5)))
  return near + 8 if near < 0.9 * channels * width else near


def cost(stages, size=224, width=1.0, classes=1000):
  """Parameters, those of them in norms, and multiply-accumulates, layer by layer."""
  params = norms = macs = 0

  def conv(kernel, into, out, side, bias=False):
    nonlocal params, norms, macs
    params += kernel**2 * into * out + (1 if bias else 2) * out
    norms += 0 if bias else 2 * out
    macs += kernel**2 * into * out * side**2

  side, into = -(-size // 2), wide(32, width)
  conv(3, 3, into, side)
  for block in sum(stages, []):
    hidden = into * block.expansion
    if block.expansion > 1:
      conv(1, into, hidden, side)
    side = -(-side // block.stride)
    conv(block.kernel, 1, hidden, side)
    if block.gate:
      conv(1, hidden, into // 4, 1, bias=True)
      conv(1, into // 4, hidden, 1, bias=True)
    out = wide(block.out, width)
    conv(1, hidden, out, side)
    into = out
  conv(1, into, 1280, side)
  return params + 1281 * classes, norms, macs + 1280 * classes


@functools.cache
def initial(model, *shape):
  x = jax.ShapeDtypeStruct(shape, jnp.float32)
  return jax.eval_shape(model.init, jax.random.key(0), x)


def paths(tree):
  return {
    jax.tree_util.keystr(path, simple=True, separator='/'): leaf
    for path, leaf in jax.tree.leaves_with_path(tree)
  }


def numbers(model, *shape, seed=0):
  """Random variables: compiling `init` would take longer than most tests."""
  rng = np.random.default_rng(seed)

  def draw(path, leaf):
    if path[-1].key in ('scale', 'var'):
      return jnp.asarray(rng.uniform(0.5, 1.5, leaf.shape), jnp.float32)
    if path[-2].key == 'se_reduce' and path[-1].key == 'bias':
      return jnp.ones(leaf.shape)  # Of so few units all may be dead otherwise.
    fan_in = int(np.prod(leaf.shape[:-1])) if path[-1].key == 'kernel' else 25
    return jnp.asarray(rng.normal(size=leaf.shape) * np.sqrt(2 / fan_in), jnp.float32)

  return jax.tree_util.tree_map_with_path(draw, initial(model, *shape))


def photo(n, size, seed=0):
  # Large enough to reach the six of a ReLU6.
  return 3 * np.random.default_rng(seed).normal(size=(n, size, size, 3)).astype(np.float32)


# 3.9 M and 312 M are the MnasNet paper's, the exact parameters those of other implementations.
@pytest.mark.parametrize(
  ('name', 'params', 'published'),
  [('mnasnet_a1', 3_887_038, 312), ('proxylessnas_mobile', 4_080_512, 320)],
)
def test_sizes_as_published(name, params, published):
  model, x = create_model(name), jax.ShapeDtypeStruct((1, 224, 224, 3), jnp.float32)
  variables = initial(model, *x.shape)
  leaves = paths(variables['params'])
  want, norms, macs = cost(STAGES[name])
  assert sum(leaf.size for leaf in leaves.values()) == params == want
  assert sum(leaf.size for leaf in jax.tree.leaves(variables['batch_stats'])) == norms
  assert summary(model.apply, variables, x).macs == macs
  assert abs(macs / 1e6 / published - 1) < 0.02
  # Every weight enters one product, read as it is stored.
  layers = trace_layers(model.apply, variables, x)
  kernels = {path: leaf for path, leaf in leaves.items() if path.endswith('kernel')}
  assert {path.removeprefix('params/') for path in layers} == set(kernels)
  for path, layer in layers.items():
    layout = 'HWIO' if kernels[path.removeprefix('params/')].ndim == 4 else 'IO'
    assert (layer.layout, layer.times) == (layout, 1), path


# The authors' table of MnasNet-A1: parameters and multiply-adds in M. The table counts one to two
# per cent more of the latter than convolutions and classifier have.
@pytest.mark.parametrize(
  ('width', 'params', 'published'), [(1.4, 6.1, 591.5), (0.75, 2.9, 226.7), (0.5, 2.1, 105.2)]
)
def test_mnasnet_widths_as_published(width, params, published):
  model, x = create_model('mnasnet_a1', width=width), jax.ShapeDtypeStruct((1, 224, 224, 3), 'f4')
  variables = initial(model, 1, 32, 32, 3)
  count = sum(leaf.size for leaf in jax.tree.leaves(variables['params']))
  want, _, macs = cost(STAGES['mnasnet_a1'], width=width)
  assert count == want and summary(model.apply, variables, x).macs == macs
  assert abs(count / 1e6 - params) <= 0.05 and 0.98 < macs / 1e6 / published < 1


@pytest.mark.parametrize('name', STAGES)
def test_names_and_shapes(name):
  params = paths(initial(create_model(name, num_classes=7), 1, 32, 32, 3)['params'])
  # Names chosen, none numbered by Flax.
  assert not [path for path in params if re.search(r'[A-Z]', path)]
  shapes = {path: leaf.shape for path, leaf in params.items()}
  assert shapes['stem/conv/kernel'] == (3, 3, 3, 32) and 'block_0/expand/kernel' not in shapes
  assert shapes['head/conv/kernel'] == (1, 1, 320, 1280) and shapes['classifier/kernel'] == (
    1280,
    7,
  )
  blocks = sum(STAGES[name], [])
  assert shapes[f'block_{len(blocks) - 1}/project/kernel'][-1] == 320
  assert f'block_{len(blocks)}/project/kernel' not in shapes
  gated = [i for i, block in enumerate(blocks) if block.gate]
  assert [i for i in range(99) if f'block_{i}/se_reduce/bias' in shapes] == gated
  if gated:
    # A quarter of the block's input, not of its expansion.
    assert shapes['block_3/se_reduce/kernel'] == (1, 1, 72, 6)
    assert shapes['block_3/se_expand/kernel'] == (1, 1, 6, 72)
    assert shapes['block_5/se_reduce/kernel'] == (1, 1, 120, 10)


def test_initial_values():
  init = jax.jit(lambda key: {  # the compiler leaves out the kernels nobody asks for
    type(model).__name__: model.init(key, jnp.ones((1, 32, 32, 3)))['params']['classifier']
    for model in (MnasNet(**SMALL_MNASNET, num_classes=100), ProxylessNas(**SMALL_PROXYLESS))
  })(jax.random.key(0))  # fmt: skip
  for name, fan in (('MnasNet', 100), ('ProxylessNas', 1280)):
    kernel, bound = init[name]['kernel'], 1 / np.sqrt(fan)
    assert 0.99 * bound < jnp.abs(kernel).max() <= bound and not init[name]['bias'].any()


# The networks in NumPy float64, channels first, from the names of the published weights.


class Names(NamedTuple):
  stem: tuple[str, str]
  head: tuple[str, str]
  dense: str
  blocks: list[dict[str, str]]


def timm_names(stages):
  full = dict(expand='conv_pw', expand_bn='bn1', depthwise='conv_dw', depthwise_bn='bn2')
  full |= dict(reduce='se.conv_reduce', excite='se.conv_expand', project='conv_pwl')
  full |= dict(project_bn='bn3')
  short = dict(depthwise='conv_dw', depthwise_bn='bn1', project='conv_pw', project_bn='bn2')
  blocks = [
    {k: f'blocks.{s}.{i}.{v}' for k, v in (full if block.expansion > 1 else short).items()}
    for s, stage in enumerate(stages)
    for i, block in enumerate(stage)
  ]
  return Names(('conv_stem', 'bn1'), ('conv_head', 'bn2'), 'classifier', blocks)


def authors_names(stages):
  parts = dict(expand='inverted_bottleneck', depthwise='depth_conv', project='point_linear')
  # Blocks 3 and 4 of the search are empty.
  numbers = [i for i in range(99) if i not in (3, 4)][: len(sum(stages, []))]
  blocks = []
  for i in numbers:
    prefix = f'blocks.{i}.mobile_inverted_conv'
    convs = {part: f'{prefix}.{name}.conv' for part, name in parts.items()}
    blocks.append(convs | {f'{part}_bn': f'{prefix}.{name}.bn' for part, name in parts.items()})
  first, last = 'first_conv', 'feature_mix_layer'
  return Names(
    (f'{first}.conv', f'{first}.bn'), (f'{last}.conv', f'{last}.bn'), 'classifier.linear', blocks
  )


def random_state(stages, names, width=1.0, classes=7):
  state = reference.State()

  def add(conv, norm, *shape):
    state.add_conv(conv, *shape)
    state.add_norm(norm, shape[0])

  into = wide(32, width)
  add(*names.stem, into, 3, 3)
  for block, name in zip(sum(stages, []), names.blocks, strict=True):
    hidden, out = into * block.expansion, wide(block.out, width)
    if block.expansion > 1:
      add(name['expand'], name['expand_bn'], hidden, into, 1)
    add(name['depthwise'], name['depthwise_bn'], hidden, 1, block.kernel)
    if block.gate:
      for part, shape in (('reduce', (into // 4, hidden)), ('excite', (hidden, into // 4))):
        state.add_conv(name[part], *shape, 1)
        state[f'{name[part]}.bias'] = state.rng.normal(size=shape[0]).astype(np.float32)
    add(name['project'], name['project_bn'], out, hidden, 1)
    into = out
  add(*names.head, 1280, into, 1)
  state.add_dense(names.dense, classes, 1280)
  return state


def forward(stages, names, state, x, act, epsilon, same=False):
  def step(x, conv, norm, stride=1, groups=1):
    kernel, padding = state[f'{conv}.weight'], None
    if same:
      side, size = x.shape[2], kernel.shape[2]
      total = max((-(-side // stride) - 1) * stride + size - side, 0)
      padding = (total // 2, total - total // 2)
    return reference.norm(reference.conv(x, kernel, stride, padding, groups), state, norm, epsilon)

  def linear(v, name):
    return v @ np.float64(state[f'{name}.weight'])[:, :, 0, 0].T + state[f'{name}.bias']

  x = act(step(x, *names.stem, 2))
  for i, (block, name) in enumerate(zip(sum(stages, []), names.blocks, strict=True)):
    y = act(step(x, name['expand'], name['expand_bn'])) if block.expansion > 1 else x
    y = act(step(y, name['depthwise'], name['depthwise_bn'], block.stride, y.shape[1]))
    if block.gate:
      logits = linear(reference.relu(linear(y.mean((2, 3)), name['reduce'])), name['excite'])
      y = y / (1 + np.exp(-logits))[:, :, None, None]
    y = step(y, name['project'], name['project_bn'])
    x = x + y if i > 0 and x.shape == y.shape else y
  return reference.dense(act(step(x, *names.head)), state, names.dense)


def check(model, variables, want, x):
  got = jax.jit(model.apply)(variables, jnp.asarray(x))
  assert got.dtype == jnp.float64
  np.testing.assert_allclose(got, want, rtol=1e-9, atol=1e-9 * np.abs(want).max())


def relu6(x):
  return np.clip(x, 0, 6)


@pytest.mark.parametrize('convention', ['torch', 'tf'])
def test_small_mnasnet_equals_the_oracle(convention, x64):
  names = timm_names(SMALL)
  state = random_state(SMALL, names, 0.25)
  variables = import_timm(state, MnasNet(num_classes=7, **SMALL_MNASNET))
  model = MnasNet(num_classes=7, dtype=jnp.float64, convention=convention, **SMALL_MNASNET)
  x, tf = photo(2, 36), convention == 'tf'
  epsilon = 1e-3 if tf else 1e-5
  want = forward(SMALL, names, state, x.transpose(0, 3, 1, 2), reference.relu, epsilon, tf)
  check(model, variables, want, x)


def test_mnasnet_equals_the_oracle(x64, tmp_path):
  stages = STAGES['mnasnet_a1']
  names = timm_names(stages)
  state = random_state(stages, names)
  assert {
    'blocks.0.0.conv_pw.weight': (16, 32, 1, 1),
    'blocks.2.0.se.conv_reduce.weight': (6, 72, 1, 1),
    'blocks.4.1.se.conv_expand.bias': (672,),
    'blocks.6.0.conv_pwl.weight': (320, 960, 1, 1),
  }.items() <= {name: array.shape for name, array in state.items()}.items()
  save_file(state, tmp_path / 'weights.safetensors')
  model = create_model('mnasnet_a1', num_classes=7, dtype=jnp.float64)
  variables = import_timm(tmp_path / 'weights.safetensors', model)
  x = photo(1, 64)
  want = forward(stages, names, state, x.transpose(0, 3, 1, 2), reference.relu, 1e-5)
  check(model, variables, want, x)


def test_proxylessnas_equals_the_oracle(x64, tmp_path):
  stages = STAGES['proxylessnas_mobile']
  names = authors_names(stages)
  state = random_state(stages, names)
  assert {
    'blocks.2.mobile_inverted_conv.depth_conv.conv.weight': (96, 1, 3, 3),
    'blocks.5.mobile_inverted_conv.depth_conv.conv.weight': (96, 1, 7, 7),
    'blocks.21.mobile_inverted_conv.point_linear.bn.running_mean': (320,),
  }.items() <= {name: array.shape for name, array in state.items()}.items()
  save_file(state, tmp_path / 'weights.safetensors')
  model = create_model('proxylessnas_mobile', num_classes=7, dtype=jnp.float64)
  variables = import_proxylessnas(tmp_path / 'weights.safetensors', model)
  x = photo(1, 64)
  want = forward(stages, names, state, x.transpose(0, 3, 1, 2), relu6, 1e-3)
  check(model, variables, want, x)


def test_what_is_for_other_networks():
  mnasnet, proxyless = create_model('mnasnet_a1'), create_model('proxylessnas_mobile')
  # torchvision's MnasNet is B1.
  with pytest.raises(ValueError, match='fills ResNet or MobileNetV2 or VGG .*, got MnasNet'):
    import_torchvision({}, mnasnet)
  with pytest.raises(ValueError, match=r"got ProxylessNas.\n  Use create_model\('mnasnet_a1'\).$"):
    import_timm({}, proxyless)
  with pytest.raises(ValueError, match=r'import_proxylessnas fills ProxylessNas .*, got MnasNet'):
    import_proxylessnas({}, mnasnet)
  with pytest.raises(ValueError, match=r"convention='torch'"):
    import_timm({}, create_model('mnasnet_a1', convention='tf'))
  with pytest.raises(ValueError, match=r'Missing .*blocks.0.0.bn1.bias.*\n.*Unknown \(1\): x'):
    import_timm({'x': np.ones(1)}, mnasnet)


# Tracing and training.


@pytest.mark.parametrize('name', STAGES)
def test_graphs(name):
  model, x = create_model(name), jax.ShapeDtypeStruct((1, 224, 224, 3), jnp.float32)
  variables = initial(model, *x.shape)
  graph = to_graph(model.apply, variables, x).graph
  assert set(graph.parameters) == set(paths(variables))
  assert graph.tensors[graph.outputs[0]].shape == ('n', 1000)
  blocks = sum(STAGES[name], [])
  ops = [node.op for node in graph.nodes]
  gates = sum(block.gate for block in blocks)
  assert ops.count('logistic') == gates
  assert ops.count('conv') == 2 + 3 * len(blocks) - 1 + 2 * gates
  groups = [n.attributes['groups'] for n in graph.nodes if n.op == 'conv']
  assert sum(g > 1 for g in groups) == len(blocks)


def test_the_graph_computes_what_the_network_computes():
  model = MnasNet(num_classes=3, **SMALL_MNASNET)
  variables, x = numbers(model, 1, 32, 32, 3), jnp.asarray(photo(3, 32))
  traced = to_graph(model.apply, variables, x[:1])
  got, want = jax.jit(lambda v, x: (traced(v, x), model.apply(v, x)))(variables, x)
  np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
  'model',
  [MnasNet(num_classes=3, **SMALL_MNASNET), ProxylessNas(num_classes=3, **SMALL_PROXYLESS)],
  ids=['mnasnet', 'proxylessnas'],
)
def test_a_training_step_reaches_every_parameter(model):
  variables, x = numbers(model, 1, 32, 32, 3), jnp.asarray(photo(8, 32))

  @jax.jit
  def gradients(variables, x):
    def loss(params):
      logits, state = model.apply(
        variables | {'params': params}, x, train=True, mutable=['batch_stats']
      )
      return jnp.mean(jnp.square(logits - 1.0)), state

    return jax.grad(loss, has_aux=True)(variables['params'])

  grads, state = gradients(variables, x)
  for path, gradient in paths(grads).items():
    assert jnp.isfinite(gradient).all() and jnp.abs(gradient).max() > 0, path
  before = paths(variables['batch_stats'])
  for path, after in paths(state['batch_stats']).items():
    assert (after != before[path]).any(), path


@pytest.mark.parametrize('name', STAGES)
def test_bfloat16_policy(name):
  model = create_model(name, dtype=jnp.bfloat16)
  x = jax.ShapeDtypeStruct((2, 32, 32, 3), jnp.float32)
  variables = initial(model, *x.shape)
  assert {leaf.dtype for leaf in jax.tree.leaves(variables)} == {jnp.dtype(jnp.float32)}
  eqns = jax.make_jaxpr(model.apply)(variables, x).eqns
  types = {}
  for eqn in eqns:
    types.setdefault(eqn.primitive.name, set()).add(eqn.outvars[0].aval.dtype)
  assert types['conv_general_dilated'] == {jnp.dtype(jnp.bfloat16)}
  # Norms, means (those in front of the gates too) and logits.
  for op in ('rsqrt', 'reduce_sum', 'dot_general'):
    assert types[op] == {jnp.dtype(jnp.float32)}, op
  assert types.get('logistic', {jnp.dtype(jnp.bfloat16)}) == {jnp.dtype(jnp.bfloat16)}
  assert eqns[-1].outvars[0].aval.dtype == jnp.float32


@pytest.mark.parametrize(
  ('name', 'shape', 'message'),
  [
    ('mnasnet_a1', (1, 28, 32, 3), r'at least 32 x 32, got x: \[1, 28, 32, 3\].\n  It halves them'),
    ('mnasnet_a1', (32, 32, 3), r'images \[n, h, w, 3\] .* got x: \[32, 32, 3\]'),
    ('proxylessnas_mobile', (1, 32, 32, 1), r'RGB images .* got x: \[1, 32, 32, 1\]'),
  ],
)
def test_errors_of_the_input(name, shape, message):
  with pytest.raises(ValueError, match=message):
    jax.eval_shape(create_model(name).init, jax.random.key(0), jnp.ones(shape))


@pytest.mark.parametrize(
  ('name', 'options', 'message'),
  [
    ('mnasnet', {}, r"no model 'mnasnet'.\n  Closest names: 'mnasnet_a1'"),
    ('mnasnet_a1', {'width': 0}, r'needs width > 0, got 0'),
    ('mnasnet_a1', {'convention': 'jax'}, r"takes convention = 'torch' or 'tf', got 'jax'"),
    ('mnasnet_a1', {'channels': 24}, r"'mnasnet_a1' takes no option 'channels'"),
    ('proxylessnas_mobile', {'width': 1.4}, r"takes no option 'width'"),
  ],
)
def test_errors_of_create_model(name, options, message):
  with pytest.raises(ValueError, match=message):
    create_model(name, **options)
