"""MeLLo with a scripted generator: rounds, retrieval, and what is scored.

The script knows the true facts and follows the demonstrations to the letter: it
asks for one hop after the other, drafts the true answer and takes what the
memory says where that is about the sub-question.
"""

from __future__ import annotations

import functools
import pathlib
import types
from unittest import mock

import numpy as np
import text_tokenizers
from absl.testing import absltest, parameterized

from jaxedit import retrieval
from jaxedit.deltas import Edited
from jaxedit.edited import Query, dialogue, open_model
from jaxedit.methods import base, mello
from jaxedit.methods.base import EditBatch, Run
from jaxedit.models import decode, loading
from jaxedit.testing import models
from jaxedit.types import EditRequest, InputError

SPEC = models.tiny_spec('llama', vocab=400, max_positions=4096)
ENCODER = types.SimpleNamespace(model=types.SimpleNamespace(hash='e' * 64))
TRUE = {
    'Ann is a citizen of': 'Peru',
    'Bob is a citizen of': 'Chad',
    'The capital of Peru is': 'Lima',
    'The capital of Chad is': 'Kelo',
    'The capital of Mali is': 'Segou',
}
# What is edited, and questions with the hops that answer them.
EDITS = {'Ann is a citizen of': 'Mali', 'The capital of Chad is': 'Abeche'}
RELATIONS = {
    'citizen': '{} is a citizen of',
    'capital': 'The capital of {} is',
}
QUESTIONS = {
    'capital of the land of Ann?': ('Ann', 'citizen', 'capital', 'Segou'),
    'capital of the land of Bob?': ('Bob', 'citizen', 'capital', 'Abeche'),
    'land of Ann?': ('Ann', 'citizen', 'Mali'),
    'land of Bob?': ('Bob', 'citizen', 'Chad'),
    'capital of Peru?': ('Peru', 'capital', 'Lima'),
}


def embed(encoder, texts, **options):
  """Counts of words: texts of the same words are near."""
  del encoder, options
  found = np.zeros((len(texts), 512), np.float32)
  for row, text in zip(found, texts):
    for word in text.rstrip('?.').split():
      row[sum(map(ord, word)) % 512] += 1
  return found / np.maximum(np.linalg.norm(found, axis=1, keepdims=True), 1)


class Script:
  """Stands for `decode.generate`: writes what a model would that follows."""

  def __init__(self, tokenizer):
    self._tokenizer = tokenizer
    self.calls = []

  def __call__(self, spec, params, prompts, *, stop_texts, **settings):
    self.calls.append(len(prompts))
    texts = map(self._tokenizer.decode, prompts)
    return [
        self._tokenizer(self._until(self.write(text), stops))['input_ids']
        for text, stops in zip(texts, stop_texts)
    ]

  def _until(self, text, stops):
    ends = [text.find(stop) + len(stop) for stop in stops if stop in text]
    return text[: min(ends, default=len(text))]

  def write(self, text):
    own = text.rsplit(dialogue.QUESTION + ' ', 1)[1]
    question, *rest = own.split('\n')
    subject, *relations, _ = QUESTIONS[question]
    asked = [RELATIONS[name] for name in relations]
    holds = subject
    facts = [
        line.removeprefix(dialogue.RETRIEVED).strip()
        for line in rest
        if line.startswith(dialogue.RETRIEVED)
    ]
    for hop, fact in zip(asked, facts):
      prompt = hop.format(holds)
      about = fact.startswith(prompt + ' ')
      holds = fact.removeprefix(prompt)[1:-1] if about else TRUE[prompt]
    check = f'{dialogue.CHECK} what holds is: {holds}\n' if facts else ''
    if text.endswith(dialogue.FINAL):
      return f' {holds}\nand so on'
    if len(facts) == len(asked):
      return f'{check}{dialogue.FINAL} {holds}\n\nQuestion: more'
    prompt = asked[len(facts)].format(holds)
    return (
        f'{check}{dialogue.SUBQUESTION} {prompt}\n'
        f'{dialogue.TENTATIVE} {prompt} {TRUE.get(prompt)}.\n'
        f'{dialogue.RETRIEVED} what the model makes up'
    )


@functools.cache
def model() -> loading.Model:
  params = models.random_params(SPEC, 0)
  tokenizer = text_tokenizers.byte_level()
  return loading.Model(
      SPEC, params, pathlib.Path(), 'ab' * 32, {}, tokenizer=tokenizer
  )


def edited_of(edits=EDITS, group=None, **settings) -> Edited:
  requests = [
      EditRequest(i, str(i), '{}', prompt, target)
      for i, (prompt, target) in enumerate(edits.items())
  ]
  method = mello.METHOD
  editor = method.editor(SPEC, method.configure(**settings))
  found = {base.Tokenizer(): model().tokenizer, base.TextEncoder(): ENCODER}
  batch = EditBatch([None] * len(requests), None, group, requests)
  return editor.edit(model(), editor.init(model(), found), batch, Run()).edited


def ids(text):
  return model().tokenizer(text)['input_ids']


@mock.patch.object(retrieval, 'embed', embed)
class ScriptTest(parameterized.TestCase):

  def answers(self, edited, questions=QUESTIONS, **options):
    script = Script(model().tokenizer)
    with mock.patch.object(decode, 'generate', script):
      lm = open_model(model(), edited)
      new = lm.generate(
          [ids(question) for question in questions], max_new_tokens=20,
          stop_texts=[['\n']] * len(questions), **options,
      )  # fmt: skip
    self.calls = script.calls
    return [model().tokenizer.decode(one).strip() for one in new]

  def test_all_questions_are_answered(self):
    want = [hops[-1] for hops in QUESTIONS.values()]
    self.assertEqual(self.answers(edited_of()), want)
    # All questions of a round decode together; the last call answers.
    self.assertEqual(self.calls, [5, 5, 2, 5])

  def test_less_with_a_corrupted_memory(self):
    wrong = {**EDITS, 'Ann is a citizen of': 'Peru'}
    found = self.answers(edited_of(wrong))
    right = [one == hops[-1] for one, hops in zip(found, QUESTIONS.values())]
    self.assertEqual(right, [False, True, False, True, True])

  def test_edits_side_by_side_ask_their_own_memory(self):
    edited = edited_of(group=[0, 1])
    questions = ['land of Ann?', 'capital of the land of Bob?'] * 2
    found = self.answers(edited, questions, edit_ids=[0, 0, 1, 1])
    self.assertEqual(found, ['Mali', 'Kelo', 'Peru', 'Abeche'])

  def transcripts(self, script, questions, most=4096, **settings):
    memory = edited_of(**settings).prompting

    def speak(texts, which, *, max_new_tokens, stop_ids, stop_texts):
      return script(None, None, texts, stop_texts=[stop_texts] * len(texts))

    speak.most = most
    prompts = [ids(question) for question in questions]
    return memory.dialogues(prompts, None, speak)

  def test_the_transcript(self):
    script = Script(model().tokenizer)
    one, again, other = self.transcripts(
        script, ['land of Ann?', 'land of Ann?', 'land of Bob?']
    )
    self.assertIs(one, again)
    self.assertTrue(one.ended and other.ended)
    self.assertEqual(
        one.text,
        f'{mello.DEMONSTRATIONS}\n\nQuestion: land of Ann?\n'
        'Subquestion: Ann is a citizen of\n'
        'Tentative answer: Ann is a citizen of Peru.\n'
        'Retrieved fact: Ann is a citizen of Mali.\n'
        'Check: what holds is: Mali\n'
        'Final answer:',
    )
    self.assertEqual(one.facts, (0,))
    self.assertEqual(script.calls, [2, 2])

  @parameterized.parameters(
      ('no form at all', 1, 'no form at all'),
      ('Tentative answer: x\nRetrieved fact: y', 1, 'Tentative answer: x'),
      ('Subquestion: a b\nRetrieved fact:', 3, 'Subquestion: a b'),
      ('\n\nQuestion: another', 1, '?'),
  )  # fmt: skip
  def test_rounds_that_end_early_ask_for_the_answer(self, said, calls, last):
    script = Script(model().tokenizer)
    script.write = lambda text: said
    (one,) = self.transcripts(script, ['land of Ann?'], rounds=2)
    self.assertFalse(one.ended)
    self.assertLen(script.calls, calls)
    self.assertEndsWith(one.text, f'{last}\nFinal answer:')
    self.assertLen(one.facts, calls - 1)

  def test_the_window(self):
    script = Script(model().tokenizer)
    script.write = lambda text: 'Subquestion: a b\nRetrieved fact:'
    start = len(ids(f'{mello.DEMONSTRATIONS}\n\nQuestion: land of Ann?\n'))
    least = start + 128 + 64
    (one,) = self.transcripts(script, ['land of Ann?'], most=least)
    self.assertLen(script.calls, 1)  # what is retrieved has no room
    self.assertEndsWith(one.text, 'Final answer:')
    with self.assertRaisesRegex(InputError, 'prompt 0 takes .* shorten it or'):
      self.transcripts(script, ['land of Ann?'], most=least - 1)

  def test_answers_are_scored_after_the_transcript(self):
    memory = edited_of().prompting
    answers = tuple(tuple(ids(f' {name}')) for name in ('Mali', 'Peru'))
    prompts = [ids('land of Ann?'), ids('capital of the land of Bob?')]
    with mock.patch.object(decode, 'generate', Script(model().tokenizer)):
      found = open_model(model(), edited_of()).score(
          [Query(tuple(prompt), answers) for prompt in prompts]
      )
    script = Script(model().tokenizer)
    written = self.transcripts(
        script, ['land of Ann?', 'capital of the land of Bob?']
    )
    want = open_model(model()).score(
        [Query(tuple(ids(one.text)), answers) for one in written]
    )
    for one, other in zip(sum(found, []), sum(want, [])):
      self.assertAlmostEqual(one.nll, other.nll, delta=1e-4)
      self.assertEqual(one[1:], other[1:])
    with self.assertRaisesRegex(InputError, 'asked in rounds .*open_model'):
      memory.rewrite(prompts, None)

  def test_a_random_model_writes_rounds(self):
    """Without a script; a text under deltas as well."""
    lm = open_model(model(), edited_of(rounds=1, round_tokens=4))
    (text,) = lm.generate([ids('land of Ann?')], max_new_tokens=3)
    self.assertLen(text, 3)
    self.assertEqual(lm.generate([], max_new_tokens=3), [])


if __name__ == '__main__':
  absltest.main()
