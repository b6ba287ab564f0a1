"""Linen layers over pure functions: channel gate, normalisation, pooling."""

from fqjax.nn._batch_norm import BatchNorm as BatchNorm
from fqjax.nn._gate import ChannelGate as ChannelGate
from fqjax.nn._gate import gate_penalty as gate_penalty
from fqjax.nn._gate import gumbel_gate as gumbel_gate
from fqjax.nn._gate import gumbel_noise as gumbel_noise
from fqjax.nn._local_response_norm import local_response_norm as local_response_norm
from fqjax.nn._max_pool import max_pool as max_pool
from fqjax.nn._selection import SelectionState as SelectionState
from fqjax.nn._selection import init_selection as init_selection
from fqjax.nn._selection import merge_selections as merge_selections
from fqjax.nn._selection import selection_frequency as selection_frequency
from fqjax.nn._selection import update_selection as update_selection

__all__ = [
  'BatchNorm',
  'ChannelGate',
  'SelectionState',
  'gate_penalty',
  'gumbel_gate',
  'gumbel_noise',
  'init_selection',
  'local_response_norm',
  'max_pool',
  'merge_selections',
  'selection_frequency',
  'update_selection',
]
