"""Records, flags and assertions for tests of the editing programs."""

from __future__ import annotations

import contextlib
import functools
import json
import os
import pathlib
from typing import Any
from unittest import mock

import numpy as np
import programs
import tiny_model
from absl.testing import parameterized

from experiments import anyedit_batch, memit_batch
from jaxedit import edited as edited_lib
from jaxedit.eval import datasets, evaluation
from jaxedit.eval.scorers.base import end_ids
from jaxedit.eval.scorers.long_form import LongForm
from jaxedit.eval.scorers.teacher_forced import TeacherForced
from jaxedit.models import loading, tokenizer
from jaxedit.runs import editing, moments
from jaxedit.stats import corpora
from jaxedit.text import chat as chat_lib
from jaxedit.text.token_cache import TokenCache

CONTEXTS = ['{}', 'The Eiffel Tower. {}', 'Paris is in France. {}']
WINDOW = 3
CHOICES = [
    {
        'goal': 'The mother tongue',
        'sol1': 'Paris',
        'sol2': 'French',
        'label': 1,
    },
    {'goal': 'The city', 'sol1': 'Paris', 'sol2': 'French', 'label': 0},
]


def fact(subject, target='twin city', /, **changes):
  """A fact; those with a subject of one token all have one shape."""
  return {
      'prompt': 'The mother tongue of {} is',
      'subject': subject,
      'target_new': target,
      'target_true': 'French',
      'paraphrases': [f'{subject} is in the city of'],
      'neighbours': ['The mother tongue of France is'],
  } | changes


def text(name, answer, /, **changes):
  """A question with an answer of several chunks."""
  return {
      'question': f'The mother tongue of {name}',
      'answer': answer,
      'paraphrases': [f'the tongue of {name}'],
      'sub_questions': [{'prompt': f'The city of {name}', 'answer': 'Paris'}],
  } | changes


FACTS = (
    fact('Danielle'),
    fact('Toko', 'guitar piano'),
    fact('Sydney', 'capital Tower'),
    fact('Paris', 'in was'),
)
TEXTS = (
    text('Danielle', 'French. The capital of France is Paris.',
         category='facts'),
    text('Toko Yasuda', 'a guitar and the piano in Paris, a twin city',
         category='music'),
    text('Sydney', 'was Wellington. The Eiffel Tower is in Paris.',
         category='facts'),
    text('Paris', 'a twin city. The capital of France.'),
)  # fmt: skip
LONG = (
    *TEXTS,
    text('Paris Toko', 'the Eiffel Tower in France. a piano'),
    text('Sydney Paris', 'French. The guitar in a city of France.'),
)


@contextlib.contextmanager
def interrupted_at(name):
  """Interrupts what writes a file, before it has its name."""
  replace = os.replace

  def interrupt(source, place):
    if pathlib.Path(place).name == name:
      raise KeyboardInterrupt
    replace(source, place)

  with mock.patch.object(os, 'replace', interrupt):
    yield


class Facts(programs.Setup):
  """Edits of facts on a model without a chat."""

  kind, good = 'fact', FACTS

  def __init__(self):
    super().__init__(memit_batch)
    self.data = self.write(*FACTS)
    self.choices = self.write(*CHOICES)
    self.contexts = self.path('contexts.json')
    self.contexts.write_text(json.dumps(CONTEXTS))

  def given(self):
    return dict(
        data=self.data,
        layers='0,1',
        batch_size=2,
        slots=2,
        moment_weight=20,
        value_steps=5,
        eval_batch_size=4,
        max_new_tokens=3,
        moments_corpus=f'file:{self.text}',
        moments_tokens=400,
        context_templates=self.contexts,
    )

  @functools.cached_property
  def whole(self):
    """Two batches of two, and all that can be asked for."""
    return self.run(
        save_model=True,
        keep_original=True,
        perplexity_text=self.text,
        perplexity_tokens=300,
        choices=self.choices,
    )

  @functools.cached_property
  def pair(self):
    return self.run(num_edits=2)

  @functools.cached_property
  def coarse(self):
    return tiny_model.make(self.folder / 'coarse', dtype='bfloat16')


class Texts(programs.Setup):
  """Edits of long answers on a model with a chat."""

  kind, good = 'text', TEXTS

  def __init__(self):
    super().__init__(anyedit_batch, chats=True)
    self.data = self.write(*TEXTS)

  def given(self):
    return dict(
        data=self.data,
        layers='0,1',
        window=WINDOW,
        slots=2,
        moment_weight=20,
        value_steps=4,
        eval_batch_size=2,
        max_new_tokens=6,
        moments_corpus=f'file:{self.text}',
        moments_tokens=400,
    )

  def unke(self, **changes: Any):
    """Runs with UnKE."""
    settings = dict(
        method='unke', layers='1', moment_weight=None, value_steps=20,
        unke_steps=10, unke_rate=1e-2, preserve=f'file:{self.text}',
        preserve_count=2,
    )  # fmt: skip
    return self.run(**(settings | changes))

  @functools.cached_property
  def whole(self):
    """Every record alone."""
    return self.run()

  @functools.cached_property
  def block(self):
    """Every record alone, by UnKE."""
    return self.unke()

  @functools.cached_property
  def cases(self):
    """Two of the records are one case."""
    one, two, three, four = TEXTS
    case = {'case': 'both'}
    return self.write(one, two | case, three | case, four)

  @functools.cached_property
  def mute(self):
    """A model without a chat template."""
    return tiny_model.make(self.folder / 'mute')


# One of each serves all tests of a file; `both_kinds` gives their names.
SETUPS = {'FACT': Facts, 'TEXT': Texts}
setup_of = functools.cache(lambda name: SETUPS[name]())
both_kinds = parameterized.named_parameters(
    ('facts', 'FACT'), ('texts', 'TEXT')
)


def close():
  """Ends the set-ups of a file."""
  for name in SETUPS:
    setup_of(name).close()
  setup_of.cache_clear()


class Case(programs.Case):
  """Assertions about runs."""

  def succeed(self, run, **changes):
    return super().succeed(getattr(run, 'run', run), **changes)

  def refuse(self, setup, *messages, weights=False, **changes):
    """Runs in vain; nothing expensive may have happened before.

    Args:
      setup: the setup.
      *messages: patterns of the lines on standard error, all of them.
      weights: whether the weights had to be read for this.
      **changes: flags.
    """
    unreached = [
        (editing, 'judge'),
        (editing, '_edit_in_sequence'),
        (editing, '_edit_independent'),
        (moments, 'collect'),
        (corpora, 'sample'),
    ]
    if not weights:
      unreached.append((loading, 'load_model'))
    return super().refuse(setup.run, messages, unreached, **changes)

  def judged(self, setup, edited, data=None, **options):
    """What a model under an edit scores on the records, asked one by one."""
    model = setup.base
    tokens = TokenCache(tokenizer.load_tokenizer(setup.model))
    if setup.kind == 'fact':
      scorer = TeacherForced(tokens)
    else:
      chat = chat_lib.chat_of(tokens.tokenizer, 'template')
      stop = end_ids(tokens.tokenizer, model.spec.vocab, chat.end)
      scorer = LongForm(tokens, chat, stop, max_new_tokens=6)
    requests = datasets.load_requests(
        data or setup.data, kinds=(setup.kind,)
    ).requests
    lm = edited_lib.open_model(model, edited, batch_size=2)
    found = evaluation.evaluate(lm, requests, (scorer,), **options)
    return found.per_record

  def assert_judged(self, setup, edited, rows, data=None):
    """Checks that records were judged under an edit.

    Args:
      setup: the setup.
      edited: the edit, or edits side by side.
      rows: (edit of those side by side or None, line of records.jsonl).
      data: the file of records, unless the setup's.
    """
    for index, row in rows:
      one = edited if index is None else edited_lib.select(edited, index)
      found = self.judged(setup, one, data)[row['number'] - 1]
      if setup.kind == 'fact':
        for name in ('nll_new', 'nll_true'):
          self.assertAlmostEqual(found[name], row['after'][name], delta=1e-3)
      else:
        for name in ('text', 'paraphrase_texts', 'sub_texts'):
          self.assertEqual(found[name], row['after'][name])

  def assert_same_rows(self, one, other):
    """Compares lines of records.jsonl up to the last digits of numbers."""
    for name in ('number', 'written', 'states'):
      self.assertEqual(one[name], other[name], name)
    for when in ('before', 'after'):
      self.assert_same_numbers(one[when], other[when])
    self.assertAlmostEqual(one['loss'], other['loss'], delta=1e-4)
    np.testing.assert_allclose(one['distance'], other['distance'], atol=1e-3)

  def assert_same_numbers(self, one, other):
    for name, value in one.items():
      if name == 'metrics':
        self.assert_same_numbers(value, other[name])
      elif isinstance(value, float):
        self.assertAlmostEqual(value, other[name], delta=1e-3, msg=name)
      else:
        self.assertEqual(value, other[name], name)
