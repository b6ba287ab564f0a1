"""fqjax: vision networks made small and fast, and the proof of it.

The table of contents, one line per public name. Names load on first use, so that `import fqjax`
stays light and rooms that need no JAX can be imported without it.
"""

import importlib
import typing

__version__ = '0.1.0'

# public name -> the room it lives in
_HOME = {
  # whole networks
  'create_model': 'fqjax.models',
  'create_language_model': 'fqjax.models',
  'list_models': 'fqjax.models',
  # what a network costs
  'summary': 'fqjax.tracing',
  'can_export': 'fqjax.tracing',
  # the way out of JAX
  'export': 'fqjax.exporter',
  # which weights may live
  'make_plan': 'fqjax.sparsity',
  # frequencies
  'select_channels': 'fqjax.ops',
  'channel_subset': 'fqjax.ops',
}
_ROOMS = (
  'data',
  'exporter',
  'models',
  'nn',
  'ops',
  'quantize',
  'rules',
  'runtime',
  'sparsity',
  'tracing',
  'train',
)

__all__ = [  # noqa: RUF022 (the order of a table of contents)
  '__version__',
  'create_model',
  'create_language_model',
  'list_models',
  'summary',
  'can_export',
  'export',
  'make_plan',
  'select_channels',
  'channel_subset',
  'data',
  'exporter',
  'models',
  'nn',
  'ops',
  'quantize',
  'rules',
  'runtime',
  'sparsity',
  'tracing',
  'train',
]

if typing.TYPE_CHECKING:
  from fqjax import data as data
  from fqjax import exporter as exporter
  from fqjax import models as models
  from fqjax import nn as nn
  from fqjax import ops as ops
  from fqjax import quantize as quantize
  from fqjax import rules as rules
  from fqjax import runtime as runtime
  from fqjax import sparsity as sparsity
  from fqjax import tracing as tracing
  from fqjax import train as train
  from fqjax.exporter import export as export
  from fqjax.models import create_language_model as create_language_model
  from fqjax.models import create_model as create_model
  from fqjax.models import list_models as list_models
  from fqjax.ops import channel_subset as channel_subset
  from fqjax.ops import select_channels as select_channels
  from fqjax.sparsity import make_plan as make_plan
  from fqjax.tracing import can_export as can_export
  from fqjax.tracing import summary as summary


def __getattr__(name: str):
  if name in _HOME:
    return getattr(importlib.import_module(_HOME[name]), name)
  if name in _ROOMS:
    return importlib.import_module(f'fqjax.{name}')
  raise AttributeError(f'fqjax has no {name!r}; it has {", ".join(__all__)}')


def __dir__():
  return sorted(__all__)
