"""Answers of an evaluation that is interrupted are found again, and are the same."""

from __future__ import annotations

import contextlib
import itertools
import math
import pathlib
import tempfile

import jax.numpy as jnp
from absl.testing import absltest, parameterized

from jaxedit.deltas import UNEDITED, Edited, LowRank
from jaxedit.edited.scoring import Query, Scored
from jaxedit.runs.answers import Answers, KeptAnswers
from jaxedit.types import Stopped


class Model:
  """Answers by its input alone, and counts what it is asked."""

  spec = 'spec'

  def __init__(self):
    self.asked = []

  def score(self, queries, *, edit_ids=None, progress):
    ids = edit_ids or [0] * len(queries)
    with progress('score', len(queries), 'prompt') as advance:
      for query in queries:
        self.asked.append(query)
        advance(1)
    return [
        [
            Scored(math.nan if a == (7,) else sum(a) / 3 + i, a, (True,) * n)
            for n, a in enumerate(q.answers)
        ]
        for q, i in zip(queries, ids)
    ]

  def generate(
      self, prompts, *, streams, stop_texts, edit_ids, progress, **how
  ):
    with progress('generate', len(prompts), 'text') as advance:
      for prompt in prompts:
        self.asked.append(prompt)
        advance(1)
    stop = stop_texts or [()] * len(prompts)
    return [
        [*p, s, len(t), how['most']][:4]
        for p, s, t in zip(prompts, streams, stop)
    ]


def stopping(after):
  """A progress that stops a run after so many calls."""
  calls = itertools.count(1)

  def advance(done):
    del done
    if next(calls) == after:
      raise Stopped('now')

  return lambda *stage: contextlib.nullcontext(advance)


class AnswersTest(parameterized.TestCase):
  kind = Answers

  def setUp(self):
    super().setUp()
    folder = self.enter_context(tempfile.TemporaryDirectory())
    self.folder = pathlib.Path(folder) / 'answers'
    self.queries = [
        Query((1,) * (1 + i % 5), ((i, 2), (7,), (i,))[: i % 4])
        for i in range(60)
    ]

  def open(self, model, edited=UNEDITED, about='a', size=1):
    self.answers = self.kind(self.folder, {'a': about})
    return self.answers.open(model, edited, size)

  def score(self, model, *, progress=None, **given):
    progress = progress or stopping(0)
    found = self.open(model, **given).score(self.queries, progress=progress)
    self.answers.save()  # without waiting for the time of a save
    return found

  def test_scores_of_a_stopped_evaluation(self):
    whole = Model().score(self.queries, progress=stopping(0))
    with self.assertRaises(Stopped):
      self.score(Model(), progress=stopping(40))
    for asked in (60 - 32, 0):
      model = Model()
      # As text, for a number that is not equal to itself.
      self.assertEqual(repr(self.score(model)), repr(whole))
      self.assertLen(model.asked, asked)

  @parameterized.parameters(
      dict(about='b'),
      dict(size=2),
      dict(edited=Edited(
          (LowRank((0,), 'mlp/down', jnp.ones((1, 1, 2)), jnp.ones((1, 1, 2))),)
      )),
  )  # fmt: skip
  def test_other_answers_are_not_used(self, **given):
    self.score(Model())
    again = Model()
    self.score(again, **given)
    self.assertLen(again.asked, 60)

  def test_texts(self):
    prompts = [[3] * (1 + i % 7) for i in range(40)]
    given = dict(
        streams=list(range(40, 80)), edit_ids=[i % 2 for i in range(40)],
        stop_texts=[('x',) * (i % 3) for i in range(40)], most=5,
    )  # fmt: skip
    whole = Model().generate(prompts, **given, progress=stopping(0))
    with self.assertRaises(Stopped):
      self.open(Model()).generate(prompts, **given, progress=stopping(20))
    for asked in (40 - 16, 0):
      model = Model()
      found = self.open(model).generate(prompts, **given, progress=stopping(0))
      self.answers.save()
      self.assertEqual(found, whole)
      self.assertLen(model.asked, asked)
    model = Model()
    self.open(model).generate(
        prompts, **given | {'most': 6}, progress=stopping(0)
    )
    self.assertLen(model.asked, 40)

  def test_progress_counts_what_was_found(self):
    self.score(Model())
    seen = []
    self.score(Model(), progress=lambda *s: contextlib.nullcontext(seen.append))
    self.assertEqual(sum(seen), 60)

  def test_nothing_is_asked(self):
    lm = self.open(Model())
    self.assertEqual(lm.score([], progress=stopping(0)), [])
    self.assertEqual(lm.spec, 'spec')
    self.assertFalse(self.folder.exists())


class KeptAnswersTest(AnswersTest):
  kind = KeptAnswers


if __name__ == '__main__':
  absltest.main()
