"""Pictures of pruned networks, as Matplotlib figures that share no global state.

Each function returns a `matplotlib.figure.Figure`; save it with `figure.savefig(path)`, hand it to
`fqjax.train.write_report`, or let it be the last line of a notebook cell after `%matplotlib inline`.
"""

from fqjax.sparsity._plots_matrix import feature_maps as feature_maps
from fqjax.sparsity._plots_matrix import row_densities as row_densities
from fqjax.sparsity._plots_matrix import row_sensitivity as row_sensitivity
from fqjax.sparsity._plots_matrix import survivors as survivors
from fqjax.sparsity._plots_network import Point as Point
from fqjax.sparsity._plots_network import accuracy_against_rate as accuracy_against_rate
from fqjax.sparsity._plots_network import kept_per_layer as kept_per_layer
from fqjax.sparsity._plots_network import pattern_histogram as pattern_histogram

__all__ = [
  'Point',
  'accuracy_against_rate',
  'feature_maps',
  'kept_per_layer',
  'pattern_histogram',
  'row_densities',
  'row_sensitivity',
  'survivors',
]
