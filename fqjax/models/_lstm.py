"""A language model of LSTM layers, its carry explicit."""

from typing import Any, NamedTuple

from flax import linen as nn
import jax
from jax import lax
import jax.numpy as jnp

from fqjax.nn._batch_norm import at_least_float32

LANGUAGE_MODEL = 'lstm_lm'


class LstmCarry(NamedTuple):
  """What one LSTM layer hands on from word to word.

  Attributes:
    cell: [n, hidden], float32 at least.
    hidden: [n, hidden], float32 at least: the layer's output.
  """

  cell: jax.Array
  hidden: jax.Array


Carry = tuple[LstmCarry, ...]


class LstmLanguageModel(nn.Module):
  """Word vectors, LSTM layers, one dense layer over the words; see `create_language_model`.

  The four gates of a layer are one matrix for its input and one for its own output of the word
  before, `lstm0/input/kernel` [in, 4 * hidden] and `lstm0/hidden/kernel` [hidden, 4 * hidden]:
  columns input gate, forget gate, candidate, output gate (`fqjax.sparsity.Gates` prunes each by
  itself).

  Attributes:
    vocab_size: Number of words.
    hidden: Units of each layer, and size of a word's vector.
    num_layers: LSTM layers.
    dropout: Share of the units dropped in training between the layers, before the first and behind
      the last.
    tied: The output layer's weights are the table of word vectors.
    init_scale: All parameters begin uniformly within +-init_scale.
    dtype: Type of the matrix products. Parameters, gates, carry and logits are float32.

  Source: arXiv 1409.2329, equations of section 3; tied weights arXiv 1608.05859.
  """

  vocab_size: int
  hidden: int = 650
  num_layers: int = 2
  dropout: float = 0.0
  tied: bool = False
  init_scale: float = 0.05
  dtype: Any = jnp.float32

  def initial_carry(self, n: int) -> Carry:
    """The carry before the first word: zeros, one `LstmCarry` of [n, hidden] for each layer."""
    zeros = jnp.zeros((n, self.hidden), at_least_float32(self.dtype))
    return (LstmCarry(zeros, zeros),) * self.num_layers

  @nn.compact
  def __call__(
    self, tokens: jax.Array, carry: Carry, train: bool = False
  ) -> tuple[jax.Array, Carry]:
    """Returns logits [n, t, vocab_size] float32 of `tokens` [n, t], and the carry behind them."""
    _check(self, tokens, carry)
    dtype = at_least_float32(self.dtype)
    init = _uniform(self.init_scale)
    embed = nn.Embed(self.vocab_size, self.hidden, embedding_init=init, name='embed')
    x, behind = embed(tokens).astype(self.dtype), []
    for layer, before in enumerate(carry):
      x = nn.Dropout(self.dropout, deterministic=not train, name=f'dropout{layer}')(x)
      x, last = _Lstm(self.hidden, init, self.dtype, name=f'lstm{layer}')(x, before)
      behind.append(last)
    x = nn.Dropout(self.dropout, deterministic=not train, name='output_dropout')(x).astype(dtype)
    if self.tied:
      bias = self.param('output_bias', init, (self.vocab_size,))
      logits = x @ embed.embedding.astype(dtype).T + bias.astype(dtype)[None, None]
    else:
      dense = nn.Dense(
        self.vocab_size, kernel_init=init, bias_init=init, dtype=dtype, name='output'
      )
      logits = dense(x)
    return logits, tuple(behind)


class _Lstm(nn.Module):
  """One layer over all words."""

  units: int
  initializer: Any
  dtype: Any

  @nn.compact
  def __call__(self, x: jax.Array, carry: LstmCarry) -> tuple[jax.Array, LstmCarry]:
    gates, init = 4 * self.units, self.initializer
    dense = nn.Dense(gates, kernel_init=init, bias_init=init, dtype=self.dtype, name='input')
    kernel = _Kernel(init, (self.units, gates), name='hidden')().astype(self.dtype)
    work = at_least_float32(self.dtype)

    def step(carry: LstmCarry, entering: jax.Array) -> tuple[LstmCarry, jax.Array]:
      sums = entering + carry.hidden.astype(self.dtype) @ kernel
      i, f, g, o = jnp.split(sums.astype(work), 4, axis=-1)
      cell = nn.sigmoid(f) * carry.cell + nn.sigmoid(i) * jnp.tanh(g)
      hidden = nn.sigmoid(o) * jnp.tanh(cell)
      return LstmCarry(cell, hidden), hidden.astype(self.dtype)

    # What does not depend on the word before is one product for all words.
    carry, leaving = lax.scan(step, carry, dense(x).swapaxes(0, 1))
    return leaving.swapaxes(0, 1), carry


class _Kernel(nn.Module):
  """A matrix under the name it would have in a dense layer, which cannot be called in a scan."""

  initializer: Any
  size: tuple[int, int]

  @nn.compact
  def __call__(self) -> jax.Array:
    return self.param('kernel', self.initializer, self.size)


def _uniform(scale: float) -> Any:
  def init(key: jax.Array, shape: Any, dtype: Any = jnp.float32) -> jax.Array:
    return jax.random.uniform(key, shape, dtype, -scale, scale)

  return init


def _check(model: LstmLanguageModel, tokens: jax.Array, carry: Carry) -> None:
  if tokens.ndim != 2 or not jnp.issubdtype(tokens.dtype, jnp.integer):
    raise ValueError(
      f'this network takes integer tokens [n, t], got {tokens.dtype}{list(tokens.shape)}.'
    )
  shapes = [jnp.shape(leaf) for leaf in jax.tree.leaves(carry)]
  wanted = (tokens.shape[0], model.hidden)
  if len(shapes) != 2 * model.num_layers or any(shape != wanted for shape in shapes):
    raise ValueError(
      f'the carry of tokens {list(tokens.shape)} is {model.num_layers} layers of a cell and a '
      f'hidden state {list(wanted)}, got {[list(shape) for shape in shapes]}.\n  Begin with '
      f'model.initial_carry({tokens.shape[0]}) and hand on what apply returns.'
    )


def create_language_model(
  name: str = LANGUAGE_MODEL,
  *,
  vocab_size: int,
  hidden: int = 650,
  num_layers: int = 2,
  dropout: float = 0.0,
  tied: bool = False,
  init_scale: float = 0.05,
  dtype: Any = jnp.float32,
) -> LstmLanguageModel:
  """Makes a language model by name; apart from `create_model`, because words and a carry go in.

  `model.apply(variables, tokens, carry, train=False)` takes integers [n, t] and the carry of the
  words before them and returns float32 logits [n, t, vocab_size], of the word behind each, and the
  carry behind the last; `model.initial_carry(n)` begins a text. Handed on from one batch to the
  next the carry makes truncated back-propagation: gradients end where a batch begins.

  The published recipes for the Penn Treebank (10,000 words, batch 20, 35 words a batch):
  medium: hidden=650, dropout=0.5, init_scale=0.05; large: hidden=1500, dropout=0.65,
  init_scale=0.04.

  Args:
    name: 'lstm_lm'.
    vocab_size: Number of words.
    hidden: Units of each layer, and size of a word's vector.
    num_layers: LSTM layers.
    dropout: Share of the units dropped in training where a layer hands them on (never from word to
      word); needs `rngs={'dropout': key}`.
    tied: The output layer's weights are the table of word vectors.
    init_scale: All parameters begin uniformly within +-init_scale.
    dtype: Of the computation; parameters, gates, carry and logits are float32.

  Raises:
    ValueError: An unknown name, or a value that makes no sense.

  Example:
    >>> model = create_language_model(vocab_size=100, hidden=8)
    >>> tokens = jnp.zeros((2, 5), jnp.int32)
    >>> variables = model.init(jax.random.key(0), tokens, model.initial_carry(2))
    >>> logits, carry = model.apply(variables, tokens, model.initial_carry(2))
    >>> logits.shape, variables['params']['lstm0']['hidden']['kernel'].shape
    ((2, 5, 100), (8, 32))

  Source: Zaremba et al. 2014, arXiv 1409.2329.
  """
  if name != LANGUAGE_MODEL:
    raise ValueError(f'there is no language model {name!r}; there is {LANGUAGE_MODEL!r}.')
  for option, value in (
    ('vocab_size', vocab_size),
    ('hidden', hidden),
    ('num_layers', num_layers),
  ):
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
      raise ValueError(f'model {name!r} needs {option} >= 1, a whole number, got {value!r}.')
  if not init_scale > 0:
    raise ValueError(f'model {name!r} needs init_scale > 0, got {init_scale!r}.')
  if not 0 <= dropout < 1:
    raise ValueError(f'model {name!r} needs 0 <= dropout < 1, the share dropped, got {dropout!r}.')
  return LstmLanguageModel(vocab_size, hidden, num_layers, dropout, tied, init_scale, dtype)
