"""Whole networks with explicit layer names, and the weights they can start from."""

from fqjax.models._importers import import_torchvision as import_torchvision
from fqjax.models._importers import load_cifar_resnet_npz as load_cifar_resnet_npz
from fqjax.models._importers import load_mobilenet_v2_npz as load_mobilenet_v2_npz
from fqjax.models._importers_searched import import_proxylessnas as import_proxylessnas
from fqjax.models._importers_searched import import_timm as import_timm
from fqjax.models._lstm import LstmCarry as LstmCarry
from fqjax.models._lstm import LstmLanguageModel as LstmLanguageModel
from fqjax.models._lstm import create_language_model as create_language_model
from fqjax.models._registry import create_model as create_model
from fqjax.models._registry import list_models as list_models
from fqjax.models._rgb_to_dct import entry_features as entry_features
from fqjax.models._rgb_to_dct import fit_linear as fit_linear
from fqjax.models._rgb_to_dct import rgb_to_dct_variables as rgb_to_dct_variables

__all__ = [
  'LstmCarry',
  'LstmLanguageModel',
  'create_language_model',
  'create_model',
  'entry_features',
  'fit_linear',
  'import_proxylessnas',
  'import_timm',
  'import_torchvision',
  'list_models',
  'load_cifar_resnet_npz',
  'load_mobilenet_v2_npz',
  'rgb_to_dct_variables',
]
