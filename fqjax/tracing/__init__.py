"""Any jittable function, read from its jaxpr: parameters, multiply-accumulates, and what follows."""

from fqjax.tracing._jaxpr import Body, Operation, Program, Value, flatten, open_body, trace
from fqjax.tracing._summary import Row, Summary, count_macs, summary

__all__ = [
  'Body',
  'Operation',
  'Program',
  'Row',
  'Summary',
  'Value',
  'count_macs',
  'flatten',
  'open_body',
  'summary',
  'trace',
]
