"""The graph as ONNX, for other engines (extra `fqjax[onnx]`)."""

from fqjax.exporter.onnx._to_onnx import onnx_size as onnx_size
from fqjax.exporter.onnx._to_onnx import to_onnx as to_onnx

__all__ = ['onnx_size', 'to_onnx']
