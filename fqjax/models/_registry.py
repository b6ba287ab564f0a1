"""Networks by name."""

from collections.abc import Mapping
import dataclasses
import difflib
import fnmatch
from typing import Any

from fqjax.models._alexnet import AlexNet
from fqjax.models._lenet import LeNet5
from fqjax.models._lstm import LANGUAGE_MODEL
from fqjax.models._mobilenet_v2 import MobileNetV2
from fqjax.models._network import Network
from fqjax.models._resnet import CifarResNet, ResNet
from fqjax.models._searched import MnasNet, ProxylessNas
from fqjax.models._vgg import VGG, CifarVGG, VGGSmall


@dataclasses.dataclass(frozen=True)
class _Entry:
  """A name of `create_model`: class, what the name fixes, what the caller may choose."""

  cls: type[Network]
  fixed: Mapping[str, Any]
  defaults: Mapping[str, Any]
  options: tuple[str, ...]


_COMMON = ('dtype', 'norm_groups', 'norm_momentum')
_BY_ENTRY = {
  'rgb': (),
  'dct': ('channels', 'gate', 'gate_sample_at_eval'),
  'patchify': ('channels', 'block'),
}


def _entries() -> dict[str, _Entry]:
  entries = {}

  def add(name, cls, fixed, options, defaults=None, rgb=(), blocks=()):
    for entry, own in _BY_ENTRY.items():
      extra = rgb if entry == 'rgb' else blocks
      entries[name if entry == 'rgb' else f'{name}_{entry}'] = _Entry(
        cls,
        {'entry': entry, **fixed},
        {'num_classes': 1000, **(defaults or {})},
        (*own, *extra, *options, *_COMMON),
      )

  for name, stages, bottleneck in (
    ('resnet18', (2, 2, 2, 2), False),
    ('resnet34', (3, 4, 6, 3), False),
    ('resnet50', (3, 4, 6, 3), True),
    ('resnet101', (3, 4, 23, 3), True),
  ):
    fixed = {'stages': stages, 'bottleneck': bottleneck}
    add(name, ResNet, fixed, ('zero_init_residual',), blocks=('stage2_stride',))
  add('mobilenet_v2', MobileNetV2, {}, ('width', 'convention'))
  cifar = {'num_classes': 10, 'block': 4}
  for name, blocks in (('cifar_resnet20', 3), ('cifar_resnet32', 5), ('cifar_resnet56', 9)):
    options = ('width', 'zero_init_residual')
    add(name, CifarResNet, {'blocks': blocks}, options, cifar, rgb=('stem_stride',))
  fixed = {'stages': (2, 2, 2, 2), 'cifar_stem': True}
  options = ('width', 'zero_init_residual')
  add('cifar_resnet18', ResNet, fixed, options, cifar, blocks=('stage2_stride',))

  for name, cls, num_classes, options in (
    ('lenet5', LeNet5, 10, ('dropout', 'dtype')),
    ('alexnet', AlexNet, 1000, ('dropout', 'dtype')),
    ('vgg16', VGG, 1000, ('batch_norm', 'dropout', *_COMMON)),
    ('cifar_vgg16', CifarVGG, 10, ('width', *_COMMON)),
    ('vgg_small', VGGSmall, 10, ('width', *_COMMON)),
    ('mnasnet_a1', MnasNet, 1000, ('width', 'convention', *_COMMON)),
    ('proxylessnas_mobile', ProxylessNas, 1000, _COMMON),
  ):
    entries[name] = _Entry(cls, {}, {'num_classes': num_classes}, options)
  return entries


_MODELS = _entries()


def list_models(pattern: str = '*') -> list[str]:
  """Names `create_model` knows, sorted; `pattern` as in a shell.

  Example:
    >>> list_models('resnet50*')
    ['resnet50', 'resnet50_dct', 'resnet50_patchify']
  """
  return fnmatch.filter(sorted(_MODELS), pattern)


def create_model(name: str, *, num_classes: int | None = None, **options: Any) -> Network:
  """Makes a Linen network by name.

  A plain name takes RGB images [n, h, w, 3]. `NAME_dct` takes DCT maps [n, h/8, w/8, channels]
  in place of the stem (ResNet-50: 56 x 56 from 448 x 448 images; MobileNetV2: 112 x 112 from 896;
  CIFAR ResNets: 8 x 8 from 4 x 4 blocks of 32). `NAME_patchify` is its equal-cost control: RGB
  images of full size through one `block` x `block` / `block` convolution and a batch norm.

  The others take images only: `mnasnet_a1`, `proxylessnas_mobile` (224 x 224 as published) and
  `cifar_vgg16` of any size from 32 x 32, the rest of one size: `lenet5` [n, 28, 28, 1], `vgg_small`
  [n, 32, 32, 3], `alexnet` [n, 227, 227, 3], `vgg16` [n, 224, 224, 3].

  `model.apply(variables, x, train=False)` returns float32 logits [n, num_classes]; collections
  `params` and, with batch norm, `batch_stats`. Training needs `train=True`,
  `mutable=['batch_stats']`, with dropout `rngs={'dropout': key}` and, if gated, 'gates' among the
  mutable ones to see the choice and `rngs={'gate': key}`.

  Args:
    name: See `list_models`.
    num_classes: 1000 if None, 10 for LeNet-5, VGG-small and the CIFAR networks.
    **options: Those the name takes. All: `dtype` (of the computation, e.g. jnp.bfloat16). With
      batch norm: `norm_groups`, `norm_momentum`. `_dct`: `channels`, `gate` (True or 'global'),
      `gate_sample_at_eval`. `_patchify`: `channels`, `block`. ResNets: `zero_init_residual`; of
      64 channels, with DCT or patchify, `stage2_stride` (2, or 1 as in the paper's public code).
      MobileNetV2, MnasNet: `width`, `convention` ('torch' or 'tf': padding and norm epsilon of the
      weights' origin). CIFAR, VGG-small: `width`; ResNet-20, 32, 56 for RGB `stem_stride`. LeNet-5,
      AlexNet, VGG-16: `dropout` of the hidden dense layers (0; published: 0.5). VGG-16:
      `batch_norm` (False).

  Raises:
    ValueError: An unknown name, an option the network does not take, or a value it cannot have.

  Example:
    >>> model = create_model('cifar_resnet20_dct', channels=6)
    >>> variables = jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, 8, 8, 6)))
    >>> variables['params']['layer1_0']['conv1']['kernel'].shape
    (3, 3, 6, 16)

  Source: arXiv 1512.03385, 1801.04381, 2002.12416; of the others their classes.
  """
  if name == LANGUAGE_MODEL:
    raise ValueError(
      f'{name!r} reads words, not images: create_language_model({name!r}, vocab_size=...).'
    )
  if name not in _MODELS:
    close = difflib.get_close_matches(name, _MODELS, n=4, cutoff=0.4) or list_models()
    raise ValueError(
      f'there is no model {name!r}.\n  Closest names: {", ".join(map(repr, close))}; '
      'list_models() names all.'
    )
  entry = _MODELS[name]
  for option in options:
    if option not in entry.options:
      raise ValueError(_unknown_option(name, option))
  settings = {k: v for k, v in entry.defaults.items() if k == 'num_classes' or k in entry.options}
  settings |= options
  if num_classes is not None:
    settings['num_classes'] = num_classes
  _check(name, settings)
  return entry.cls(**entry.fixed, **settings)


def _unknown_option(name: str, option: str) -> str:
  takes = _MODELS[name].options
  close = difflib.get_close_matches(option, takes, n=1)
  hint = f' Did you mean {close[0]!r}?' if close else ''
  family = name.removesuffix('_dct').removesuffix('_patchify')
  others = [
    other for other in list_models(f'{family}*') if option in _MODELS[other].options and not hint
  ]
  if others:
    hint = f' {", ".join(map(repr, others))} would take it.'
  return (
    f'model {name!r} takes no option {option!r}.{hint}\n'
    f'  It takes: num_classes, {", ".join(takes)}.'
  )


def _check(name: str, settings: Mapping[str, Any]) -> None:
  for option in ('num_classes', 'channels', 'block', 'norm_groups'):
    value = settings.get(option, 1)
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
      raise ValueError(f'model {name!r} needs {option} >= 1, a whole number, got {value!r}.')
  for option, allowed in (
    ('stage2_stride', (1, 2)),
    ('stem_stride', (1, 2, 4)),
    ('gate', (False, True, 'global')),
    ('convention', ('torch', 'tf')),
    ('batch_norm', (False, True)),
  ):
    if option in settings and settings[option] not in allowed:
      raise ValueError(
        f'model {name!r} takes {option} = {" or ".join(map(repr, allowed))}, '
        f'got {settings[option]!r}.'
      )
  if not settings.get('width', 1.0) > 0:
    raise ValueError(f'model {name!r} needs width > 0, got {settings["width"]!r}.')
  if not 0 <= settings.get('dropout', 0.0) < 1:
    raise ValueError(
      f'model {name!r} needs 0 <= dropout < 1, the share dropped, got {settings["dropout"]!r}.'
    )
