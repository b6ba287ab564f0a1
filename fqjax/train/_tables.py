"""Tables of the report: numbers with the digits that mean something."""

from collections.abc import Sequence
import html
import math
import numbers
from typing import Any, NamedTuple

import numpy as np


class Table(NamedTuple):
  """A table of the report.

  Attributes:
    title: heading above it.
    head: names of the columns; the first column names the rows.
    rows: cells: text, a number, a pair (value, standard error), or None for empty.
    note: one sentence below it.
  """

  title: str
  head: Sequence[str]
  rows: Sequence[Sequence[Any]]
  note: str = ''


def cell_text(value: Any) -> str:
  """A cell: numbers with the digits that mean something, pairs as value ± error, escaped."""
  if value is None:
    return ''
  if isinstance(value, tuple) and len(value) == 2:
    middle, spread = value
    if spread is None or not math.isfinite(spread) or spread <= 0:
      return cell_text(middle)
    places = max(0, 1 - math.floor(math.log10(spread)))
    return f'{middle:,.{places}f}&nbsp;± {spread:,.{places}f}'
  if isinstance(value, (bool, np.bool_)):
    return 'yes' if value else 'no'
  if isinstance(value, numbers.Integral):
    return f'{int(value):,}'
  if isinstance(value, numbers.Real):
    number = float(value)
    if number == int(number) if math.isfinite(number) else False:
      return f'{number:,.0f}'
    return f'{number:,.1f}' if abs(number) >= 1000 else f'{number:.4g}'
  return html.escape(str(value))


def column_texts(cells: Sequence[Any]) -> list[str]:
  """Cells of one column; fractions get equally many decimals."""
  texts = [cell_text(cell) for cell in cells]
  plain = [isinstance(cell, numbers.Real) and math.isfinite(cell) for cell in cells]
  places = [
    len(t.partition('.')[2]) for t, p in zip(texts, plain, strict=True) if p and 'e' not in t
  ]
  if not places or max(places) == 0:
    return texts
  most = max(places)
  return [f'{c:,.{most}f}' if p else t for c, p, t in zip(cells, plain, texts, strict=True)]


def _is_number(value: Any) -> bool:
  return isinstance(value, (numbers.Real, tuple)) and not isinstance(value, bool)


def table_html(table: Table) -> str:
  """A table in a box that scrolls sideways where it is too wide."""
  width = len(table.head)
  for row in table.rows:
    if len(row) != width:
      raise ValueError(f'table {table.title!r} has {width} columns and a row of {len(row)}: {row}')
  right = [
    any(_is_number(row[i]) for row in table.rows)
    and all(row[i] is None or _is_number(row[i]) for row in table.rows)
    for i in range(width)
  ]
  side = [' class="number"' if r else '' for r in right]
  texts = [column_texts(column) for column in zip(*table.rows, strict=True)]
  head = ''.join(
    f'<th scope="col"{s}>{html.escape(name)}</th>' for name, s in zip(table.head, side, strict=True)
  )
  body = ''.join(
    '<tr>'
    + f'<th scope="row"{side[0]}>{row[0]}</th>'
    + ''.join(f'<td{s}>{cell}</td>' for cell, s in zip(row[1:], side[1:], strict=True))
    + '</tr>'
    for row in zip(*texts, strict=True)
  )
  note = f'<p class="note">{html.escape(table.note)}</p>' if table.note else ''
  return (
    f'<h3>{html.escape(table.title)}</h3>'
    f'<div class="scroll" tabindex="0" role="region" aria-label="{html.escape(table.title)}">'
    f'<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>{note}'
  )
