"""Projections by trying every admissible support, in NumPy float64. Slow, and obviously right."""

import functools
import itertools

import jax
import numpy as np


@functools.partial(jax.jit, static_argnums=(0, 2))
def project(structure, w, layout):
  """What is tested against them, compiled."""
  return structure.project(w, layout)


def chosen(energy, k):
  """Mask of the k largest of a flat array; ties to the lowest index."""
  mask = np.zeros(len(energy), bool)
  mask[np.argsort(-np.asarray(energy), kind='stable')[:k]] = True
  return mask


def best_energy(w, supports):
  """Largest energy a support of `supports` (iterable of masks) keeps of w."""
  return max(float((np.asarray(w, np.float64)[mask] ** 2).sum()) for mask in supports)


def of_groups(labels, k):
  """Supports that keep k of the groups named by an integer array."""
  names = np.unique(labels)
  for kept in itertools.combinations(names, k):
    yield np.isin(labels, kept)


def box_labels(kernels, o, i, m):
  """Group of every weight when boxes of o outputs, i inputs and m taps live together."""
  at = np.indices(kernels.shape)
  parts = [at[0] // o, at[1] // i, at[2] // m]
  shape = [int(p.max()) + 1 for p in parts]
  return np.ravel_multi_index([p.ravel() for p in parts], shape).reshape(kernels.shape)


def within(lines, counts, size):
  """Best energy when each run of `size` entries of a line keeps at most its line's count."""
  total = 0.0
  for line, count in zip(np.asarray(lines, np.float64), counts, strict=True):
    for start in range(0, len(line), size):
      part = line[start : start + size] ** 2
      total += max(
        sum(part[list(kept)])
        for kept in itertools.combinations(range(len(part)), min(count, len(part)))
      )
  return total


def patterns(kernels, masks, count, per_output=0, per_input=0):
  """Best energy over all choices of `count` kernels and of one pattern each."""
  o, i, m = kernels.shape
  taps = np.array([[mask >> t & 1 for t in range(m)] for mask in masks])
  energy = np.array(
    [[max((k**2 * p).sum() for p in taps) for k in row] for row in kernels.astype(np.float64)]
  )
  best = -1.0
  for kept in itertools.combinations(range(o * i), count):
    live = np.zeros(o * i, bool)
    live[list(kept)] = True
    live = live.reshape(o, i)
    if live.sum(1).min() >= per_output and live.sum(0).min() >= per_input:
      best = max(best, float(energy[live].sum()))
  return best
