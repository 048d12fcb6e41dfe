"""Writes long answers into a model, chunk by chunk, and measures what it says.

  python -m experiments.anyedit_batch \
    --flagfile=experiments/flagfiles/anyedit_demo.flags

AnyEdit on any closed form (MEMIT, ROME, EMMET, AlphaEdit, ...) or on UnKE; with
--noanyedit the same method with one state for the whole answer. Every record is
edited alone on the unedited model (the published protocol), unless --noreset
asks for a sequence of batches. In --output_dir the files of memit_batch:

  delta.safetensors   the change, or with --reset all of them side by side;
                      deltas/ instead where they are too large to be held
  results.json        metrics, also by category, protocol, versions, seconds
  records.jsonl       one line a record: answers before and after, loss, steps
  moments.safetensors the second moments, if they were collected
  model/              with --save_model, the edited model, a Hugging Face folder

A run that was stopped goes on with the same command: optimised states are kept
in unfinished/ until it ends.
"""

from __future__ import annotations

import collections
import dataclasses
import functools
import itertools
import pathlib
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from absl import flags

from experiments import (
    common,
    job,
    job_flags,
    judging,
    kept,
    methods,
    resources,
    timing,
    workbench,
)
from jaxedit.eval import answers, longform, minilm, passages, similarity
from jaxedit.methods import (
    closed_form,
    parity,
    unke,
)
from jaxedit.methods.anyedit import anyedit
from jaxedit.models import tokenizer as tokenizer_lib
from jaxedit.models.decode import Decoding
from jaxedit.models.spec import ModelSpec
from jaxedit.stats import corpora
from jaxedit.targets import TargetConfig
from jaxedit.text import chat as chat_lib
from jaxedit.text import chunking
from jaxedit.text import passages as text_passages
from jaxedit.text.encoding import EncodedEdit
from jaxedit.types import InputError, Passage

FLAGS = flags.FLAGS

# The settings of AnyEdit's code for all its methods; UnKE stops later.
LAYERS = (4, 5, 6, 7, 8)
VALUE = TargetConfig(
    steps=25, rate=0.5, decay=1e-3, clamp=4.0, kl=0.0, threshold=1e-2
)
_UNKE_THRESHOLD = 5e-3
# Memory for the changes of batches that know nothing of each other.
_SIDE_BYTES = 4 * 2**30


def define_flags() -> None:
  """Defines this program's flags."""
  job_flags.define_flags(texts=True)
  flags.FLAGS.set_default('batch_size', 1)
  flags.FLAGS.set_default('reset', True)
  flags.DEFINE_string(
      'data',
      'demo',
      'Passages: "demo", or a file: UnKEBench, AKEW, EditEverything, or JSONL'
      ' with question, answer, paraphrases, sub_questions, category, case.',
  )
  flags.DEFINE_enum(
      'facts',
      'unstructured',
      passages.FACTS,
      'AKEW: write the long text of a fact or its short object.',
  )
  flags.DEFINE_integer(
      'per_category',
      None,
      'Take the first N good records of every category.',
      lower_bound=1,
  )
  flags.DEFINE_integer(
      'max_answer_tokens',
      None,
      'Longest answer; a longer one is a faulty record.',
      lower_bound=1,
  )
  _define_edit_flags()
  _define_answer_flags()
  flags.adopt_module_key_flags(job_flags)
  flags.adopt_module_key_flags(common)  # numbers of this program


def _define_edit_flags() -> None:
  flags.DEFINE_bool(
      'anyedit', True, 'Edit chunk by chunk; off: one state for an answer.'
  )
  flags.DEFINE_integer(
      'window', 40, 'Tokens a chunk (Llama-3: 40, Qwen2.5: 50).', lower_bound=1
  )
  flags.DEFINE_integer(
      'overlap', 0, 'Tokens that neighbouring chunks share.', lower_bound=0
  )
  flags.DEFINE_enum(
      'boundary',
      'window',
      chunking.BOUNDARIES,
      'Where chunks end: after so many tokens, or at ends of sentences and'
      ' lines, of at most so many.',
  )
  flags.DEFINE_string(
      'preserve',
      'self',
      f'UnKE: text whose outputs are kept: {corpora.KINDS}.',
  )
  flags.DEFINE_integer(
      'preserve_count', 20, 'UnKE: how many texts of it.', lower_bound=1
  )
  flags.DEFINE_integer(
      'preserve_tokens', 128, 'UnKE: the longest of them.', lower_bound=1
  )


def _define_answer_flags() -> None:
  flags.DEFINE_string(
      'chat',
      chat_lib.TEMPLATE,
      'Words around a question: "template" for the tokenizer\'s own, "none", or'
      r' a text with one {}, line breaks written as \n.',
  )
  flags.DEFINE_string(
      'answer_end',
      None,
      'Text that ends an answer and is part of what is written, line breaks as'
      r' \n; the end of turn of the chat template unless given.',
  )
  flags.DEFINE_integer(
      'max_new_tokens', 512, 'Longest answer given, tokens.', lower_bound=1
  )
  common.define_number(
      'temperature', 0, 'Of the answers; 0 is greedy (published 0.001).'
  )
  flags.DEFINE_integer(
      'top_k', 0, 'Draw among so many tokens; 0 for all.', lower_bound=0
  )
  common.define_number(
      'top_p', 1, 'Draw among tokens of so much probability.', positive=True
  )
  common.define_number(
      'repetition_penalty', 1, 'As Hugging Face has it; 1 is none.',
      positive=True,
  )  # fmt: skip
  flags.DEFINE_bool('sub_questions', True, 'Ask the sub-questions too.')
  flags.DEFINE_string(
      'encoder',
      'none',
      'Sentence encoder for minilm_cosine: "none",'
      f' "{minilm.ENCODER}" (fetched once), a folder or a hub id.',
  )


def recipe_of_flags() -> tuple[Any, dict[str, Any]]:
  """Builds the method from flags and refuses flags that do not go together.

  Returns:
    (the method, its settings for the protocol).

  Raises:
    InputError: all that is wrong with the flags.
  """
  problems, chosen = job_flags.check_flags(), None
  problems += [f'--{fault}' for fault in _decoding().faults()]
  if FLAGS.per_category and FLAGS.num_edits:
    problems.append(
        '--num_edits takes the first of all, --per_category of every category:'
        ' leave one of them out'
    )
  unkes = FLAGS.method in methods.TEXT_METHODS
  value = VALUE
  if unkes:
    value = VALUE._replace(threshold=_UNKE_THRESHOLD)
  if not FLAGS.anyedit and FLAGS.method in ('unke', 'alphaedit'):
    value = value._replace(threshold=0.0)  # their plain forms never stop early
  try:
    recipe, settings = methods.recipe_of_flags(LAYERS, value)
    if FLAGS.anyedit:
      chosen = (
          anyedit(recipe, FLAGS.window, FLAGS.overlap, FLAGS.boundary),
          settings,
      )
      settings['chunks'] = chosen[0].chunks._asdict()
    else:
      chosen = dataclasses.replace(recipe, anchor='prompt_last'), settings
      if _shadowed():
        chosen = parity.shadowed(chosen[0], FLAGS.batch_size), settings
    settings['anchor'] = chosen[0].anchor
  except InputError as e:
    problems += e.problems
  if problems:
    raise InputError(*problems)
  if not unkes:
    resources.check_flags(chosen[0])
  elif FLAGS.preserve != 'self':
    corpora.fingerprint(FLAGS.preserve)
  return chosen


def _shadowed() -> bool:
  """Whether the published slip of the plain methods is asked for."""
  plain = FLAGS.parity == 'anyedit' and not FLAGS.anyedit
  return plain and FLAGS.method in ('memit', 'alphaedit')


def _words(tokenizer: Any) -> dict[str, Any]:
  """How questions are asked."""
  # A flagfile has one flag a line.
  broken = lambda text: text and text.replace(r'\n', '\n')
  return {
      'chat': chat_lib.chat_of(
          tokenizer, broken(FLAGS.chat), broken(FLAGS.answer_end)
      ),
      'double_bos': FLAGS.parity == 'anyedit',
  }


def _read(check: Any) -> Any:
  """Reads the passages.

  Raises:
    InputError: they are faulty; a published schedule needs batches of one size.
  """
  loaded = passages.load_passages(
      FLAGS.data,
      limit=FLAGS.num_edits,
      on_bad_record=FLAGS.on_bad_record,
      check=check,
      facts=FLAGS.facts,
  )
  if FLAGS.per_category:
    some = first_of_each(loaded.records, FLAGS.per_category)
    loaded = dataclasses.replace(loaded, records=some)
  cases = workbench.case_numbers(loaded.records)
  # Without a check, what is faulty is still among them.
  if check is None or not _shadowed():
    return loaded
  slip = '--parity=anyedit: the published schedule depends on the edits a batch'
  if max(cases) + 1 < len(cases):
    raise InputError(
        f'{slip}, and {loaded.source} has cases of several rewrites, which are'
        ' edited together; leave --parity=anyedit out for these'
    )
  if rest := len(cases) % FLAGS.batch_size:
    raise InputError(
        f'{slip}, and the last batch would have {rest}; let --num_edits be a'
        f' multiple of --batch_size={FLAGS.batch_size}'
    )
  return loaded


def first_of_each(
    records: Sequence[Passage], count: int
) -> tuple[Passage, ...]:
  """The first passages of every category, in their order.

  Args:
    records: passages; those of one case count once and stay together.
    count: cases of a category, which is that of a case's first passage.
  """
  cases = workbench.case_numbers(records)
  category: dict[int, str] = {}
  for record, case in zip(records, cases):
    category.setdefault(case, record.category)
  taken, seen = set(), collections.Counter()
  for case, name in category.items():
    seen[name] += 1
    if seen[name] <= count:
      taken.add(case)
  return tuple(r for r, case in zip(records, cases) if case in taken)


def _check(tokenizer: Any, spec: ModelSpec, recipe: Any) -> Any:
  """The check of a passage: all that editing or judging would refuse."""
  words = _words(tokenizer)
  # Both are needed after the weights only, and refuse what they cannot use.
  answers.end_ids(tokenizer, spec.vocab, words['chat'].end)
  if FLAGS.encoder != 'none':
    minilm.find_encoder(FLAGS.encoder, common.progress_bar)
  edit = text_passages.passage_check(
      tokenizer, max_tokens=spec.max_positions, chunking=recipe.chunks, **words
  )
  ask = longform.record_check(
      spec,
      tokenizer,
      max_new_tokens=FLAGS.max_new_tokens,
      sub_questions=FLAGS.sub_questions,
      **words,
  )

  def check(passage: Passage) -> list[str]:
    faults = edit(passage) or ask(passage)
    limit = FLAGS.max_answer_tokens
    if limit and not faults:
      ids = tokenizer(passage.answer, add_special_tokens=False)['input_ids']
      if len(ids) > limit:
        faults.append(
            f'its answer takes {len(ids)} tokens, more than'
            f' --max_answer_tokens={limit}; shorten it or raise the limit.'
        )
    return faults

  return check


def _complete(
    bench: workbench.Workbench,
    recipe: Any,
    clock: timing.Clock,
    folder: pathlib.Path,
) -> tuple[workbench.Workbench, Any, dict[str, Any]]:
  """Adds the records as ids, and second moments or texts to preserve."""
  bench = dataclasses.replace(bench, encoded=_encode(bench, recipe))
  if isinstance(recipe, unke.Unke):
    with clock('preserve'):
      texts = _preserved(bench)
    source = {
        'corpus': FLAGS.preserve,
        'texts': len(texts),
        'ids_digest': kept.digest(*texts),
    }
    return bench, texts, {'preserved': source}
  with clock('moments'):
    moments = resources.find_moments(
        bench.model, bench.tokenizer, recipe, folder
    )
  source = {'moments': {**moments.provenance, 'tokens': moments.count}}
  return bench, moments, source


def _preserved(bench: workbench.Workbench) -> list[np.ndarray]:
  """Texts whose outputs UnKE keeps, as ids."""
  count, model = FLAGS.preserve_count, bench.model
  limit = min(FLAGS.preserve_tokens, model.spec.max_positions)
  if FLAGS.preserve != 'self':
    documents = corpora.open_documents(FLAGS.preserve, seed=FLAGS.seed)
    found = corpora.tokenised(documents, bench.tokenizer, limit)
    texts = list(itertools.islice(filter(None, found), count))
    bos = bench.tokenizer.bos_token_id
    if _words(bench.tokenizer)['double_bos'] and bos is not None:
      texts = [[bos] * (ids[0] == bos) + ids for ids in texts]
  else:
    starts = corpora.sample_starts(bench.tokenizer)
    texts = corpora.sample(
        model.spec,
        model.params,
        starts,
        tokens=1,  # one batch
        seed=FLAGS.seed,
        stop_ids=[i for i in [bench.tokenizer.eos_token_id] if i is not None],
        length=limit - max(map(len, starts)),
        batch_rows=count,
        progress=common.progress_bar,
    )
  if not texts:
    raise InputError(
        f'--preserve={FLAGS.preserve}: holds no text; name another corpus'
    )
  return [np.asarray(ids, np.int32) for ids in texts]


def _encode(bench: workbench.Workbench, recipe: Any) -> tuple[EncodedEdit, ...]:
  """Encodes passages."""
  encoded = text_passages.encode_passages(
      bench.tokenizer,
      bench.records,
      max_tokens=bench.model.spec.max_positions,
      chunking=recipe.chunks,
      **_words(bench.tokenizer),
  )
  return tuple(encoded)


def _editor(bench: workbench.Workbench, recipe: Any) -> Any:
  if not isinstance(recipe, unke.Unke):
    return closed_form.closed_form(bench.model.spec, recipe)
  if recipe.pads:
    recipe = dataclasses.replace(recipe, pad_id=pad_id(bench.tokenizer))
  return unke.unke_editor(bench.model.spec, recipe)


def pad_id(tokenizer: Any) -> int:
  """The token that pads: the tokenizer's own, or else its end of text."""
  ids = (tokenizer.pad_token_id, tokenizer.eos_token_id, 0)
  return next(i for i in ids if i is not None)


def _side(bench: workbench.Workbench, recipe: Any) -> int:
  """Batches that fit into memory side by side.

  UnKE changes a whole block for every batch; a closed form holds the keys of
  all tokens, twice while they are put in order.
  """
  if isinstance(recipe, unke.Unke):
    leaves = jax.tree.leaves(bench.model.params['layers'])
    each = 4 * sum(x[0].size for x in leaves) * len(recipe.layers)
  else:
    tokens = [len(edit.rows[0]) + len(edit.target) for edit in bench.encoded]
    each = 8 * bench.model.spec.mlp_width * max(tokens) * bench.batch_size
  return max(1, _SIDE_BYTES // each)


def _decoding() -> Decoding:
  return Decoding(
      temperature=FLAGS.temperature,
      top_k=FLAGS.top_k,
      top_p=FLAGS.top_p,
      repetition_penalty=FLAGS.repetition_penalty,
      seed=FLAGS.seed,
  )


def _encoder() -> minilm.Encoder | None:
  """Loads the sentence encoder that flags name."""
  if FLAGS.encoder == 'none':
    return None
  return minilm.load_encoder(FLAGS.encoder, common.progress_bar)


def _judge(bench: workbench.Workbench) -> job.Judge:
  """The evaluation with the flags' settings."""
  words = _words(bench.tokenizer)
  evaluate = functools.partial(
      longform.evaluate,
      stop=answers.end_ids(
          bench.tokenizer,
          bench.model.spec.vocab,
          words['chat'].end,
          tokenizer_lib.end_ids(bench.model.folder),
      ),
      sub_questions=FLAGS.sub_questions,
      encoder=_encoder(),
      decoding=_decoding(),
      max_new_tokens=FLAGS.max_new_tokens,
      progress=common.progress_bar,
      **words,
  )
  return functools.partial(
      judging.judge,
      evaluate=evaluate,
      seed=FLAGS.seed,
      batch_size=FLAGS.eval_batch_size,
  )


def _protocol(bench: workbench.Workbench) -> dict[str, Any]:
  words = _words(bench.tokenizer)
  return {
      'facts': FLAGS.facts,
      'chat': words['chat']._asdict(),
      'double_bos': words['double_bos'],
      'decoding': {
          **_decoding()._asdict(),
          'max_new_tokens': FLAGS.max_new_tokens,
      },
      'encoder': FLAGS.encoder,
      'not_scored': similarity.missing(),
  }


def _tables(evaluations: dict[str, Any]) -> dict[str, Any]:
  found = {
      name: longform.by_category(evaluation, FLAGS.seed)
      for name, evaluation in evaluations.items()
  }
  return {'categories': found} if any(found.values()) else {}


TASK = job.Task(
    recipe=recipe_of_flags,
    editor=_editor,
    read=_read,
    check=_check,
    complete=_complete,
    judge=_judge,
    protocol=_protocol,
    show=longform.excerpts,
    side=_side,
    tables=_tables,
)


def main() -> None:
  job.run(TASK)


if __name__ == '__main__':
  define_flags()
  common.run(main)
