"""From a function of JAX to a file that NumPy alone can run."""

from fqjax.exporter import onnx, passes
from fqjax.exporter._encode import encode as encode
from fqjax.exporter._export import Artifact as Artifact
from fqjax.exporter._export import Call as Call
from fqjax.exporter._export import export as export

__all__ = ['Artifact', 'Call', 'encode', 'export', 'onnx', 'passes']
