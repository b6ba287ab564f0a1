"""How weights may be zero: frozen, hashable structures, each with its projection."""

from fqjax.sparsity.structures._base import Structure as Structure
from fqjax.sparsity.structures.blocks import BlockPunched as BlockPunched
from fqjax.sparsity.structures.blocks import Blocks as Blocks
from fqjax.sparsity.structures.blocks import Both as Both
from fqjax.sparsity.structures.blocks import Channels as Channels
from fqjax.sparsity.structures.blocks import Columns as Columns
from fqjax.sparsity.structures.blocks import Filters as Filters
from fqjax.sparsity.structures.codebooks import all_patterns as all_patterns
from fqjax.sparsity.structures.codebooks import greedy_codebook as greedy_codebook
from fqjax.sparsity.structures.codebooks import pattern_set as pattern_set
from fqjax.sparsity.structures.codebooks import pattern_usage as pattern_usage
from fqjax.sparsity.structures.codebooks import pcnn_codebook as pcnn_codebook
from fqjax.sparsity.structures.codebooks import shrink_library as shrink_library
from fqjax.sparsity.structures.codebooks import top_patterns as top_patterns
from fqjax.sparsity.structures.element import NM as NM
from fqjax.sparsity.structures.element import Unstructured as Unstructured
from fqjax.sparsity.structures.patterns import Patterns as Patterns
from fqjax.sparsity.structures.rows import Bank as Bank
from fqjax.sparsity.structures.rows import BlockMax as BlockMax
from fqjax.sparsity.structures.rows import Darb as Darb
from fqjax.sparsity.structures.rows import bank as bank
from fqjax.sparsity.structures.rows import choose_exponents as choose_exponents
from fqjax.sparsity.structures.rows import darb as darb
from fqjax.sparsity.structures.rows import row_density as row_density
