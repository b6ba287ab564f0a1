"""Stored forms of pruned arrays, one file per format, NumPy only.

Every format has

    encode(array, ...)                  -> Encoded, a NamedTuple of arrays and small numbers
    decode(encoded)                     -> the array, bit for bit
    bits(encoded, value_bits=None)      -> Bits(values, index, tables, padding)
    to_bytes(encoded, value_bits=None)  -> the file
    from_bytes(data, limit=...)         -> Encoded

What lives is judged by bits: without a mask every entry but +0 is stored, so -0.0 and NaN payloads
come back (`w + 0.0` turns -0.0 into +0 where they only cost). Values are NumPy floats or integers of
any width, bfloat16 as its raw bits (`w.view(np.uint16)`).

`value_bits` says how many bits a value takes: integers that fit are packed, e.g. 4 for the indices of
a codebook of 16. `bits` also answers what any other number would cost. Its sum is exactly
`8 * len(to_bytes(...))`; the header counts as `tables`, zero bits that fill up bytes as `padding`.

Files are little endian, fields packed least significant bit first, sections begin on bytes; see
`_container`. `from_bytes` trusts nothing: what is cut off, out of range, not ascending or left over
raises ValueError naming format, section and byte, and no shape beyond `limit` entries is believed.

    matrices [R, C]    csr, nm, blocks, bank, darb
    kernels [O, I, M]  punched, pcnn, patterns, fkw      M taps, row-major
    any shape          dense, bitmask, relative, rice, slices
"""

from types import ModuleType

from fqjax.runtime.codecs import bank as bank
from fqjax.runtime.codecs import bitmask as bitmask
from fqjax.runtime.codecs import blocks as blocks
from fqjax.runtime.codecs import csr as csr
from fqjax.runtime.codecs import darb as darb
from fqjax.runtime.codecs import dense as dense
from fqjax.runtime.codecs import fkw as fkw
from fqjax.runtime.codecs import nm as nm
from fqjax.runtime.codecs import patterns as patterns
from fqjax.runtime.codecs import pcnn as pcnn
from fqjax.runtime.codecs import punched as punched
from fqjax.runtime.codecs import relative as relative
from fqjax.runtime.codecs import rice as rice
from fqjax.runtime.codecs import slices as slices
from fqjax.runtime.codecs._container import Bits as Bits

CODECS: dict[str, ModuleType] = {
  'dense': dense,
  'bitmask': bitmask,
  'csr': csr,
  'relative': relative,
  'rice': rice,
  'nm': nm,
  'blocks': blocks,
  'slices': slices,
  'punched': punched,
  'bank': bank,
  'darb': darb,
  'pcnn': pcnn,
  'patterns': patterns,
  'fkw': fkw,
}
