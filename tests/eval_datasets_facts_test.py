"""Every format of facts loads; each error of a file names its record."""

import collections
import gzip
import hashlib
import json
import os
import pathlib
from unittest import mock

import dataset_files
from absl.testing import absltest, parameterized
from dataset_files import asked, without

from jaxedit import testing
from jaxedit.eval import datasets
from jaxedit.eval.datasets import entries
from jaxedit.types import InputError, Probe

FORMATS = ('counterfact', 'zsre', 'counterfact_flat', 'jaxedit')
OWN = {
    'id': 'ada',
    'prompt': '{} plays the',
    'subject': 'Ada',
    'target_new': 'oboe',
    'target_true': 'harp',
    'paraphrases': ['The instrument of Ada is the'],
    'neighbours': ['Ben plays the', {'prompt': 'Cy has a', 'answer': 'cat'}],
    'portability': {'alias': [{'prompt': 'A. plays the', 'answer': 'oboe'}]},
}
FLAT = {
    'case_id': 4,
    'prompt': 'Ada plays the',
    'subject': 'Ada',
    'target_new': 'oboe',
    'ground_truth': 'harp',
    'rephrase_prompt': 'Ada is good at the',
    'locality_prompt': 'Ben plays the',
    'locality_ground_truth': 'harp',
}
NESTED = {
    'case_id': 5,
    'requested_rewrite': {
        'prompt': '{} plays the',
        'subject': 'Ada',
        'target_new': {'str': 'oboe', 'id': 'Q1'},
        'target_true': {'str': 'harp', 'id': 'Q2'},
    },
    'paraphrase_prompts': ['Rain. Ada plays the', 'Ada is good at the '],
    'neighborhood_prompts': ['Ben plays the', 'Cy plays the'],
    'attribute_prompts': ['Di plays the'],
}
ZSRE = {
    'subject': 'Ada',
    'src': 'What does Ada play?',
    'pred': 'lute',
    'rephrase': 'Which instrument does Ada play?',
    'alt': ' oboe',
    'answers': ['harp', 'the harp'],
    'loc': 'nq question: who sings',
    'loc_ans': 'Ben',
    'cond': 'lute >> oboe || What does Ada play?',
}


def _people(*names, **changes):
  return [
      {'prompt': '{} is', 'subject': name, 'target_new': 'x'} | changes
      for name in names
  ]


def near(prompt, answer):
  return Probe('locality', prompt, (answer,))


class FormatTest(dataset_files.Base):

  def test_own(self):
    for data in (OWN, OWN | {'prompt': 'Ada plays the '}):
      loaded = self.load(data)
      (record,) = loaded.requests
      self.assertEqual(loaded.format, 'jaxedit')
      self.assertEqual((record.number, record.id), (1, 'ada'))
      self.assertEqual(record.prompt, '{} plays the')
      self.assertEqual(record.question, 'Ada plays the')
      self.assertEqual(record.target_true, 'harp')
      self.assertEqual(
          record.probes_of('locality'),
          (near('Ben plays the', 'harp'), near('Cy has a', 'cat')),
      )
      self.assertEqual(
          record.probes_of('alias'),
          (Probe('alias', 'A. plays the', ('oboe',)),),
      )
      self.assertEqual(
          [probe.kind for probe in record.probes],
          ['rephrase', 'locality', 'locality', 'alias'],
      )

  def test_own_needs_three_fields(self):
    (record,) = self.load(*_people('Ada')).requests
    self.assertIsNone(record.target_true)
    self.assertEqual(record.id, '1')
    self.assertEqual(record.probes, ())
    self.assertEqual((record.case, record.category), ('', ''))

  def test_kinds_of_probes(self):
    probes = {
        kind: [{'prompt': 'x', 'answer': 'y'}]
        for kind in ('one_hop', 'any', 'rephrase', 'locality', 'distract')
    }
    (record,) = self.load(*_people('Ada', portability=probes)).requests
    own = [
        f'portability_{kind}' for kind in ('rephrase', 'locality', 'distract')
    ]
    self.assertEqual(
        [probe.kind for probe in record.probes], ['one_hop', 'any', *own]
    )
    self.assertEqual(record.probes_of('any'), (Probe('any', 'x', ('y',)),))

  def test_side_effects(self):
    one = [{'prompt': 'x', 'answer': 'y'}]
    given = {'attribute': one * 2, 'distract': one}
    (record,) = self.load(*_people('Ada', side_effects=given)).requests
    self.assertEqual(
        [probe.kind for probe in record.probes],
        ['attribute', 'attribute', 'distract'],
    )
    (problem,) = self.problems(*_people('Ada', side_effects={'others': one}))
    self.assertIn("'others' is unknown; known fields are attribute", problem)

  def test_probes_of_the_survey(self):
    more = {
        'portability': {'New Question': 'Its reed is', 'New Answer': 'double'},
        'alternative_subject': 'Miss A.',
        'unrelated_relation': {'question': 'Ada lives in', 'object': 'Bath'},
        'distracting_neighborhood_prompts': [
            'Ada plays the oboe. Ben plays the '
        ],
    }
    loaded = self.load(NESTED | more)
    (record,) = loaded.requests
    self.assertEqual(
        record.probes[4:],
        (
            Probe('one_hop', 'Its reed is', ('double',)),
            Probe('alias', 'Miss A. plays the', ('oboe',)),
            Probe('attribute', 'Ada lives in', ('Bath',)),
            Probe('distract', 'Ada plays the oboe. Ben plays the', ('harp',)),
        ),
    )
    self.assertEqual(loaded.unread, ('attribute_prompts',))
    written = NESTED['requested_rewrite'] | {'prompt': 'Ada plays the'}
    (other,) = self.load(
        NESTED | more | {'requested_rewrite': written}
    ).requests
    self.assertEqual(other.probes, record.probes)
    empty = dict.fromkeys(more, '') | {'unrelated_relation': {}}
    empty['distracting_neighborhood_prompts'] = []
    (plain,) = self.load(NESTED | empty).requests
    self.assertLen(plain.probes, 4)
    more = {
        'alter_subject_question': 'What does Miss A. play?',
        'inverse question': 'Who plays the oboe?',
    }
    loaded = self.load(ZSRE | more)
    (record,) = loaded.requests
    self.assertEqual(
        record.probes[2:],
        (
            Probe('alias', 'What does Miss A. play?', ('oboe',)),
            Probe('reversed', 'Who plays the oboe?', ('Ada',)),
        ),
    )
    self.assertEqual(loaded.unread, ('cond', 'pred'))

  def test_counterfact_flat(self):
    loaded = self.load(FLAT)
    (record,) = loaded.requests
    self.assertEqual(loaded.format, 'counterfact_flat')
    self.assertEqual(record.id, '4')
    self.assertEqual(record.prompt, '{} plays the')
    self.assertEqual(record.target_true, 'harp')
    self.assertEqual(
        record.probes_of('rephrase'),
        (Probe('rephrase', 'Ada is good at the', ('oboe',)),),
    )
    self.assertEqual(
        record.probes_of('locality'), (near('Ben plays the', 'harp'),)
    )

  @parameterized.parameters(True, False)
  def test_counterfact(self, as_list):
    loaded = self.load(NESTED, as_list=as_list)
    (record,) = loaded.requests
    self.assertEqual(loaded.format, 'counterfact')
    self.assertEqual((record.id, record.subject), ('5', 'Ada'))
    self.assertEqual((record.target, record.target_true), ('oboe', 'harp'))
    self.assertEqual(
        asked(record), ('Rain. Ada plays the', 'Ada is good at the')
    )
    self.assertEqual(
        record.probes_of('locality'),
        (near('Ben plays the', 'harp'), near('Cy plays the', 'harp')),
    )

  def test_zsre(self):
    loaded = self.load(ZSRE)
    (record,) = loaded.requests
    self.assertEqual(loaded.format, 'zsre')
    self.assertEqual(record.prompt, 'What does {} play?')
    self.assertEqual((record.target, record.target_true), ('oboe', 'harp'))
    self.assertEqual(record.probes_of('locality'), (near('who sings?', 'Ben'),))
    (record,) = self.load(ZSRE, zsre_target='answers').requests
    self.assertEqual((record.target, record.target_true), ('harp', None))

  @parameterized.parameters(
      {'New Question': 'Its seat is', 'New Answer': 'Leeds'},
      {'Reasoning': {'prompt': 'Its seat is', 'ground_truth': 'Leeds'}},
      {'Reasoning': [{'prompt': 'Its seat is', 'ground_truth': ['Leeds']}]},
      {'Reasoning': [{'prompt': 'Its seat is', 'ground_truth': [['Leeds']]}]},
  )
  def test_portability_of_known_formats(self, **portability):
    wanted = (Probe('one_hop', 'Its seat is', ('Leeds',)),)
    for data in (ZSRE, FLAT):
      loaded = self.load(data | {'portability': portability})
      (record,) = loaded.requests
      self.assertEqual(record.probes_of('one_hop'), wanted)
      self.assertNotIn('portability', loaded.unread)

  def test_kinds_of_portability(self):
    one = {'prompt': 'x', 'ground_truth': 'y'}
    data = {'Subject_Aliasing': [one, one], 'Logical Generalization': one}
    (record,) = self.load(FLAT | {'portability': data}).requests
    kinds = [probe.kind for probe in record.probes[2:]]
    self.assertEqual(kinds, ['alias', 'alias', 'logical_generalization'])
    data['Reasoning'] = [{'prompt': 'x', 'ground_truth': []}]
    (problem,) = self.problems(FLAT | {'portability': data})
    self.assertIn("portability.Reasoning[1].ground_truth' is an empty", problem)

  def test_fields_that_are_not_read(self):
    loaded = self.load(ZSRE, ZSRE | {'src': 'What, Ada?', 'more': 1})
    self.assertEqual(loaded.unread, ('cond', 'more', 'pred'))
    self.assertEqual(self.load(OWN | {'comment': 'x'}).unread, ())
    self.assertEqual(self.load(FLAT).unread, ())

  @parameterized.parameters(
      (
          'KnowEdit',
          dict(prompt='x', subject='y', target_new='z', ground_truth=['v'],
               locality={}, portability={'Reasoning': []}),
      ),
      ('WikiBio', dict(text='x', labels='y', concept='z', locality={})),
      ('WikiBigEdit', dict(tag='P1', subject='x', update='y', ans='z')),
      ('CKnowEdit', dict(prompt='x', target_old='y', target_new='z')),
      ('MQuAKE', dict(requested_rewrite=[{'prompt': '{}'}], questions=['x'])),
  )  # fmt: skip
  def test_formats_that_are_not_read(self, name, data):
    for kind in (datasets.FACT, datasets.TEXT):
      (problem,) = self.problems(data, kinds=(kind,))
      self.assertRegex(
          problem, f'record 1 .* is one of {name}.* not read; write'
      )

  def test_format_is_detected_by_the_first_known_object(self):
    loaded = self.load({'odd': 1}, FLAT, on_bad_record='skip')
    self.assertEqual(loaded.format, 'counterfact_flat')
    self.assertEqual(loaded.requests[0].number, 2)

  def test_a_format_can_be_forced(self):
    problems = self.problems(FLAT, format='zsre')
    self.assertLen(problems, 6)
    self.assertIn("field 'src' is missing", ' '.join(problems))

  def test_source_and_hash(self):
    loaded = self.load(OWN)
    blob = pathlib.Path(self.path).read_bytes()
    self.assertEqual(loaded.sha256, hashlib.sha256(blob).hexdigest())
    self.assertEqual(loaded.source, self.path)

  def test_demo(self):
    folder = pathlib.Path(datasets.__file__).parent
    if not (folder / 'demo_facts.jsonl').exists():
      self.skipTest('the package has no demo facts')
    loaded = datasets.load_requests('demo')
    self.assertEqual((loaded.source, loaded.format), ('demo', 'jaxedit'))
    self.assertNotEmpty(loaded.requests)


class FileTest(dataset_files.Base):

  def test_missing_file_and_folder(self):
    for path in (self.path, os.path.dirname(self.path)):
      with self.assertRaises(InputError) as caught:
        datasets.load_requests(path)
      self.assertIn(path, caught.exception.problems[0])

  @parameterized.parameters(b'', b'\n\n', b'[]')
  def test_no_records(self, blob):
    self.write(blob)
    for kind in ('auto', 'zsre'):
      with self.assertRaisesRegex(InputError, 'holds no records'):
        datasets.load_requests(self.path, format=kind)

  def test_bad_line_is_reported_with_the_other_errors(self):
    lines = [json.dumps(OWN), '', '{"prompt": ', json.dumps({'prompt': 'x'})]
    self.write('\n'.join(lines))
    with self.assertRaises(InputError) as caught:
      datasets.load_requests(self.path)
    problems = caught.exception.problems
    self.assertStartsWith(problems[0], 'record 2 (id 2): not JSON at line 3')
    self.assertStartsWith(problems[1], 'record 3 (id 3): field')

  def test_only_bad_lines(self):
    self.write('prompt: 1\nsubject: 2')
    with self.assertRaisesRegex(InputError, 'not JSON at line 1'):
      datasets.load_requests(self.path)

  def test_broken_list(self):
    self.write('[\n{"prompt": "x"},\n{"prompt"}]')
    with self.assertRaisesRegex(InputError, 'not JSON at line 3'):
      datasets.load_requests(self.path)

  def test_deep_nesting_is_no_crash(self):
    self.write('{"a":' * 100_000)
    with self.assertRaisesRegex(InputError, 'not JSON at line 1'):
      datasets.load_requests(self.path)

  def test_one_object_over_several_lines(self):
    self.write(json.dumps(OWN, indent=2) + '\n')
    (record,) = datasets.load_requests(self.path).requests
    self.assertEqual(record.target, OWN['target_new'])
    self.write(json.dumps(OWN, indent=2)[:-5])
    with self.assertRaisesRegex(InputError, 'not JSON at line') as caught:
      datasets.load_requests(self.path)
    self.assertLen(caught.exception.problems, 1)

  def test_gzip(self):
    text = json.dumps(OWN).encode()
    self.write(gzip.compress(text) + gzip.compress(b'\n' + text[:-1] + b'}'))
    loaded = datasets.load_requests(self.path, limit=1)
    self.assertEqual(loaded.requests[0].target, OWN['target_new'])
    with open(self.path, 'rb') as file:
      self.assertEqual(loaded.sha256, hashlib.sha256(file.read()).hexdigest())
    self.write(gzip.compress(text)[:-9])
    with self.assertRaisesRegex(InputError, 'damaged gzip file'):
      datasets.load_requests(self.path)
    self.write(gzip.compress(text * 9))
    with mock.patch.object(entries, '_MOST_UNPACKED', 2 * len(text)):
      with self.assertRaisesRegex(InputError, 'unpacks to more than'):
        datasets.load_requests(self.path)

  def test_a_key_twice(self):
    line = json.dumps(OWN)
    for text in (line[:-1] + ', "subject": "Ben"}', f'[{line}]'):
      text = text.replace('"harp"', '"harp", "target_true": "lute"')
      self.write(text)
      with self.assertRaisesRegex(InputError, 'stands twice in an object'):
        datasets.load_requests(self.path)

  def test_encoding(self):
    self.write(b'{"prompt": "x"}\n{"prompt": "\xff"}')
    with self.assertRaisesRegex(InputError, 'line 2 is not UTF-8'):
      datasets.load_requests(self.path)
    self.write(b'\xef\xbb\xbf' + json.dumps(OWN).encode())
    self.assertLen(datasets.load_requests(self.path).requests, 1)

  def test_unknown_fields(self):
    (problem,) = self.problems({'question': 'a', 'answer': 'b'})
    self.assertIn("'question', 'answer'", problem)
    for kind in FORMATS:
      self.assertIn(kind, problem)

  def test_options(self):
    problems = self.problems(
        OWN, format='csv', limit=0, on_bad_record='drop', zsre_target='pred'
    )
    self.assertLen(problems, 4)
    self.assertIn('counterfact', problems[0])

  def test_line_separators_inside_a_text(self):
    data = OWN | {'paraphrases': ['a\u2028b\u0085c']}
    self.write(json.dumps(data, ensure_ascii=False))
    (record,) = datasets.load_requests(self.path).requests
    self.assertEqual(asked(record), ('a\u2028b\u0085c',))


class ErrorTest(dataset_files.Base):

  @parameterized.parameters(
      (without(OWN, 'prompt'), "'prompt' is missing"),
      (without(OWN, 'subject'), "'subject' is missing"),
      (OWN | {'subject': 3}, "'subject' holds a number; it must be text"),
      (OWN | {'subject': None}, "'subject' holds null"),
      (OWN | {'subject': ' '}, "'subject' is empty"),
      (OWN | {'target_new': ''}, "'target_new' is empty"),
      (OWN | {'target_new': '\n'}, "'target_new' is empty"),
      (OWN | {'prompt': '{} and {}'}, 'has 2 placeholders'),
      (OWN | {'prompt': 'Ben plays the'}, 'nowhere in the prompt'),
      (OWN | {'prompt': 'Adam plays'}, 'only inside a longer word'),
      (OWN | {'target_new': ' harp'}, "are both 'harp'"),
      (OWN | {'paraphrases': 'x'}, "'paraphrases' holds text; .* a list"),
      (OWN | {'paraphrases': ['x', 1]}, r"'paraphrases\[2\]' holds a number"),
      (OWN | {'neighbours': [[]]}, r"'neighbours\[1\]' holds a list"),
      (
          OWN | {'neighbours': [{'prompt': 'x'}]},
          r"'neighbours\[1\].answer' is missing",
      ),
      (without(OWN, 'target_true'), r"'neighbours\[1\]' has no answer"),
      (OWN | {'portability': []}, "'portability' holds a list"),
      (
          OWN | {'portability': {'alias': [{'prompt': 'x', 'answer': ''}]}},
          r"'portability.alias\[1\].answer' is empty",
      ),
      (OWN | {'paraphrase': []}, "'paraphrase' is unknown"),
      (without(FLAT, 'ground_truth'), "'ground_truth' is missing"),
      (without(FLAT, 'locality_prompt'), "'locality_prompt' is missing"),
      (FLAT | {'target_new': 'harp'}, 'nothing to edit'),
      (ZSRE | {'alt': ''}, "'alt' is empty"),
      (ZSRE | {'answers': []}, "'answers' is an empty list"),
      (ZSRE | {'answers': 'harp'}, "'answers' holds text"),
      (ZSRE | {'loc': 1}, "'loc' holds a number"),
      (NESTED | {'requested_rewrite': []}, "'requested_rewrite' holds a list"),
  )
  def test_one_error_one_sentence(self, data, pattern):
    (problem,) = self.problems(data)
    self.assertRegex(problem, r'^record 1 \(id \w+\): .*' + pattern)
    self.assertEndsWith(problem, '.')

  @parameterized.parameters(
      (' Eiffel Tower',), ('Tower\n',), ('Tower\t',), ('Tower\u00a0',),
  )  # fmt: skip
  def test_white_space_around_subjects(self, subject):
    rewrite = NESTED['requested_rewrite'] | {
        'prompt': 'The {} is in', 'subject': subject,
    }  # fmt: skip
    own = OWN | {'prompt': 'The {} is in', 'subject': subject}
    for data in (own, NESTED | {'requested_rewrite': rewrite}):
      (record,) = self.load(data).requests
      self.assertEqual(record.subject, subject.strip())
      self.assertEqual(record.question, f'The {subject.strip()} is in')

  def test_line_breaks_are_text(self):
    data = OWN | {
        'prompt': 'Where is {}?\nA:\n',
        'target_new': '\nPeru ',
        'paraphrases': ['Ada?\n', 'Ada is '],
        'neighbours': [{'prompt': 'Ben?\n ', 'answer': ' x\n'}],
    }
    (record,) = self.load(data).requests
    self.assertEqual(record.question, 'Where is Ada?\nA:\n')
    self.assertEqual(record.target, '\nPeru')
    self.assertEqual(asked(record), ('Ada?\n', 'Ada is'))
    self.assertEqual(record.probes_of('locality'), (near('Ben?\n ', 'x'),))

  def test_space(self):
    probes = [{'prompt': 'x', 'answer': 'y'}]
    probes += [probes[0] | {'space': True}]
    data = OWN | {'space': False, 'portability': {'one_hop': probes}}
    (record,) = self.load(data).requests
    self.assertIs(record.space, False)
    self.assertEqual(
        [probe.space for probe in record.probes],
        [False, False, False, False, True],
    )
    (problem,) = self.problems(OWN | {'space': 'no'})
    self.assertIn("'space' holds text; it must be true or false", problem)

  def test_braces_in_probes(self):
    data = OWN | {
        'paraphrases': ["{}'s instrument is", 'f"{{}}" of Ada'],
        'portability': {'alias': [{'prompt': 'By {}:', 'answer': 'y'}]},
    }
    (record,) = self.load(data).requests
    self.assertEqual(asked(record), ("Ada's instrument is", 'f"{}" of Ada'))
    self.assertEqual(record.probes_of('alias')[0].prompt, 'By Ada:')
    data |= {'neighbours': ['{} plays the'], 'paraphrases': ['{} and {}']}
    first, second = self.problems(data)
    self.assertIn('more than once', first)
    self.assertIn('is about another subject', second)

  def test_repeated_in_another_form(self):
    first = OWN | {'subject': 'Zo\u00eb', 'prompt': '{} isn\u2019t', 'id': 1}
    second = OWN | {'subject': 'Zoe\u0308', 'prompt': "{} isn't", 'id': 2}
    (problem,) = self.problems(first, second)
    self.assertIn('the same edit as record 1', problem)

  def test_nested_target(self):
    rewrite = NESTED['requested_rewrite']
    for target, pattern in (
        ('oboe', 'target_new. holds text; it must be an object'),
        ({'id': 'Q1'}, "'requested_rewrite.target_new.str' is missing"),
        ({'str': ''}, "'requested_rewrite.target_new.str' is empty"),
    ):
      (problem,) = self.problems(
          NESTED | {'requested_rewrite': rewrite | {'target_new': target}}
      )
      self.assertRegex(problem, pattern)

  def test_no_object(self):
    problems = self.problems(OWN, 3, None, 'x')
    self.assertLen(problems, 3)
    self.assertIn('the record is a number', problems[0])

  def test_all_errors_of_all_records(self):
    problems = self.problems(
        OWN | {'subject': '', 'target_new': 1}, *_people('a', prompt='b')
    )
    self.assertLen(problems, 3)
    self.assertStartsWith(problems[2], 'record 2 (id 2)')

  def test_twenty_are_listed(self):
    bad = _people(*'abcdefghijklmnopqrstuvwxy', target_new='')
    problems = self.problems(*bad)
    self.assertLen(problems, 20)
    self.assertIn('25 errors in all', problems[-1])
    self.assertIn(self.path, problems[-1])
    self.assertLen(self.problems(*bad[:20]), 20)

  def test_odd_characters_are_fine(self):
    odd = 'A\x00\u200b\x1b'
    self.write(
        '{"prompt": "{} is", "subject": "\\ud83d", "target_new": "b\\udc00"}\n'
        + json.dumps(*_people(odd))
    )
    first, second = datasets.load_requests(self.path).requests
    self.assertEqual((first.subject, first.target), ('\ufffd', 'b\ufffd'))
    self.assertEqual(second.subject, odd)

  def test_duplicates_name_both_records(self):
    problems = self.problems(
        *_people('Ada', 'Ben'),
        *_people('Ada', target_new='y'),
        *_people('Ben', prompt='Ben  is'),
        *_people('ben'),
    )
    self.assertLen(problems, 2)
    self.assertRegex(
        problems[0], r"^record 3 \(id 3\): .*'y' .*record 1 \(id 1\).*'x'"
    )
    self.assertRegex(
        problems[1], r'^record 4 \(id 4\): .*same edit as record 2 \(id 2\)'
    )


class SkipTest(dataset_files.Base):

  def test_the_next_record_takes_the_place(self):
    good = _people('a', 'b', 'c', 'd')
    bad = _people('z', target_new='')[0] | {'id': 'bad'}
    loaded = self.load(
        good[0], bad, good[0], *good[1:], limit=3, on_bad_record='skip'
    )
    self.assertEqual([r.subject for r in loaded.requests], ['a', 'b', 'c'])
    self.assertEqual([r.number for r in loaded.requests], [1, 4, 5])
    self.assertEqual(
        [(s.number, s.id) for s in loaded.skipped], [(2, 'bad'), (3, '3')]
    )
    self.assertIn("'target_new' is empty", loaded.skipped[0].reason)
    self.assertIn('record 1', loaded.skipped[1].reason)

  def test_a_skipped_record_does_not_block_its_repetition(self):
    first, second = _people('a', 'a')
    loaded = self.load(first | {'paraphrases': 3}, second, on_bad_record='skip')
    self.assertEqual([r.number for r in loaded.requests], [2])

  def test_bad_lines_are_skipped(self):
    self.write('{"prompt"\n' + json.dumps(OWN))
    loaded = datasets.load_requests(self.path, on_bad_record='skip')
    self.assertLen(loaded.requests, 1)
    self.assertIn('not JSON', loaded.skipped[0].reason)

  def test_nothing_left(self):
    bad = _people('a', 'b', target_new='')
    self.assertLen(self.problems(*bad, on_bad_record='skip'), 2)

  def test_fail_looks_at_the_first_records_alone(self):
    loaded = self.load(
        *_people('a', 'b'), *_people('c', target_new=''), limit=2
    )
    self.assertLen(loaded.requests, 2)
    self.assertEmpty(loaded.skipped)
    self.assertLen(self.load(*_people('a', 'b'), limit=9).requests, 2)

  def test_check_comes_through_the_same_door(self):
    def check(requests):
      return [
          ['it is b; leave b out.'] if request.subject == 'b' else []
          for request in requests
      ]

    people = _people('a', 'b', 'c')
    (problem,) = self.problems(*people, check=check)
    self.assertEqual(problem, 'record 2 (id 2): it is b; leave b out.')
    loaded = self.load(*people, check=check, limit=2, on_bad_record='skip')
    self.assertEqual([r.subject for r in loaded.requests], ['a', 'c'])
    self.assertEqual(loaded.skipped[0].reason, 'it is b; leave b out.')

  def test_requests_are_checked_together_and_no_more_than_are_wanted(self):
    calls = []

    def check(requests):
      calls.append([request.subject for request in requests])
      return [['no.'] * (request.subject in 'ac') for request in requests]

    people = _people(*'abcdefgh')
    skip = dict(check=check, limit=3, on_bad_record='skip')
    loaded = self.load(*people, **skip)
    self.assertEqual([r.subject for r in loaded.requests], ['b', 'd', 'e'])
    self.assertEqual(calls, [['a', 'b', 'c'], ['d', 'e']])
    calls.clear()
    self.assertLen(self.problems(*people, check=check, limit=3), 2)
    self.assertEqual(calls, [['a', 'b', 'c']])

  def test_a_file_is_read_once(self):
    self.write('\n'.join(map(json.dumps, _people('a', 'b'))))
    file = datasets.open_requests(self.path, on_bad_record='skip')
    os.remove(self.path)
    whole = file.load()
    with mock.patch.object(json, 'loads') as parse:
      some = file.load(lambda requests: [['no.'], []])
    parse.assert_not_called()
    self.assertLen(whole.requests, 2)
    self.assertEqual(some.requests, whole.requests[1:])

  def test_first_errors(self):
    seen = []

    def check(requests):
      seen.append([r.subject for r in requests])
      return [['a.'] * (r.subject == 'a') for r in requests]

    every = lambda requests: [['second.'] for _ in requests]
    requests = self.load(*_people('a', 'b')).requests
    both = datasets.first_errors(check, every, check)
    self.assertEqual(both(requests), [['a.'], ['second.']])
    self.assertEqual(seen, [['a', 'b'], []])


class RealRecordsTest(absltest.TestCase):

  def test_counterfact_train(self):
    path = testing.data_path('counterfact_train.jsonl')
    loaded = datasets.load_requests(path, on_bad_record='skip')
    raw = [json.loads(line) for line in path.read_text().splitlines()]
    # Oracle: pairs counted without the loader.
    pairs = collections.Counter((r['subject'], r['prompt']) for r in raw)
    self.assertEqual(sum(n > 1 for n in pairs.values()), 62)
    self.assertLen(loaded.requests, len(pairs))
    self.assertLen(loaded.skipped, len(raw) - len(pairs))
    for record in loaded.requests:
      self.assertEqual(record.question, raw[record.number - 1]['prompt'])
      self.assertEqual(record.prompt.count('{}'), 1)

  def test_counterfact_train_fails_whole(self):
    path = testing.data_path('counterfact_train.jsonl')
    with self.assertRaisesRegex(InputError, '77 errors in all'):
      datasets.load_requests(path)
    self.assertLen(datasets.load_requests(path, limit=1000).requests, 1000)

  def test_zsre(self):
    path = testing.data_path('zsre.jsonl')
    loaded = datasets.load_requests(path, on_bad_record='skip')
    reasons = ' '.join(s.reason for s in loaded.skipped)
    self.assertLen(loaded.requests, 493)
    self.assertEqual(reasons.count('nothing to edit'), 6)
    self.assertEqual(reasons.count("'alt' is empty"), 1)
    loaded = datasets.load_requests(path, zsre_target='answers')
    self.assertLen(loaded.requests, 500)

  def test_sets_without_single_edits_are_refused(self):
    for name in ('unke.jsonl', 'editevery.jsonl'):
      with self.assertRaisesRegex(InputError, 'no known format'):
        datasets.load_requests(testing.data_path(name))


if __name__ == '__main__':
  absltest.main()
