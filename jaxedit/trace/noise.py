"""What the embeddings of subject tokens are corrupted with.

  x[t] + nu * eps,  eps ~ N(0, 1) or U(-1, 1),  for every subject token t

The noise level nu is written in three ways:

  's3'    3 standard deviations of the embeddings of subjects, gaussian
  '0.1'   0.1, gaussian
  'u0.1'  0.1, uniform: values between -0.1 and 0.1

It is added to, or written in place of, what the token embedding gives, before
position embeddings. Every draw starts from the same seed, so all cells of a
trace, all kinds and all texts of one shape meet the same noise.

Source: Meng et al. 2022 (ROME, arXiv 2202.05262), section 2.1 and appendix B: 3
standard deviations and 10 draws; their scripts write 0.1 for GPT-2 XL, 0.025 for
GPT-J and 0.03 for GPT-NeoX. Their program draws as `draw` does. Where it writes
noise in place of embeddings ('replace'), it still computes the score of the
corrupted run, `low`, by addition; here both are corrupted alike.

Not here: their gaussian fitted to the embeddings of a corpus ('m') and
Student's t ('t3').
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from jaxedit.placement import fetch
from jaxedit.types import InputError, Params

# As published.
DEFAULT = 's3'
SEED = 1


class Noise(NamedTuple):
  """A distribution with mean 0.

  Attributes:
    kind: 'gaussian' or 'uniform'.
    scale: standard deviation of the gaussian, or largest value of the uniform,
      in units of the embedding.
    relative: whether `scale` is a number of standard deviations of the
      embeddings, so that `level` needs to know them.
  """

  kind: str
  scale: float
  relative: bool = False


def parse(text: str) -> Noise:
  """Reads a noise level, without a model.

  Args:
    text: 's3', '0.1' or 'u0.1', see above.

  Returns:
    The noise, as it is written.

  Raises:
    InputError: the text is none of these, or the number is not above 0.
  """
  written = text.strip()
  prefix = written[:1] if written[:1] in ('s', 'u') else ''
  try:
    size = float(written.removeprefix(prefix))
  except ValueError:
    size = math.nan
  if not 0 < size < math.inf:
    raise InputError(
        f'noise level {text!r} is unknown; write s and a number of standard'
        " deviations ('s3'), a number ('0.1'), or u and a number ('u0.1'),"
        ' each above 0'
    )
  kind = 'uniform' if prefix == 'u' else 'gaussian'
  return Noise(kind, size, relative=prefix == 's')


def errors(text: str, flag: str) -> list[str]:
  """What `parse` would refuse, in sentences that name the flag."""
  try:
    parse(text)
  except InputError as error:
    return [f'{flag}={text}: {problem}' for problem in error.problems]
  return []


def level(text: str, std: float | None = None) -> Noise:
  """Resolves a noise level.

  Args:
    text: as `parse` takes it.
    std: standard deviation of the embeddings, see `embedding_std`; needed
      where the level is relative to it.

  Returns:
    The noise, on the scale of the embeddings.

  Raises:
    InputError: the text is wrong, or relative and there is no `std`.
  """
  noise = parse(text)
  if not noise.relative:
    return noise
  if std is None or not 0 < std < math.inf:
    raise InputError(
        f'noise level {text!r} is a number of standard deviations of the'
        f' embeddings, and theirs is {std}; give a level without s'
    )
  return Noise(noise.kind, noise.scale * float(std))


def embedding_std(params: Params, ids: Sequence[int]) -> float:
  """Measures the token embeddings of subjects.

  Args:
    params: canonical parameters.
    ids: token ids of all subjects, end to end; a token that comes twice counts
      twice.

  Returns:
    Standard deviation over all elements of their vectors, with one degree of
    freedom less as published.

  Raises:
    InputError: there are no ids, or the model lacks some.
  """
  table = params['embed']['embedding']
  tokens, count = np.unique(np.asarray(ids, np.int64), return_counts=True)
  if not len(tokens):
    raise InputError('there are no subject tokens to measure the noise by')
  if tokens[0] < 0 or tokens[-1] >= len(table):
    raise InputError(
        f'subject tokens have ids {tokens[0]} to {tokens[-1]}, and the model'
        f' has embeddings 0 to {len(table) - 1}; use the tokenizer of the model'
    )
  rows = fetch(table[tokens.astype(np.int32)]).astype(np.float64)
  total = int(count.sum()) * rows.shape[1]
  mean = float(count @ rows.sum(1)) / total
  return math.sqrt(float(count @ ((rows - mean) ** 2).sum(1)) / (total - 1))


def draw(noise: Noise, shape: Sequence[int], seed: int = SEED) -> np.ndarray:
  """Draws noise; equal arguments give equal noise, in every process.

  Args:
    noise: what to draw.
    shape: of the result, [n, tokens, D] for n draws.
    seed: of numpy's old generator, whose stream never changes; 1 as published.

  Returns:
    f32 array. It is drawn and scaled in f64.
  """
  generator = np.random.RandomState(seed)
  if noise.kind == 'gaussian':
    drawn = generator.randn(*shape)
  else:
    drawn = generator.uniform(-1, 1, shape)
  return (noise.scale * drawn).astype(np.float32)
