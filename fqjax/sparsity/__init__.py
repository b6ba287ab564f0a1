"""Which weights may live: structures, selection, plans, budgets, stored sizes, unused paths."""

from fqjax.sparsity._allocate import GRID as GRID
from fqjax.sparsity._allocate import allocate as allocate
from fqjax.sparsity._allocate_parts import allocate_blocks as allocate_blocks
from fqjax.sparsity._allocate_parts import tap_counts as tap_counts
from fqjax.sparsity._gates import Gates as Gates
from fqjax.sparsity._gates import Pooled as Pooled
from fqjax.sparsity._knapsack import Chosen as Chosen
from fqjax.sparsity._knapsack import knapsack as knapsack
from fqjax.sparsity._layers import Layer as Layer
from fqjax.sparsity._layers import trace_layers as trace_layers
from fqjax.sparsity._layout import from_kernels as from_kernels
from fqjax.sparsity._layout import from_rows as from_rows
from fqjax.sparsity._layout import kernel_shape as kernel_shape
from fqjax.sparsity._layout import to_kernels as to_kernels
from fqjax.sparsity._layout import to_rows as to_rows
from fqjax.sparsity._paths import Removed as Removed
from fqjax.sparsity._paths import Report as Report
from fqjax.sparsity._paths import Widths as Widths
from fqjax.sparsity._paths import remove_unused as remove_unused
from fqjax.sparsity._plan import Entry as Entry
from fqjax.sparsity._plan import Plan as Plan
from fqjax.sparsity._plan import check_masks as check_masks
from fqjax.sparsity._plan import describe as describe
from fqjax.sparsity._plan import make_plan as make_plan
from fqjax.sparsity._plan import project as project
from fqjax.sparsity._purify import purify as purify
from fqjax.sparsity._rules import LAYOUTS as LAYOUTS
from fqjax.sparsity._rules import PROTECTED as PROTECTED
from fqjax.sparsity._saliency import fisher as fisher
from fqjax.sparsity._saliency import loss_change as loss_change
from fqjax.sparsity._saliency import magnitude as magnitude
from fqjax.sparsity._saliency import taylor as taylor
from fqjax.sparsity._select import keep_count as keep_count
from fqjax.sparsity._select import kth_largest as kth_largest
from fqjax.sparsity._select import top_k_mask as top_k_mask
from fqjax.sparsity._select import top_k_masks as top_k_masks
from fqjax.sparsity._sizes import Sizes as Sizes
from fqjax.sparsity._sizes import Stored as Stored
from fqjax.sparsity._sizes import bits as bits
from fqjax.sparsity._sizes import cheapest as cheapest
from fqjax.sparsity._sizes import sizes as sizes
from fqjax.sparsity.structures import NM as NM
from fqjax.sparsity.structures import Bank as Bank
from fqjax.sparsity.structures import BlockMax as BlockMax
from fqjax.sparsity.structures import BlockPunched as BlockPunched
from fqjax.sparsity.structures import Blocks as Blocks
from fqjax.sparsity.structures import Both as Both
from fqjax.sparsity.structures import Channels as Channels
from fqjax.sparsity.structures import Columns as Columns
from fqjax.sparsity.structures import Darb as Darb
from fqjax.sparsity.structures import Filters as Filters
from fqjax.sparsity.structures import Patterns as Patterns
from fqjax.sparsity.structures import Structure as Structure
from fqjax.sparsity.structures import Unstructured as Unstructured
from fqjax.sparsity.structures import all_patterns as all_patterns
from fqjax.sparsity.structures import bank as bank
from fqjax.sparsity.structures import choose_exponents as choose_exponents
from fqjax.sparsity.structures import darb as darb
from fqjax.sparsity.structures import greedy_codebook as greedy_codebook
from fqjax.sparsity.structures import pattern_set as pattern_set
from fqjax.sparsity.structures import pattern_usage as pattern_usage
from fqjax.sparsity.structures import pcnn_codebook as pcnn_codebook
from fqjax.sparsity.structures import row_density as row_density
from fqjax.sparsity.structures import shrink_library as shrink_library
from fqjax.sparsity.structures import top_patterns as top_patterns

__all__ = [
  'GRID',
  'LAYOUTS',
  'NM',
  'PROTECTED',
  'Bank',
  'BlockMax',
  'BlockPunched',
  'Blocks',
  'Both',
  'Channels',
  'Chosen',
  'Columns',
  'Darb',
  'Entry',
  'Filters',
  'Gates',
  'Layer',
  'Patterns',
  'Plan',
  'Pooled',
  'Removed',
  'Report',
  'Sizes',
  'Stored',
  'Structure',
  'Unstructured',
  'Widths',
  'all_patterns',
  'allocate',
  'allocate_blocks',
  'bank',
  'bits',
  'cheapest',
  'check_masks',
  'choose_exponents',
  'darb',
  'describe',
  'fisher',
  'from_kernels',
  'from_rows',
  'greedy_codebook',
  'keep_count',
  'kernel_shape',
  'knapsack',
  'kth_largest',
  'loss_change',
  'magnitude',
  'make_plan',
  'pattern_set',
  'pattern_usage',
  'pcnn_codebook',
  'project',
  'purify',
  'remove_unused',
  'row_density',
  'shrink_library',
  'sizes',
  'tap_counts',
  'taylor',
  'to_kernels',
  'to_rows',
  'top_k_mask',
  'top_k_masks',
  'top_patterns',
  'trace_layers',
]
