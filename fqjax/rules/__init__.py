"""Rules: optax transformations that prune any pytree under any optimizer."""

from fqjax.rules._admm import AdmmState as AdmmState
from fqjax.rules._admm import admm as admm
from fqjax.rules._admm import diagnostics as diagnostics
from fqjax.rules._admm import reset_duals as reset_duals
from fqjax.rules._dynamic import rigl as rigl
from fqjax.rules._dynamic import set_ as set_
from fqjax.rules._dynamic import static_sparse as static_sparse
from fqjax.rules._keep_masked import KeepMaskedState as KeepMaskedState
from fqjax.rules._keep_masked import keep_masked as keep_masked
from fqjax.rules._keep_ranges import keep_ranges as keep_ranges
from fqjax.rules._mapping import MappingState as MappingState
from fqjax.rules._mapping import mapped_share as mapped_share
from fqjax.rules._mapping import progressive_mapping as progressive_mapping
from fqjax.rules._masks_of import check_chain as check_chain
from fqjax.rules._masks_of import mask_averages as mask_averages
from fqjax.rules._masks_of import masks_of as masks_of
from fqjax.rules._progressive import Rung as Rung
from fqjax.rules._progressive import ladder as ladder
from fqjax.rules._progressive import progressive as progressive
from fqjax.rules._projection import finalize as finalize
from fqjax.rules._projection import frozen as frozen
from fqjax.rules._pruned import PrunedState as PrunedState
from fqjax.rules._pruned import masked_retraining as masked_retraining
from fqjax.rules._recalibrate import recalibrate as recalibrate
from fqjax.rules._refresh import RefreshState as RefreshState
from fqjax.rules._refresh import refresh_codebooks as refresh_codebooks
from fqjax.rules._scheduled import gradual as gradual
from fqjax.rules._scheduled import one_shot as one_shot
from fqjax.rules._scheduled import polynomial as polynomial
from fqjax.rules._straight_through import straight_through as straight_through
from fqjax.rules._tree import apply_masks as apply_masks

__all__ = [
  'AdmmState',
  'KeepMaskedState',
  'MappingState',
  'PrunedState',
  'RefreshState',
  'Rung',
  'admm',
  'apply_masks',
  'check_chain',
  'diagnostics',
  'finalize',
  'frozen',
  'gradual',
  'keep_masked',
  'keep_ranges',
  'ladder',
  'mapped_share',
  'mask_averages',
  'masked_retraining',
  'masks_of',
  'one_shot',
  'polynomial',
  'progressive',
  'progressive_mapping',
  'recalibrate',
  'refresh_codebooks',
  'reset_duals',
  'rigl',
  'set_',
  'static_sparse',
  'straight_through',
]
