"""The task of predicting the next word: streams of a text, the carry handed on from batch to batch."""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from experiments.tasks import Task, Variables
from fqjax import data as fd
from fqjax import models, sparsity, train


def language_model(
  model: models.LstmLanguageModel,
  text: fd.Text,
  *,
  batch_size: int = 20,
  length: int = 35,
  eval_batch_size: int = 10,
  mesh=None,
) -> Task:
  """The task of predicting the next word; the score of a word is its loss in nats.

  Training is truncated back-propagation: the carry is what the model state holds, it goes on from
  batch to batch and begins anew with the text. It is no part of the network, so sizes are those of
  the parameters alone. A score does not depend on it: every part is read from its beginning, in
  `eval_batch_size` streams whose carry begins at zero.

  Args:
    model: of `models.create_language_model`.
    text: to learn from 'train' and score on 'test' and, as 'held_out', on 'valid'.
    batch_size: streams of training, over all devices.
    length: words of a stream per batch, through which gradients reach back.
    eval_batch_size: streams of scoring.
    mesh: devices; all by default.
  """

  def fresh(key):
    tokens = jnp.zeros((1, 1), jnp.int32)
    variables = jax.jit(model.init)({'params': key}, tokens, model.initial_carry(1))
    return Variables(variables['params'], _state(model.initial_carry(batch_size)))

  def losses(params, carry, batch, **options):
    logits, carry = model.apply({'params': params}, batch['input'], carry, **options)
    found = optax.softmax_cross_entropy_with_integer_labels(logits, batch['target'])
    return found, carry

  def loss_fn(params, model_state, batch, key):
    begin = batch['first'][:, None]
    carry = jax.tree.map(lambda x: jnp.where(begin, jnp.zeros_like(x), x), _carry(model_state))
    found, carry = losses(params, carry, batch, train=True, rngs={'dropout': key})
    loss = jnp.sum(batch['mask'] * found) / jnp.maximum(batch['mask'].sum(), 1)
    return loss, (_state(carry), {})

  def predict(params, carry, batch):
    found, carry = losses(params, carry, batch)
    return {'loss': found, 'mask': batch['mask'], 'carry': carry}

  step = train.make_eval_step(predict, mesh=mesh)

  def per_word(params, tokens):
    carry, parts = model.initial_carry(eval_batch_size), []
    for batch in fd.batched(tokens, eval_batch_size, length, repeat=False):
      found = step(params, carry, train.shard_batch(batch, mesh))
      carry = found['carry']
      parts.append((found['loss'], found['mask']))
    loss, mask = (np.concatenate(x, 1) for x in zip(*jax.device_get(parts), strict=True))
    return loss[mask > 0].astype(np.float64)

  def score(variables):
    scored = {'test': text.test, 'held_out': text.valid}
    return {part: per_word(variables.params, tokens) for part, tokens in scored.items()}

  def loader(seed):
    del seed  # a text has one order
    return fd.batched(text.train, batch_size, length)

  return Task(
    init=fresh,
    loss_fn=loss_fn,
    loader=loader,
    steps_per_epoch=len(loader(0)),
    score=score,
    calibration=lambda: (),
    advance=None,
    layers=sparsity.trace_layers(
      lambda params, tokens: model.apply({'params': params}, tokens, model.initial_carry(1))[0],
      jax.eval_shape(fresh, jax.random.key(0)).params,
      jax.ShapeDtypeStruct((1, length), jnp.int32),
    ),
  )


def _state(carry: models.LstmCarry | Any) -> dict:
  """A carry as nested dicts, the form in which variables are saved."""
  return {'carry': {str(i): layer._asdict() for i, layer in enumerate(carry)}}


def _carry(state: Mapping) -> tuple[models.LstmCarry, ...]:
  layers = state['carry']
  return tuple(models.LstmCarry(**layers[str(i)]) for i in range(len(layers)))
