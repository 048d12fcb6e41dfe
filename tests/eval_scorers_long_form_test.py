"""Full answers: read as written, each by the model and draws of its own."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import text_tokenizers
from absl.testing import absltest, parameterized

from jaxedit import edited as edited_lib
from jaxedit.deltas import UNEDITED, Dense, Edited, LowRank
from jaxedit.edited import open_model
from jaxedit.eval import evaluation, report
from jaxedit.eval.scorers import base, long_form
from jaxedit.models import decode
from jaxedit.models.decode import Decoding
from jaxedit.testing import models
from jaxedit.text import chat
from jaxedit.text.token_cache import TokenCache
from jaxedit.types import EditRequest, InputError, Probe

PROMPTS = ((0, 9, 8, 7, 6), (0, 5), (0, 9, 8), (0, 5), (0, 1, 2, 3), (0, 5))
EDIT_IDS = (0, 1, 2, 2, 1, 0)
SAMPLED = Decoding(
    temperature=1.0, top_k=30, top_p=0.9, repetition_penalty=1.1, seed=4
)


def low_rank(spec, edits=3):
  rng = np.random.default_rng(0)
  draw = lambda width: jnp.asarray(
      0.5 * rng.standard_normal((2, edits, 2, width)), jnp.float32
  )
  return LowRank((1, 2), 'mlp/down', draw(spec.mlp_width), draw(spec.width))


def in_full(change):
  kernel = jnp.einsum('nemf,nemd->nefd', change.key, change.value)
  return Dense(change.layers, change.site, kernel)


def gate(spec, edits=3):
  rng = np.random.default_rng(1)
  shape = (1, edits, spec.width, spec.mlp_width)
  kernel = jnp.asarray(0.2 * rng.standard_normal(shape), jnp.float32)
  return Dense((0,), 'mlp/gate', kernel)


def scale(spec, edits=3):
  rng = np.random.default_rng(3)
  change = 0.5 * rng.standard_normal((1, edits, spec.width))
  return Dense((2,), 'mlp_norm', jnp.asarray(change, jnp.float32), 'scale')


def stack_of(*deltas):
  return Edited(deltas, size=3)


class EndsTest(parameterized.TestCase):

  def test_end_ids(self):
    tokenizer = text_tokenizers.byte_level(begin=True)
    self.assertEqual(base.end_ids(tokenizer, 400), (1,))
    self.assertEqual(base.end_ids(tokenizer, 1), ())
    line = tokenizer.convert_tokens_to_ids('\u010a')
    self.assertEqual(base.end_ids(tokenizer, 400, '\n'), (1, line))
    self.assertEqual(base.end_ids(tokenizer, 400, '', (7, 400)), (1, 7))
    # Only the special ones of several.
    self.assertEqual(base.end_ids(tokenizer, 400, '<unk>\n'), (1, 2))
    with self.assertRaisesRegex(InputError, "'END END'.*nothing can stop"):
      base.end_ids(tokenizer, 400, 'END END')


class AnswersTest(parameterized.TestCase):

  def setUp(self):
    super().setUp()
    self.tokenizer = text_tokenizers.byte_level(begin=True)
    self.spec = models.tiny_spec('llama', vocab=300)
    self.params = models.random_params(self.spec, 0)

  def write(self, edited=UNEDITED, prompts=PROMPTS, **settings):
    settings = dict(stop_ids=(), max_new_tokens=8) | settings
    lm = open_model(models.as_model(self.spec, self.params), edited)
    tokens = lm.generate(prompts, **settings)
    return base.texts(self.tokenizer, tokens, settings['stop_ids'])

  def test_text_is_as_written(self):
    lines = ['if x:\n\n    return  1 ,', " don 't . \n", '']
    ids = self.tokenizer(lines, add_special_tokens=False)['input_ids']
    ids[0] = [0, *ids[0], 1]
    texts = base.texts(self.tokenizer, ids)
    self.assertEqual(texts, [line.strip() for line in lines])

  def test_stop_token_is_left_out(self):
    new = decode.generate(self.spec, self.params, PROMPTS, max_new_tokens=8)
    stop = new[0][4]
    at = new[0].index(stop)
    self.assertGreater(stop, 2)
    (text,) = self.write(prompts=PROMPTS[:1], stop_ids=[stop])
    self.assertEqual(text, base.texts(self.tokenizer, [new[0][:at]])[0])
    # A text that ended at its length keeps its last token.
    text, *_ = self.write(max_new_tokens=at + 1)
    kept = new[0][: at + 1]
    self.assertEqual(text, base.texts(self.tokenizer, [kept])[0])

  @parameterized.parameters(decode.GREEDY, SAMPLED)
  def test_stacks(self, *decoding):
    decoding = Decoding(*decoding)
    change = low_rank(self.spec)
    stacks = [stack_of(change), stack_of(in_full(change))]
    lazy, merged = (
        self.write(stack, edit_ids=EDIT_IDS, decoding=decoding)
        for stack in stacks
    )
    self.assertEqual(lazy, merged)
    for edit in range(3):
      alone = self.write(edited_lib.select(stacks[0], edit), decoding=decoding)
      for i, own in enumerate(EDIT_IDS):
        if own == edit:
          self.assertEqual(alone[i], lazy[i])
    self.assertLen({lazy[1], lazy[3], lazy[5]}, 3)

  def test_mixed_stack_beside_a_shared_change(self):
    stack = stack_of(low_rank(self.spec), gate(self.spec), scale(self.spec))
    shared = Edited((LowRank((0,), 'mlp/down', *self.shared_factors()),))
    counted = []

    @contextlib.contextmanager
    def progress(stage, total, unit):
      counted.append(total)
      yield lambda done: counted.append(-done)

    self.params = edited_lib.apply(self.params, shared)
    texts = self.write(stack, edit_ids=EDIT_IDS, progress=progress)
    self.assertEqual(counted[0], len(PROMPTS))
    self.assertEqual(sum(counted), 0)
    base = self.params
    for edit in range(3):
      self.params = edited_lib.apply(base, edited_lib.select(stack, edit))
      alone = self.write()
      for i, own in enumerate(EDIT_IDS):
        if own == edit:
          self.assertEqual(alone[i], texts[i])

  def shared_factors(self):
    rng = np.random.default_rng(2)
    draw = lambda width: jnp.asarray(
        0.5 * rng.standard_normal((1, 1, width)), jnp.float32
    )
    return draw(self.spec.mlp_width), draw(self.spec.width)

  def test_full_changes_leave_the_parameters_alone(self):
    # As a change that all prompts share does: nothing is rounded to bf16.
    self.params = models.random_params(self.spec, 0, jnp.bfloat16)
    stack = stack_of(gate(self.spec), scale(self.spec))
    stack = jax.tree.map(np.asarray, stack)
    generate = decode.generate
    with mock.patch.object(decode, 'generate', side_effect=generate) as spied:
      texts = self.write(stack, edit_ids=EDIT_IDS, decoding=SAMPLED)
    self.assertEqual(spied.call_count, 3)
    for call in spied.call_args_list:
      kernels, own = self.params['layers'], call.args[1]['layers']
      self.assertIs(own['mlp'], kernels['mlp'])
      self.assertIs(own['attn'], kernels['attn'])
      self.assertEqual(own['mlp_norm']['scale'].dtype, jnp.float32)
      (change,) = call.kwargs['deltas']
      self.assertEqual(
          (change.site, change.value.dtype), ('mlp/gate', 'float32')
      )
    for edit in range(3):
      alone = self.write(edited_lib.select(stack, edit), decoding=SAMPLED)
      for i, own in enumerate(EDIT_IDS):
        if own == edit:
          self.assertEqual(alone[i], texts[i])

  def test_named_streams(self):
    streams = [7, 2**31 - 1, 0, 5, 5, 12]
    stack = stack_of(gate(self.spec))
    write = functools.partial(self.write, stack, decoding=SAMPLED)
    texts = write(edit_ids=EDIT_IDS, streams=streams)
    pick = lambda some: [some[i] for i in (4, 1)]
    write = functools.partial(
        write, prompts=pick(PROMPTS), edit_ids=pick(EDIT_IDS)
    )
    self.assertEqual(write(streams=pick(streams)), pick(texts))
    self.assertNotEqual(write(), pick(texts))

  def test_without_changes(self):
    self.assertEqual(self.write(stack_of(), edit_ids=EDIT_IDS), self.write())
    self.assertEqual(self.write(prompts=[]), [])
    stack = stack_of(gate(self.spec))
    self.assertEqual(self.write(stack, prompts=[], edit_ids=[]), [])

  def test_faults_come_together(self):
    stack = stack_of(low_rank(self.spec), gate(self.spec))
    with self.assertRaises(InputError) as caught:
      self.write(stack, edit_ids=[3, 0], decoding=Decoding(top_p=2.0))
    words = (
        'top_p is 2.0', 'edit_ids has 2 entries for 6',
        'edit_ids has 3; the model has edits 0 to 2',
    )  # fmt: skip
    self.assertLen(caught.exception.problems, len(words))
    for problem, part in zip(caught.exception.problems, words):
      self.assertIn(part, problem)
    for edited, edit_ids, words in (
        (stack, None, '3 independent edits lie side by side: let edit_ids'),
        (UNEDITED, EDIT_IDS, 'where no edits lie side by side'),
    ):
      with self.assertRaisesRegex(InputError, words):
        self.write(edited, edit_ids=edit_ids)
    with self.assertRaisesRegex(InputError, 'streams has 1 entries for 6'):
      self.write(streams=[3])

  @parameterized.parameters(low_rank, gate, scale)
  def test_the_axis_of_edits_is_stated(self, change):
    one = edited_lib.select(stack_of(change(self.spec)), 0).deltas
    for edited in (
        stack_of(low_rank(self.spec), *one),
        Edited((change(self.spec),)),
        Edited((change(self.spec, edits=4),), size=3),
    ):
      with self.assertRaisesRegex(InputError, 'has shape.*is expected'):
        self.write(edited, edit_ids=EDIT_IDS)


class LongformTest(parameterized.TestCase):

  def setUp(self):
    super().setUp()
    self.tokenizer = text_tokenizers.byte_level(begin=True)
    self.spec = models.tiny_spec('llama', vocab=300, max_positions=128)
    self.params = models.random_params(self.spec, 0)
    same = dict(prompt='Who?', subject=None, target='ab cd')
    again = Probe('rephrase', 'Who?', ('ab cd',))
    sub = Probe('sub_question', 'Who?', ('ab',))
    self.records = [
        EditRequest(3, 'a', probes=(again,), **same),
        EditRequest(8, 'b', probes=(sub,), **same),
        EditRequest(9, 'c', **same),
    ]

  def scorer(self, **settings):
    return long_form.LongForm(
        TokenCache(self.tokenizer),
        chat.chat_of(self.tokenizer, 'none', ''),
        **settings,
    )

  def said(self, chosen, edited, batch_size=64, **settings):
    """All texts of some records, record by record."""
    records = [self.records[i] for i in chosen]
    model = models.as_model(self.spec, self.params)
    scorer = self.scorer(
        decoding=Decoding(temperature=1.0), max_new_tokens=8, **settings
    )
    found = evaluation.evaluate(
        open_model(model, edited, batch_size=batch_size),
        records,
        [scorer],
        edit_ids=None if edited.size is None else chosen,
    )
    return [
        (row['text'], *row['paraphrase_texts'], *row['sub_texts'])
        for row in found.per_record
    ]

  @parameterized.parameters(None, low_rank, gate)
  def test_sampled_answers_know_no_neighbours(self, change):
    edited = UNEDITED if change is None else stack_of(change(self.spec))
    together = self.said([0, 1, 2], edited)
    # One question, five streams.
    self.assertLen({text for texts in together for text in texts}, 5)
    alone = [self.said([i], edited)[0] for i in range(3)]
    self.assertEqual(alone, together)
    mixed = self.said([2, 0], edited, batch_size=2)
    self.assertEqual(mixed, [together[2], together[0]])
    bare = self.said([1], edited, sub_questions=False)
    self.assertEqual(bare, [together[1][:1]])

  def test_edit_ids_of_other_records(self):
    model = models.as_model(self.spec, self.params)
    with self.assertRaisesRegex(InputError, '2 entries for 3 records'):
      evaluation.evaluate(
          open_model(model, stack_of(gate(self.spec))),
          self.records,
          [self.scorer()],
          edit_ids=[0, 1],
      )

  def test_what_cannot_be_asked_or_compared(self):
    bad = [
        EditRequest(1, 'a', 'Who? ' * 30, None, 'ab'),
        EditRequest(
            2, 'b', 'Why?', None, 'ab',
            probes=(Probe('sub_question', 'Who?', ('.',)),),
        ),
    ]  # fmt: skip
    scorer = self.scorer(max_new_tokens=100)
    long, blank = evaluation.errors(self.spec, [scorer], bad)
    self.assertLen(long + blank, 2)
    self.assertRegex(
        long[0], r"^question 'Who\? .*': its \d+ tokens and 100 gen"
    )
    self.assertRegex(blank[0], "^answer '.' has no word to compare")
    lm = open_model(models.as_model(self.spec, self.params))
    with self.assertRaises(InputError) as caught:
      evaluation.evaluate(lm, bad, [scorer])
    self.assertEqual(
        caught.exception.problems,
        ('record 1 (id a), ' + long[0], 'record 2 (id b), ' + blank[0]),
    )
    none = self.scorer(max_new_tokens=8, sub_questions=False)
    self.assertEqual(evaluation.errors(self.spec, [none], bad[1:]), [[]])

  def test_entries_and_excerpts(self):
    lm = open_model(models.as_model(self.spec, self.params))
    records = [
        dataclasses.replace(one, category=name, case=case)
        for one, name, case in zip(self.records, 'xyx', ('', 'k', 'k'))
    ]
    found = evaluation.evaluate(lm, records, [self.scorer(max_new_tokens=4)])
    first, second, _ = found.per_record
    self.assertEqual(
        set(first), {
            'number', 'id', 'category', 'case', 'metrics', 'text',
            'paraphrase_texts', 'sub_texts',
        },
    )  # fmt: skip
    self.assertContainsSubset(
        ['question/bleu_char', 'paraphrase/bleu_char'], first['metrics']
    )
    self.assertEqual(
        {name for name in second['metrics'] if name.startswith('sub/')},
        {
            'sub/rouge_1_recall', 'sub/rouge_2_recall', 'sub/rouge_l_recall',
            'sub/contains',
        },
    )  # fmt: skip
    # The two requests of a case weigh as one.
    self.assertEqual(found.summary['question/bleu_char']['n'], 2)
    self.assertEqual(found.preferred, ((), (), ()))
    self.assertEqual(list(evaluation.by_category(found)), ['x', 'y'])
    lines = report.excerpts(records, found, found, 2).split('\n')
    self.assertLen(lines, 8)
    self.assertEqual(lines[:2], ['3. Who?', '   wanted: ab cd'])
    self.assertStartsWith(lines[7], '   after:  ')


if __name__ == '__main__':
  absltest.main()
