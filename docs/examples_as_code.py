"""Griffe extension: shows the `Example:` part of a docstring as code.

Griffe knows `Examples:` alone; `Example:`, which Google style allows as well, would become a box
of prose in which `['layer']['kernel']` looks like a link.
"""

import re
from typing import Any

import griffe


class ExamplesAsCode(griffe.Extension):
  """Reads `Example:` as `Examples:`."""

  def on_object(self, *, obj: griffe.Object, **kwargs: Any) -> None:
    """Called for each documented object, before its docstring is parsed."""
    del kwargs
    if obj.docstring is not None:
      obj.docstring.value = re.sub(r'(?m)^(\s*)Example:$', r'\1Examples:', obj.docstring.value)
