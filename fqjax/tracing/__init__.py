"""Any jittable function, read from its jaxpr: parameters, multiply-accumulates, graphs."""

from fqjax.tracing._can_export import can_export
from fqjax.tracing._evaluate import evaluate, evaluate_node
from fqjax.tracing._graph import Traced, to_graph
from fqjax.tracing._jaxpr import (
  Body,
  Operation,
  Program,
  Value,
  flatten,
  leaf_name,
  open_body,
  trace,
)
from fqjax.tracing._source import Obstacle, Report
from fqjax.tracing._summary import Row, Summary, summary
from fqjax.tracing.reader import count_macs

__all__ = [
  'Body',
  'Obstacle',
  'Operation',
  'Program',
  'Report',
  'Row',
  'Summary',
  'Traced',
  'Value',
  'can_export',
  'count_macs',
  'evaluate',
  'evaluate_node',
  'flatten',
  'leaf_name',
  'open_body',
  'summary',
  'to_graph',
  'trace',
]
