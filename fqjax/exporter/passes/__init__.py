"""Small functions graph -> graph; none changes what the graph computes beyond rounding."""

from fqjax.exporter.passes._activations import fuse_activations as fuse_activations
from fqjax.exporter.passes._activations import fuse_sums as fuse_sums
from fqjax.exporter.passes._batch_norm import fold_batch_norm as fold_batch_norm
from fqjax.exporter.passes._common import share_common as share_common
from fqjax.exporter.passes._constants import bind_parameters as bind_parameters
from fqjax.exporter.passes._constants import fold_constants as fold_constants
from fqjax.exporter.passes._freeze import freeze as freeze
from fqjax.exporter.passes._transposes import move_transposes as move_transposes
from fqjax.runtime.graph import rename as rename
from fqjax.runtime.graph import without_dead as without_dead

__all__ = [
  'bind_parameters',
  'fold_batch_norm',
  'fold_constants',
  'freeze',
  'fuse_activations',
  'fuse_sums',
  'move_transposes',
  'rename',
  'share_common',
  'without_dead',
]
