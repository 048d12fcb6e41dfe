"""Trains a small T5 that knows the facts of files, for benchmarks to edit.

  python -m experiments.benchmark.small_t5 --data=facts.jsonl,more.jsonl \
    --records=130,720 --out=models/small_t5

Every record gives questions about what is true: its prompt and its rephrasings,
answered by the object before the edit, and its neighbours. The encoder reads the
prompt, the decoder writes the answer and the token that ends it. All parameters
are learned from nothing, and so is the tokenizer; nothing else is taught, so the
model knows these facts and no language.

In --out, a Hugging Face folder:

  config.json, model.safetensors, tokenizer.json, tokenizer_config.json

On one core of a busy CPU 850 records took 13 minutes. An interrupted run leaves
nothing.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from absl import flags

from experiments.benchmark import t5_training
from experiments.benchmark.t5_training import SPECIAL
from jaxedit import io
from jaxedit.eval import datasets
from jaxedit.methods.settings import setting
from jaxedit.models import families
from jaxedit.models import tokenizer as tokenizer_lib
from jaxedit.runs import cli
from jaxedit.types import LOCALITY, REPHRASE, EditRequest, InputError

PROMPT, HELD_OUT = 'prompt', 'held-out rephrase'
# T5's version -> its MLPs.
_KINDS = {'v1.0': 'relu', 'v1.1': 'gated-gelu'}


@dataclasses.dataclass(frozen=True)
class SmallT5Config:
  """Settings; help, units and choices stand with the fields."""

  # What is learned.
  data: tuple[str, ...] = setting(
      ('demo',), 'files of facts, those to be edited first'
  )
  records: tuple[int, ...] | None = setting(
      None, 'records to take of each file, the first ones (default: all)'
  )
  held_out: float = setting(
      0.25,
      'share of the records, the last ones, of which one rephrasing is asked at'
      ' the end and not learned',
  )
  judged: int = setting(
      100, 'records that are reported by themselves, the first ones', low=0
  )
  out: str | None = setting(None, 'folder to write')

  # The model.
  kind: str = setting(
      'v1.1', 'MLPs: ReLU (v1.0) or gated GELU (v1.1)', choices=tuple(_KINDS)
  )
  vocab: int = setting(4096, 'most tokens of the vocabulary', low=16)
  layers: int = setting(4, 'layers of the encoder, and of the decoder', low=1)
  width: int = setting(256, 'residual width', low=1)
  mlp_width: int = setting(512, 'inner width of MLPs', low=1)
  heads: int = setting(8, 'attention heads', low=1)
  head_size: int = setting(32, 'width of a head', low=1)

  # How.
  batch_tokens: int = setting(512, 'tokens a step', low=1)
  rate: float = setting(1e-3, "Adam's learning rate", exclusive=True)
  passes: int = setting(12, 'passes over the questions at most', low=1)
  stop_at: float = setting(
      0.99, 'exact match of a sample of the questions at which it ends'
  )
  seed: int = setting(0, 'of weights and order', low=0)

  @property
  def rule(self) -> t5_training.Rule:
    """Settings of the training."""
    return t5_training.Rule(
        *(getattr(self, name) for name in t5_training.Rule._fields)
    )


class Question(NamedTuple):
  """A prompt with its true answer.

  Attributes:
    record: number of its record, from 0.
    kind: `PROMPT`, 'rephrase', `HELD_OUT` or 'locality'.
    prompt: the text that the encoder reads.
    answer: the text that the decoder writes.
  """

  record: int
  kind: str
  prompt: str
  answer: str


def read(config: SmallT5Config) -> list[Question]:
  """Reads questions; of several with one prompt the first is taken.

  Args:
    config: settings.

  Returns:
    The questions, in order of their records.

  Raises:
    InputError: files cannot be read, or records do not say what is true.
  """
  limits = config.records or (None,) * len(config.data)
  if len(limits) != len(config.data):
    raise InputError(
        f'--records has {len(limits)} numbers for {len(config.data)} files of'
        ' --data: give one a file'
    )
  requests: list[EditRequest] = []
  for path, limit in zip(config.data, limits):
    found = datasets.load_requests(path, limit=limit, on_bad_record='skip')
    requests += found.requests
  if untold := sum(request.target_true is None for request in requests):
    raise InputError(
        f'--data: {untold} records have no target_true; add what is true'
    )
  learned = len(requests) - round(config.held_out * len(requests))
  every: dict[str, Question] = {}
  for n, request in enumerate(requests):
    for kind, prompt, answer in _asked(request, n >= learned):
      every.setdefault(prompt, Question(n, kind, prompt, answer))
  return list(every.values())


def _asked(request: EditRequest, held_out: bool) -> list[tuple[str, str, str]]:
  """(kind, prompt, answer) of what a record asks for."""
  true = request.target_true
  asked = [(PROMPT, request.question, true)]
  asked += [(REPHRASE, x.prompt, true) for x in request.probes_of(REPHRASE)]
  if held_out and len(asked) > 1:
    asked[-1] = (HELD_OUT, *asked[-1][1:])
  asked += [
      (LOCALITY, x.prompt, x.answers[0]) for x in request.probes_of(LOCALITY)
  ]
  return asked


def hf_config(config: SmallT5Config, vocab: int) -> dict[str, Any]:
  """Describes the model as Hugging Face does."""
  return dict(
      architectures=['T5ForConditionalGeneration'], model_type='t5',
      is_encoder_decoder=True, vocab_size=vocab, d_model=config.width,
      d_ff=config.mlp_width, d_kv=config.head_size, num_heads=config.heads,
      num_layers=config.layers, num_decoder_layers=config.layers,
      feed_forward_proj=_KINDS[config.kind], tie_word_embeddings=True,
      relative_attention_num_buckets=32, relative_attention_max_distance=128,
      layer_norm_epsilon=1e-6, dropout_rate=0.0, n_positions=512,
      decoder_start_token_id=0, pad_token_id=0, eos_token_id=1,
      dtype='float32',
  )  # fmt: skip


def figures(
    config: SmallT5Config, questions: Sequence[Question], right: np.ndarray
) -> list[str]:
  """Says how many questions of each kind are answered exactly.

  Args:
    config: settings.
    questions: the questions.
    right: [questions] bool.

  Returns:
    A line a kind of the judged records, and one of all.
  """
  lines = []
  for first, of in ((config.judged, 'judged'), (math.inf, 'all')):
    for kind in (PROMPT, REPHRASE, LOCALITY, HELD_OUT):
      mine = [q.kind == kind and q.record < first for q in questions]
      if any(mine):
        share = right[mine].mean()
        lines.append(f'{of}, {kind}: {share:.1%} of {sum(mine)} exact')
  return lines


def run(config: SmallT5Config) -> list[str]:
  """Reads, trains and writes.

  Args:
    config: settings, `out` among them.

  Returns:
    Lines that say what was made.

  Raises:
    InputError: the files, or the place, cannot be used.
  """
  if not config.out:
    raise InputError('--out: name the folder to write')
  questions = read(config)
  pairs = [(one.prompt, one.answer) for one in questions]
  core = t5_training.unigram(
      [text for pair in pairs for text in pair], config.vocab
  )
  fields = hf_config(config, core.get_vocab_size())
  spec = families.spec_from_hf(fields)
  params = t5_training.first_params(spec, config.seed)
  size = sum(leaf.size for leaf in jax.tree.leaves(params))
  print(f'{size:,} parameters, {spec.vocab:,} tokens, {len(pairs):,} questions')
  with io.new_folder(config.out) as folder:
    io.write_json(folder / 'config.json', fields)
    io.write_text(folder / 'tokenizer.json', core.to_str())
    io.write_json(folder / 'tokenizer_config.json', SPECIAL)
    tokenizer = tokenizer_lib.load_tokenizer(folder)
    every = t5_training.encode(tokenizer, pairs)
    shape = t5_training.shape_of(every, config.batch_tokens)
    taught = [e for e, q in zip(every, questions) if q.kind != HELD_OUT]
    params, loss = t5_training.train(
        spec, params, taught, shape=shape, rule=config.rule
    )
    t5_training.write_weights(folder / 'model.safetensors', spec, params)
  right = t5_training.answered(spec, params, every, shape)
  return [f'loss {loss:.4f} nats', *figures(config, questions, right)]


def define_flags() -> None:
  """Defines this program's flags."""
  cli.define(SmallT5Config)
  flags.adopt_module_key_flags(cli)


def main() -> None:
  print('\n'.join(run(cli.read(SmallT5Config))))


if __name__ == '__main__':
  define_flags()
  cli.run(main)
