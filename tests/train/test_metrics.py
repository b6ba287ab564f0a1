import math

import jax
import jax.numpy as jnp

from fqjax.train import JsonLines, compile_count, memory_bytes, read_json_lines
from fqjax.train.metrics import format_line


def test_json_lines_resume_drops_later_and_unfinished_lines(tmp_path):
  path = tmp_path / 'metrics.jsonl'
  writer = JsonLines(path)
  writer.resume(0)
  for step in (1, 2, 3):
    writer.write(step, {'loss': 1 / step, 'bad': math.nan, 'count': step})
  writer.flush()
  writer.close()
  assert 'NaN' not in path.read_text()
  with open(path, 'a') as f:
    f.write('{"step": 4, "lo')  # killed while writing
  records = read_json_lines(path)
  assert [r['step'] for r in records] == [1, 2, 3]
  assert math.isnan(records[0]['bad']) and records[2]['count'] == 3
  writer = JsonLines(path)
  writer.resume(2)
  writer.write(3, {'loss': 9.0})
  writer.close()
  assert [(r['step'], r['loss']) for r in read_json_lines(path)] == [(1, 1), (2, 0.5), (3, 9)]
  assert read_json_lines(tmp_path / 'none') == []
  assert [p.name for p in tmp_path.iterdir()] == ['metrics.jsonl']


def test_console_lines_are_aligned():
  lines = [format_line(step, 10_000, {'loss': 0.5, 'n': 3}) for step in (1, 10_000)]
  assert len(lines[0]) == len(lines[1])
  assert lines[1] == ' 10000/10000 100%  loss 0.5000  n 3'


def test_compile_count_counts_programs():
  compile_count()
  f = jax.jit(lambda x: x * 3 + 1)
  x, y = jnp.ones(3), jnp.ones(4)
  before = compile_count()
  f(x)
  f(x)
  assert compile_count() == before + 1
  f(y)
  assert compile_count() == before + 2


def test_memory_is_plausible():
  assert 10e6 < memory_bytes() < 1e12
