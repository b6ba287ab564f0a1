"""Runs a graph with NumPy alone: float operations, and the integer arithmetic of docs/format.md.

The integer results are the definition: every other executor equals them bit for bit.
"""

from fqjax.runtime.reference._integer import accumulator_bounds as accumulator_bounds
from fqjax.runtime.reference._integer import dequantize as dequantize
from fqjax.runtime.reference._integer import quantize as quantize
from fqjax.runtime.reference._integer import requantize as requantize
from fqjax.runtime.reference._run import run as run
from fqjax.runtime.reference._run import run_node as run_node

__all__ = ['accumulator_bounds', 'dequantize', 'quantize', 'requantize', 'run', 'run_node']
