"""What the editing programs refuse: messages, exit code 2, and no work done."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import struct
from unittest import mock

import editing_runs
import numpy as np
import tiny_model
from absl.testing import absltest, parameterized
from editing_runs import FACTS, TEXTS, Case, fact, text

from experiments import edit
from jaxedit import edited as edited_lib
from jaxedit.convert import hub
from jaxedit.runs import editing, tasks
from jaxedit.stats import moments
from jaxedit.testing import facts

SPEC = tiny_model.SPEC
both_kinds = editing_runs.both_kinds
setup_of = editing_runs.setup_of


def setUpModule():
  global FACT, TEXT
  FACT, TEXT = map(setup_of, editing_runs.SETUPS)


def tearDownModule():
  editing_runs.close()


class RefusalCase(Case):

  def refuse(self, name, *messages, **options):
    return super().refuse(setup_of(name), *messages, **options)


class BadRecordTest(RefusalCase):

  @parameterized.named_parameters(
      ('field', {'target_new': None}, 'target_new'),
      ('subject', {'prompt': 'The tongue of Ada is'}, 'Danielle.* nowhere in'),
      ('places', {'prompt': '{} and {} are'}, '2 placeholders.*write'),
      ('empty_target', {'target_new': ''}, 'target_new'),
      ('blank_target', {'target_new': ' \t '}, 'target_new'),
      ('dropped_target', {'target_new': tiny_model.DROPPED},
       'has no tokens; give'),
      ('dropped_subject', {'subject': tiny_model.DROPPED},
       'no token left after tokenisation; give'),
      ('long_prompt', {'prompt': '{} is' + ' in' * 100},
       'limit is 96; shorten the prompt'),
      ('long_target', {'target_new': 'in ' * 100}, 'limit is 96; shorten'),
      ('long_paraphrase', {'paraphrases': ['is in' + ' in' * 100]},
       "prompt 'is in.*model has 96; shorten"),
      ('long_to_go_on', {'paraphrases': ['is in' + ' in' * 92]},
       "prompt 'is in.* 3 generated ones .*generate fewer"),
      ('long_neighbour',
       {'neighbours': [{'prompt': 'a' + ' in' * 100, 'answer': 'city'}]},
       "prompt 'a in.*; shorten them"),
      ('dropped_answer',
       {'neighbours': [{'prompt': 'a', 'answer': tiny_model.DROPPED}]},
       "prompt 'a': an answer has no tokens; give"),
  )  # fmt: skip
  def test_of_facts(self, changes, message):
    self.check('FACT', changes, message)

  @parameterized.named_parameters(
      ('no_answer', {'answer': None}, 'answer'),
      ('blank_answer', {'answer': ' \n '}, 'answer.*empty'),
      ('blank_question', {'question': ' '}, 'question.*empty'),
      ('field', {'anwser': 'x'}, 'anwser'),
      ('dropped_answer', {'answer': tiny_model.DROPPED},
       'has no tokens; give it some text'),
      ('long_answer', {'answer': 'in ' * 100},
       'question and answer take .* the limit is 96; shorten them'),
      ('long_question', {'question': 'in ' * 100},
       'question and answer take .* the limit is 96; shorten them'),
      ('long_paraphrase', {'paraphrases': ['a' + ' in' * 93]},
       "'a in.* 6 generated ones .* 96 positions .*generate fewer"),
      ('long_sub_question',
       {'sub_questions': [{'prompt': 'a' + ' in' * 93, 'answer': 'city'}]},
       "'a in.* shorten it"),
      ('no_word', {'sub_questions': [{'prompt': 'a', 'answer': '. .'}]},
       "answer '. .' has no word"),
  )  # fmt: skip
  def test_of_long_answers(self, changes, message):
    self.check('TEXT', changes, message)

  def check(self, name, changes, message):
    setup = setup_of(name)
    bad = setup.good[0] | changes
    bad = {k: v for k, v in bad.items() if v is not None}
    data = setup.write(setup.good[1], bad)
    self.refuse(name, rf'^error: record 2 \(id 2\).*{message}', data=data)

  def test_same_fact_twice(self):
    data = FACT.write(FACTS[0], FACTS[1], FACTS[0])
    self.refuse(
        'FACT',
        r'record 3 .* same edit as record 1 .*; drop',
        data=data,
        batch_size=3,
    )

  def test_conflicting_facts(self):
    data = FACT.write(FACTS[0], fact('Danielle', 'Tower', id='x'))
    message = r"record 2 \(id x\).*'Tower' where record 1 .*'twin city'.*keep"
    self.refuse('FACT', message, data=data)

  def test_two_answers_to_one_question(self):
    data = TEXT.write(TEXTS[0], TEXTS[0] | {'answer': 'Paris'})
    self.refuse(
        'TEXT', 'record 2 .*record 1.* in another way; keep one', data=data
    )

  def test_case_in_two_places(self):
    one, two, three, _ = TEXTS
    case = {'case': 'both'}
    data = TEXT.write(one | case, two, three | case)
    message = "record 3 .*its case 'both' is that of record 1"
    self.refuse('TEXT', message, data=data)

  def test_longer_than_allowed(self):
    message = 'record {} .*takes .* more than --max_answer_tokens=9; shorten'
    self.refuse('TEXT', *map(message.format, (1, 2, 3)), max_answer_tokens=9)

  def test_all_at_once_with_and_without_a_tokenizer(self):
    data = FACT.write(
        fact('Danielle', target_new=''),
        FACTS[1],
        fact('Sydney', tiny_model.DROPPED),
        '{"prompt": ',
        fact('Paris', prompt='{} or {}'),
    )
    self.refuse(
        'FACT', 'record 1 .*target_new', 'record 3 .*no tokens',
        'record 4 .*not JSON at line 4', 'record 5 .*2 placeholders',
        data=data,
    )  # fmt: skip
    data = TEXT.write(
        text('Danielle', ''),
        TEXTS[1],
        text('Sydney', tiny_model.DROPPED),
        '{"question": ',
    )
    self.refuse(
        'TEXT', 'record 1 .*answer', 'record 3 .*no tokens',
        'record 4 .*not JSON', data=data,
    )  # fmt: skip

  @both_kinds
  def test_nothing_left_after_skipping(self, name):
    setup = setup_of(name)
    bad = {'FACT': fact('Danielle', ''), 'TEXT': text('Danielle', '')}[name]
    data = setup.write(bad)
    self.refuse(name, 'record 1', data=data, on_bad_record='skip')

  @both_kinds
  def test_no_such_data(self, name):
    message = 'nowhere.*there is no such file; check'
    self.refuse(name, message, data='nowhere.jsonl')
    self.refuse(name, message, data='nowhere.jsonl', program=edit)

  @both_kinds
  def test_data_without_records(self, name):
    data = setup_of(name).write('')
    self.refuse(name, 'holds no records', data=data)

  @both_kinds
  def test_data_of_the_other_kind(self, name):
    other = {'FACT': TEXT, 'TEXT': FACT}[name]
    self.refuse(name, '.', data=other.data)

  @both_kinds
  def test_bad_records_fetch_no_model(self, name):
    bad = {'FACT': fact('Danielle', ''), 'TEXT': text('Danielle', '')}[name]
    data = setup_of(name).write(bad)
    with mock.patch.object(hub, 'resolve') as resolve:
      self.refuse(name, 'record 1', data=data, model='smollm2-135m-instruct')
    resolve.assert_not_called()


class BadFlagTest(RefusalCase):
  """See runs_config_test and runs_method_flags_test for most of them."""

  @parameterized.named_parameters(
      ('words', 'FACT', dict(words=['more']), 'unexpected arguments: more'),
      ('layer_range', 'FACT', dict(layers='1,3'), 'has layers 0 to 2; choose'),
      ('layer_below', 'FACT', dict(layers='-1'), 'has layers 0 to 2; choose'),
      ('layer_twice', 'FACT', dict(layers='1,1'), 'once, in ascending order'),
      ('unke_layer', 'TEXT', dict(method='unke', moment_weight=None,
                                  layers=None), 'has layers 0 to 2; choose'),
      ('corpus', 'FACT', dict(moments_corpus='wiki'),
       "'wiki' is unknown; give self"),
      ('corpus_file', 'FACT', dict(moments_corpus='file:none.txt'),
       'none.txt: cannot be read .*; check the path'),
      ('preserve', 'TEXT', dict(method='unke', moment_weight=None, layers='1',
                                preserve='wiki'), "'wiki' is unknown; give se"),
      ('contexts', 'FACT', dict(context_templates='none.json'),
       'none.json: cannot be read'),
      ('model', 'FACT', dict(model='none'), "'none' names no model: .* Accep"),
      ('chat', 'TEXT', dict(chat='Q: '),
       "the chat 'Q: ' has '{}' 0 times; give"),
      ('chat_twice', 'TEXT', dict(chat='{} {}'), "has '{}' 2 times; give"),
      ('encoder', 'TEXT', dict(encoder='nowhere'),
       "'nowhere' names no text encoder"),
      ('end', 'TEXT', dict(answer_end='the end'),
       "'the end', is no token .*name the token"),
      ('states', 'TEXT', dict(states='kept', reset=False, batch_size=2),
       'states=kept: in a sequence the targets of a batch depend on .*--reset'),
      ('schedule', 'TEXT', dict(anyedit=False, parity='anyedit', batch_size=3,
                                reset=False),
       '3 edits a batch in 2 layers .*take at most 2 a batch'),
  )  # fmt: skip
  def test_one_message(self, name, changes, message):
    self.refuse(name, message, **changes)

  @both_kinds
  def test_all_at_once(self, name):
    self.refuse(
        name, 'rrome_keys', 'layers', 'output_dir', 'save_model',
        output_dir=None, save_model=True, reset=True, layers='x',
        rrome_keys='mean',
    )  # fmt: skip

  def test_model_without_chat_template(self):
    self.refuse('TEXT', 'has no chat template; .*chat.*none', model=TEXT.mute)

  def test_published_schedule_of_some_batches(self):
    plain = dict(anyedit=False, parity='anyedit')
    self.refuse(
        'TEXT',
        'cases of several rewrites, which are edited together; leave --parity',
        data=TEXT.cases, **plain,
    )  # fmt: skip
    self.refuse(
        'TEXT', 'the last batch would have 1; let --num_edits be a multiple of',
        num_edits=3, batch_size=2, reset=False, **plain,
    )  # fmt: skip

  def test_independent_batches_that_outgrow_their_matrices(self):
    limit = edited_lib.rank_limit(SPEC.mlp_width, SPEC.width)
    data = FACT.write(*[fact(f'Toko {i}') for i in range(limit + 1)])
    self.refuse(
        'FACT',
        f'--batch_size=999 with --reset: .* up to {limit} targets a batch',
        data=data, reset=True, batch_size=999,
    )  # fmt: skip
    self.refuse(
        'TEXT',
        f'--batch_size=4 with --reset: .* up to {limit} targets a batch',
        window=1, batch_size=4, weights=True,
    )  # fmt: skip

  @parameterized.named_parameters(
      ('no_json', '["{}", ', 'not valid JSON .*give a JSON list'),
      ('object', '{"a": 1}', 'holds an object where a list is needed'),
      ('none', '["{}", "a b"]', r"template 2, 'a b', has '\{\}' 0 times"),
      ('two', '["{} {}"]', r"template 1, .* has '\{\}' 2 times; write it once"),
      ('number', '["{}", 3]', 'template 2 is int, not text'),
  )
  def test_context_templates(self, written, message):
    path = FACT.path('contexts.json')
    path.write_text(written)
    self.refuse('FACT', message, context_templates=path)

  def test_facts_too_long_under_contexts(self):
    long = ('{}', 'in ' * 90 + '{}')
    messages = [f'record {n} .*limit is 96; shorten' for n in range(1, 5)]
    with mock.patch.object(tasks, 'sample_contexts', return_value=long):
      self.refuse('FACT', *messages, context_templates=None, weights=True)
    path = FACT.path('contexts.json')
    path.write_text(json.dumps(['in ' * 90 + '{}']))
    self.refuse('FACT', *messages, context_templates=path)


class BadModelTest(RefusalCase):

  def copy(self):
    place = FACT.path('model')
    shutil.copytree(FACT.model, place)
    return place

  def test_truncated_weights(self):
    place = self.copy()
    weights = place / 'model.safetensors'
    weights.write_bytes(weights.read_bytes()[:-100])
    self.refuse(
        'FACT', 'safetensors: is cut short or damaged.*; fetch', model=place
    )

  def test_truncated_gguf(self):
    path = FACT.path('model.gguf')
    path.write_bytes(b'GGUF' + struct.pack('<IQQ', 3, 10, 5) + bytes(10))
    message = 'model.gguf: .*it ends inside the header.*; fetch the file'
    self.refuse('FACT', message, model=path)

  def test_pickle_alone(self):
    place = self.copy()
    (place / 'model.safetensors').rename(place / 'pytorch_model.bin')
    self.refuse('FACT', 'only pickle weights .*convert them', model=place)

  def test_no_tokenizer(self):
    place = self.copy()
    (place / 'tokenizer.json').unlink()
    self.refuse('FACT', 'holds no tokenizer .*; copy', model=place)

  def test_weights_that_are_not_finite(self):
    bad = np.ones(SPEC.width, np.float32)
    bad[3] = np.nan
    place = tiny_model.make(
        FACT.path('model'), changes={'model.norm.weight': bad}
    )
    self.refuse(
        'FACT',
        'tensor model.norm.weight has values that are not finite.*fetch',
        model=place, weights=True,
    )  # fmt: skip

  def test_own_source_is_not_overwritten(self):
    place = FACT.path('used')
    shutil.copytree(FACT.model, place / 'model')
    self.refuse(
        'FACT', 'model lies where .* would replace it; choose another',
        model=place / 'model', output_dir=place, overwrite=True,
    )  # fmt: skip

  def test_places_that_cannot_be_written(self):
    message = 'cannot be written .*; choose another folder'
    for place in (FACT.data, FACT.data / 'below'):
      self.refuse('FACT', message, output_dir=place)
    with mock.patch.dict(os.environ, {'JAXEDIT_CACHE': str(FACT.data)}):
      message = 'cannot be kept there .*let JAXEDIT_CACHE'
      self.refuse('FACT', message, weights=True)


class BadMomentsTest(RefusalCase):

  def save(self, layers=(0, 1), model=None):
    found = facts.random_moments(SPEC, layers, seed=0)
    provenance = dict(found.provenance) | {'model': model or FACT.base.hash}
    path = FACT.path('moments.safetensors')
    moments.save(path, dataclasses.replace(found, provenance=provenance))
    return path

  def test_of_another_model(self):
    path = self.save(model='other')
    message = "hash 'other', not of .*; collect"
    done = self.refuse('FACT', message, moments=path, weights=True)
    # Nothing was written, so the mended command needs no --overwrite.
    self.assertFalse(done.folder.exists())

  def test_without_a_layer(self):
    path = self.save((0,))
    self.refuse('FACT', 'of layers 0, not of 1; collect', moments=path)

  def test_cut_short(self):
    path = self.save()
    path.write_bytes(path.read_bytes()[:-10])
    self.refuse('FACT', 'is cut short or damaged', moments=path)

  def test_corrupt(self):
    path = self.save()
    blob = bytearray(path.read_bytes())
    blob[-3] ^= 1
    path.write_bytes(blob)
    message = 'gram/. is missing or damaged'
    self.refuse('FACT', message, moments=path, weights=True)

  def test_published_folder_without_archives(self):
    self.refuse(
        'FACT',
        '0 archives of mlp/down in layer 0',
        '0 archives of mlp/down in layer 1',
        moments=FACT.model, weights=True,
    )  # fmt: skip

  def test_too_little_text(self):
    path = FACT.path('text.txt')
    path.write_text('the tongue of Paris')
    with mock.patch.object(editing, 'judge') as judge:
      done = FACT.run(moments_corpus=f'file:{path}')
    judge.assert_not_called()
    self.assertEqual(done.code, 2)
    self.assertRegex(done.err, 'error: .*not positive definite; collect more')
    self.assertFalse(
        done.folder.exists()
    )  # the corrected command shall not be refused


class CommandTest(RefusalCase):
  """As a user starts it."""

  def test_errors_end_in_messages_and_exit_code_2(self):
    facts_ = FACT.write(fact('Danielle', ''), fact('Toko', prompt='{} {}'))
    texts = TEXT.write(text('Danielle', ''), text('Toko', ''))
    broken = FACT.path('model')
    shutil.copytree(FACT.model, broken)
    (broken / 'model.safetensors').write_bytes(b'\xff' * 99)
    binary, names = FACT.path('x.flags'), FACT.path('y.flags')
    binary.write_bytes(b'\x80\xff')
    names.write_text(f'--seed=1\n--flagfile={binary}\n')
    pipe = FACT.path('z.flags')
    os.mkfifo(pipe)
    cases = {
        'binary': (FACT, [f'--flagfile={names}'],
                   [f'--flagfile={binary}: is not UTF-8 text;']),
        'pipe': (FACT, [f'--flagfile={pipe}'],
                 [f'--flagfile={pipe}: cannot be read .a pipe or a device']),
        'flag': (FACT, ['--modle=x'], ["flag 'modle'. Did you mean: model"]),
        'file': (FACT, ['--flagfile=none.flags'],
                 ['--flagfile=none.flags: cannot be read .No such file']),
        'facts': (FACT, FACT.arguments(data=facts_),
                  ['record 1 .*', 'record 2 .*']),
        'texts': (TEXT, TEXT.arguments(data=texts),
                  ['record 1 .*', 'record 2 .*']),
        'model': (FACT, FACT.arguments(model=broken), ['safetensors: .*fetch']),
    }  # fmt: skip
    running = {
        name: setup.start(*given) for name, (setup, given, _) in cases.items()
    }
    for name, process in running.items():
      out, err = process.communicate(timeout=300)
      with self.subTest(name):
        self.assertEqual(process.returncode, 2, err)
        self.assertEqual(out, '')
        lines = [x for x in err.splitlines() if x.startswith('error: ')]
        messages = cases[name][2]
        self.assertLen(lines, len(messages), err)
        for line, message in zip(lines, messages):
          self.assertRegex(line, message)
        for noise in ('Traceback', 'FATAL', 'ERROR'):
          self.assertNotIn(noise, err)

  def test_help_lists_all_flags(self):
    for setup in (FACT, TEXT):
      self.assert_helps(setup)


if __name__ == '__main__':
  absltest.main()
