"""What `small_t5` makes a T5 of: tokenizer, first weights, training, files.

The loss of a question is that of the tokens of its answer and of the one that
ends it. Questions lie end to end in batches of one static shape.

Axes as in `jaxedit.types`: B questions of a batch, O labels, N packed tokens.

Source: Raffel et al. 2020 (T5, arXiv 1910.10683) and its published code, for the
tokenizer's layout and the standard deviations of the first weights.
"""

from __future__ import annotations

import functools
import math
import pathlib
import time
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import tokenizers
from tokenizers import (
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)

from jaxedit import io
from jaxedit.batching import buckets, packer
from jaxedit.methods.finetune import examples as examples_lib
from jaxedit.methods.finetune.examples import Example, Examples, Shape
from jaxedit.models import decoder, families, loading, tensors
from jaxedit.models import spec as spec_lib
from jaxedit.models.spec import ModelSpec
from jaxedit.text import locate
from jaxedit.types import Array, Params

# Ids 0, 1 and 2.
SPECIAL = {'pad_token': '<pad>', 'eos_token': '</s>', 'unk_token': '<unk>'}
_SAMPLE = 256  # questions asked after every pass
_WARMUP = 100  # steps


class Rule(NamedTuple):
  """Settings of a training.

  Attributes:
    rate: highest learning rate of Adam.
    passes: over the questions at most.
    stop_at: exact match of a sample of the questions at which it ends.
    seed: of the order of questions.
  """

  rate: float
  passes: int
  stop_at: float
  seed: int = 0


def unigram(texts: Sequence[str], vocab: int) -> tokenizers.Tokenizer:
  """Trains a tokenizer in the layout of T5's: a space before every word.

  Args:
    texts: what it is trained on.
    vocab: most tokens, special ones included; few texts give fewer.

  Returns:
    The tokenizer; it ends every text by '</s>'.
  """
  core = tokenizers.Tokenizer(models.Unigram())
  core.normalizer = normalizers.NFKC()
  space = dict(replacement='\u2581', prepend_scheme='always')
  core.pre_tokenizer = pre_tokenizers.Sequence(
      [pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Metaspace(**space)]
  )
  core.decoder = decoders.Metaspace(**space)
  trainer = trainers.UnigramTrainer(
      vocab_size=vocab,
      special_tokens=list(SPECIAL.values()),
      unk_token=SPECIAL['unk_token'],
      show_progress=False,
  )
  core.train_from_iterator(texts, trainer)
  core.post_processor = processors.TemplateProcessing(
      single='$A </s>', special_tokens=[('</s>', 1)]
  )
  return core


def first_params(spec: ModelSpec, seed: int) -> Params:
  """Draws float32 parameters as T5 does.

  Standard deviations are 1 / sqrt(in), of queries 1 / sqrt(D H), as attention has
  no scale, and 1 for the embedding; norms begin at 1.
  """
  rng, leaves = np.random.default_rng(seed), {}
  for path, shape in spec_lib.param_shapes(spec).items():
    inputs = shape[-2] if path.endswith('kernel') else spec.width
    if path.endswith('q/kernel'):
      inputs *= spec.head_size
    if path.startswith('embed'):
      inputs = 1
    draw = rng.standard_normal(shape, np.float32) / np.float32(inputs**0.5)
    one = np.ones(shape, np.float32) if path.endswith('scale') else draw
    leaves[path] = jnp.asarray(one)
  return loading.nest(leaves)


def encode(
    tokenizer: Any, questions: Sequence[tuple[str, str]]
) -> list[Example]:
  """Turns prompts and answers into sources, answers and labels.

  Args:
    tokenizer: of an encoder-decoder.
    questions: (prompt, answer).

  Returns:
    One example a question; its last label is the token that ends an answer.
  """
  prompts = locate.encode_prompts(tokenizer, [one for one, _ in questions])
  answers = locate.encode_targets(
      tokenizer, [locate.Continued(*one) for one in questions]
  )
  found = []
  for prompt, answer in zip(prompts, answers):
    labels = np.append(answer, tokenizer.eos_token_id).astype(np.int32)
    ids = np.concatenate([prompt, answer])
    found.append(Example(ids, len(prompt) - 1, labels[:, None]))
  return found


def shape_of(every: Sequence[Example], tokens: int) -> Shape:
  """The static shape of all batches, of about so many tokens."""
  lengths = [len(one.ids) for one in every]
  scored = [len(one.labels) for one in every]
  tokens = max(tokens, *lengths)
  texts = min(len(every), int(tokens / np.mean(lengths)))
  most = max(*scored, math.ceil(1.2 * texts * np.mean(scored)))
  return Shape(
      groups=1, minibatches=1, texts=texts, length=max(lengths), tokens=tokens,
      output_length=max(scored), outputs=buckets.round_up(most), labels=1,
  )  # fmt: skip


def batches(every: Sequence[Example], shape: Shape) -> Iterator[Examples]:
  """Packs examples in order."""
  loads = [(len(one.ids), len(one.labels)) for one in every]
  limits = shape.tokens, shape.outputs
  for part in packer.groups(loads, limits, most=shape.texts):
    yield examples_lib.pack(every[part], shape, True, sources=True)


def score(
    spec: ModelSpec, params: Params, batch: Examples
) -> tuple[Array, Array]:
  """Scores the labels of a batch, each behind the right ones before it.

  Args:
    spec: the architecture.
    params: canonical parameters.
    batch: B questions with O labels.

  Returns:
    ([] mean negative log-likelihood of a label, nats; [B] bool, whether each
    label of a question is the most likely token: greedy decoding gives them).
  """
  h = decoder.embed(spec, params, batch.tokens, batch.rows)
  h, _ = decoder.run_layers(
      spec, params, h, batch.rows, start=0, stop=spec.layers,
      outputs=batch.outputs,
  )  # fmt: skip
  logits = decoder.logits(spec, params, h[0])  # [O, V]
  labels, real = batch.labels[:, 0], batch.weights[:, 0] > 0
  loss = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
  wrong = real & (jnp.argmax(logits, axis=-1) != labels)
  mine = batch.outputs.rows.row == jnp.arange(len(batch.share))[:, None]
  mean = jnp.sum(jnp.where(real, loss, 0)) / jnp.maximum(jnp.sum(real), 1)
  return mean, ~jnp.any(mine & wrong, axis=1)


_score = functools.partial(jax.jit, static_argnums=0)(score)


def answered(
    spec: ModelSpec, params: Params, every: Sequence[Example], shape: Shape
) -> np.ndarray:
  """Tells which questions a model answers exactly, [questions] bool."""
  found = [
      np.asarray(_score(spec, params, batch)[1])[batch.share > 0]
      for batch in batches(every, shape)
  ]
  return np.concatenate(found)


def train(
    spec: ModelSpec,
    params: Params,
    every: Sequence[Example],
    *,
    shape: Shape,
    rule: Rule,
) -> tuple[Params, float]:
  """Learns all parameters; prints a line a pass over the questions.

  Adam's rate rises over the first steps, and falls to a tenth over the second
  half of the passes.

  Args:
    spec: the architecture.
    params: canonical parameters to begin with.
    every: what is learned.
    shape: of all batches.
    rule: settings.

  Returns:
    (what was learned; mean loss of the last pass, nats a label).
  """
  rng = np.random.default_rng(rule.seed)
  sample = [every[i] for i in rng.permutation(len(every))[:_SAMPLE]]
  adam = optax.chain(optax.clip_by_global_norm(1.0), optax.scale_by_adam())

  @jax.jit
  def step(params: Params, state: Any, batch: Examples, rate: Array) -> Any:
    loss = lambda params: score(spec, params, batch)[0]
    loss, slope = jax.value_and_grad(loss)(params)
    change, state = adam.update(slope, state)
    return jax.tree.map(lambda p, d: p - rate * d, params, change), state, loss

  state, steps, begin = adam.init(params), 0, time.monotonic()
  loss = math.nan
  for number in range(1, rule.passes + 1):
    losses, order = [], rng.permutation(len(every))
    packed = list(batches([every[i] for i in order], shape))
    for i, batch in enumerate(packed):
      steps += 1
      left = 1 - (number - 1 + i / len(packed)) / rule.passes
      rate = rule.rate * min(1, steps / _WARMUP, max(0.1, 2 * left))
      params, state, loss = step(params, state, batch, np.float32(rate))
      losses.append(float(loss))
    loss = float(np.mean(losses))
    exact = answered(spec, params, sample, shape).mean()
    gone = (time.monotonic() - begin) / 60
    print(
        f'pass {number}: {loss:.4f} nats, {exact:.1%} exact,'
        f' {60 * gone / steps:.2f} s a step,'
        f' {gone / number * (rule.passes - number):.1f} min left at most',
        flush=True,
    )
    if exact >= rule.stop_at:
      break
  return params, loss


def write_weights(path: pathlib.Path, spec: ModelSpec, params: Params) -> None:
  """Writes parameters as safetensors, by upstream's names."""
  arrays = {}
  slots = tensors.upstream_slots(spec, families.tensors_of(spec))
  for name, (slot,) in slots.items():
    leaf = np.asarray(loading.get_leaf(params, slot.path))
    if slot.layer is not None:
      leaf = leaf[spec_lib.row(spec.layers, len(leaf), slot.layer)]
    arrays[name] = tensors.to_upstream([leaf], slot.source, spec.heads)
  kinds = {name: ('F32', array.shape) for name, array in arrays.items()}
  with io.new_file(path) as stream:
    io.stream_tensors(stream, kinds, arrays.__getitem__, {'format': 'pt'})
