"""Published weights of MnasNet-A1 and ProxylessNAS-Mobile as variables of ours."""

from collections.abc import Mapping
from typing import Any, cast

from fqjax.models._importers import (
  _OIHW_TO_HWIO,
  _TORCH_DENSE,
  _TORCH_LEAF,
  Keys,
  Path,
  Rename,
  _fill,
  _need_rgb,
  _read,
)
from fqjax.models._network import Network
from fqjax.models._searched import MnasNet, ProxylessNas, Stage


def import_timm(weights: Path | Mapping[str, Any], model: Network) -> dict[str, Any]:
  """Reads MnasNet-A1 weights under timm's names; PyTorch is not needed.

  Args:
    weights: A .safetensors file of `semnasnet_100` (other widths: `semnasnet_075` and so on), or
      names to arrays (convolutions OIHW, dense [out, in]).
    model: `mnasnet_a1` of the file's number of classes and width, `convention='torch'`.

  Returns:
    {'params', 'batch_stats'} of float32 arrays.

  Raises:
    ValueError: As `import_torchvision`.

  Example:
    >>> model = create_model('mnasnet_a1')
    >>> variables = import_timm('semnasnet_100.safetensors', model)  # doctest: +SKIP

  Source: parameter names of timm's `efficientnet.py` and `_efficientnet_blocks.py` (input: RGB /
  255, minus (0.485, 0.456, 0.406), over (0.229, 0.224, 0.225)).
  """
  _need_rgb(model, 'import_timm', (MnasNet,), 'mnasnet_a1')
  model = cast(MnasNet, model)
  if model.convention != 'torch':
    raise ValueError(
      'these weights belong to symmetric padding and norm epsilon 1e-5.\n  Use '
      "create_model('mnasnet_a1', convention='torch')."
    )
  return _fill(model, _read(weights), _timm_name(model.stages))


def import_proxylessnas(weights: Path | Mapping[str, Any], model: Network) -> dict[str, Any]:
  """Reads ProxylessNAS-Mobile weights under the authors' names; PyTorch is not needed.

  Args:
    weights: Names to arrays (convolutions OIHW, dense [out, in]), the 'state_dict' of the released
      `proxyless_mobile.pth`, or a .safetensors file of it.
    model: `proxylessnas_mobile` of the same number of classes.

  Returns:
    {'params', 'batch_stats'} of float32 arrays.

  Raises:
    ValueError: As `import_torchvision`.

  Example:
    >>> model = create_model('proxylessnas_mobile')
    >>> variables = import_proxylessnas('proxyless_mobile.safetensors', model)  # doctest: +SKIP

  Source: parameter names of github.com/mit-han-lab/proxylessnas, `proxyless_nas/layers.py` and
  `nas_modules.py`.
  """
  _need_rgb(model, 'import_proxylessnas', (ProxylessNas,), 'proxylessnas_mobile')
  return _fill(model, _read(weights), _proxyless_name)


def _timm_name(stages: tuple[Stage, ...]) -> Rename:
  places = [(s, i) for s, stage in enumerate(stages) for i in range(stage.blocks)]
  outside = {
    ('stem', 'conv'): 'conv_stem',
    ('stem', 'bn'): 'bn1',
    ('head', 'conv'): 'conv_head',
    ('head', 'bn'): 'bn2',
  }
  expanded = {
    'expand': 'conv_pw',
    'expand_bn': 'bn1',
    'depthwise': 'conv_dw',
    'depthwise_bn': 'bn2',
    'se_reduce': 'se.conv_reduce',
    'se_expand': 'se.conv_expand',
    'project': 'conv_pwl',
    'project_bn': 'bn3',
  }
  # Without an expansion the norms count from one lower, and the projection is the one 'pw'.
  separable = expanded | {'depthwise_bn': 'bn1', 'project': 'conv_pw', 'project_bn': 'bn2'}

  def rename(keys: Keys) -> tuple[str, tuple[int, ...] | None]:
    _, block, *layer, leaf = keys
    if block == 'classifier':
      return _dense('classifier', leaf)
    if (block, layer[0]) in outside:
      name = outside[block, layer[0]]
    else:
      stage, i = places[int(block.removeprefix('block_'))]
      inside = expanded if stages[stage].expansion > 1 else separable
      name = f'blocks.{stage}.{i}.{inside[layer[0]]}'
    return _conv(name, leaf)

  return rename


_AUTHORS = {
  'stem': 'first_conv',
  'head': 'feature_mix_layer',
  'expand': 'inverted_bottleneck',
  'depthwise': 'depth_conv',
  'project': 'point_linear',
}
# Blocks the search left empty; the released weights number them all the same.
_EMPTY = (3, 4)


def _proxyless_name(keys: Keys) -> tuple[str, tuple[int, ...] | None]:
  _, block, *layer, leaf = keys
  if block == 'classifier':
    return _dense('classifier.linear', leaf)
  if block in _AUTHORS:
    return _conv(f'{_AUTHORS[block]}.{layer[0]}', leaf)
  index = int(block.removeprefix('block_'))
  index += len(_EMPTY) if index >= _EMPTY[0] else 0
  part = _AUTHORS[layer[0].removesuffix('_bn')]
  last = 'bn' if layer[0].endswith('_bn') else 'conv'
  return _conv(f'blocks.{index}.mobile_inverted_conv.{part}.{last}', leaf)


def _conv(name: str, leaf: str) -> tuple[str, tuple[int, ...] | None]:
  return f'{name}.{_TORCH_LEAF[leaf]}', _OIHW_TO_HWIO if leaf == 'kernel' else None


def _dense(name: str, leaf: str) -> tuple[str, tuple[int, ...] | None]:
  return f'{name}.{_TORCH_LEAF[leaf]}', _TORCH_DENSE if leaf == 'kernel' else None
