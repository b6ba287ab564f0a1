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
  'list_models': 'fqjax.models',
  # what a network costs
  'summary': 'fqjax.tracing',
  # frequencies
  'select_channels': 'fqjax.ops',
  'channel_subset': 'fqjax.ops',
}
_ROOMS = ('data', 'models', 'nn', 'ops', 'tracing', 'train')

__all__ = ['__version__', *_HOME, *_ROOMS]

if typing.TYPE_CHECKING:
  from fqjax import data, models, nn, ops, tracing, train
  from fqjax.models import create_model, list_models
  from fqjax.ops import channel_subset, select_channels
  from fqjax.tracing import summary


def __getattr__(name: str):
  if name in _HOME:
    return getattr(importlib.import_module(_HOME[name]), name)
  if name in _ROOMS:
    return importlib.import_module(f'fqjax.{name}')
  raise AttributeError(f'fqjax has no {name!r}; it has {", ".join(__all__)}')


def __dir__():
  return sorted(__all__)
