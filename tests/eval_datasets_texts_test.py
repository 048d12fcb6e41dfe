"""Every format of long answers loads, cases stay whole, errors are reported."""

import collections
import hashlib
import json
import pathlib

import dataset_files
from absl.testing import absltest, parameterized
from dataset_files import asked, without

from jaxedit import testing
from jaxedit.eval import datasets
from jaxedit.eval.datasets import akew
from jaxedit.types import InputError, Probe

OWN = {
    'id': 'ada',
    'question': ' Who is Ada? ',
    'answer': '  Ada sails.\n\nShe sings.\n',
    'paraphrases': ['Tell me of Ada. ', 'Ada?'],
    'sub_questions': [{'prompt': 'What does Ada do? ', 'answer': ' Sails'}],
    'category': 'prose',
}
EVERY = {'id': 6, 'question': 'Is y > 0?', 'answer': 'Yes.', 'category': 'math'}
UNKE = {
    'id': 0,
    'question': 'Who is Ada?',
    'para_question': 'Who might Ada be?',
    'answer': 'Ada sails and sings.',
    'sub_question': ['Does Ada sail?', 'Does Ada row?'],
    'sub_answer': ['Yes.', 'No.'],
}


def _triplets(*targets):
  return [
      {'subject': 'Ada', 'prompt': '{} likes', 'target': target}
      for target in targets
  ]


def _rewrite(name='Ada', **changes):
  return {
      'prompt': '{} sails on',
      'relation_id': 'P1',
      'subject': name,
      'target_new': {'str': 'Lake Osk', 'id': 'Q1'},
      'target_true': {'str': 'Lake Ur', 'id': 'Q2'},
      'question': f'Where does {name} sail?',
      'fact_new': f'{name} sails on Lake Osk.',
      'fact_new_uns': f'{name}, a sailor, is found on Lake Osk.',
      'unsfact_triplets_GPT': _triplets(*'abcdefg'),
  } | changes


def _case(*rewrites, number=24):
  return {
      'case_id': number,
      'requested_rewrite': list(rewrites),
      'questions': ['Whose lake is it?'],
      'answer': 'Ben',
      'new_answer': 'Cy',
  }


def _single(**changes):
  rewrite = _rewrite(prompt_full='Ada sails on')
  return {
      'case_id': 7,
      'requested_rewrite': rewrite,
      'paraphrase_prompts': ['Rain. Ada sails on ', 'Ada is at home on'],
  } | changes


def _asked(*questions, **changes):
  return [{'question': q, 'answer': f'{q}!'} | changes for q in questions]


def load(path, **options):
  return datasets.load_requests(path, kinds=('text',), **options)


def sub(prompt, answer):
  return Probe('sub_question', prompt, (answer,))


class Base(dataset_files.Base):
  kinds = ('text',)


class FormatTest(Base):

  def test_own(self):
    loaded = self.load(OWN)
    (passage,) = loaded.requests
    self.assertEqual(loaded.format, 'jaxedit')
    self.assertEqual((passage.number, passage.id), (1, 'ada'))
    self.assertEqual(passage.question, 'Who is Ada?')
    # Code may begin with white space.
    self.assertEqual(passage.target, '  Ada sails.\n\nShe sings.')
    self.assertEqual(asked(passage), ('Tell me of Ada.', 'Ada?'))
    self.assertEqual(
        passage.probes_of('sub_question'), (sub('What does Ada do?', 'Sails'),)
    )
    self.assertEqual((passage.category, passage.case), ('prose', ''))

  def test_own_needs_two_fields(self):
    (passage,) = self.load(*_asked('a?')).requests
    self.assertEqual((passage.id, passage.category), ('1', ''))
    self.assertEqual(passage.probes, ())

  def test_editevery_is_a_part_of_our_own(self):
    loaded = self.load(EVERY)
    (passage,) = loaded.requests
    self.assertEqual(loaded.format, 'jaxedit')
    self.assertEqual((passage.id, passage.category), ('6', 'math'))

  @parameterized.parameters(True, False)
  def test_unke(self, as_list):
    loaded = self.load(UNKE, as_list=as_list)
    (passage,) = loaded.requests
    self.assertEqual(loaded.format, 'unke')
    self.assertEqual((passage.id, passage.case), ('0', ''))
    self.assertEqual(passage.target, 'Ada sails and sings.')
    self.assertEqual(asked(passage), ('Who might Ada be?',))
    self.assertEqual(
        passage.probes_of('sub_question'),
        (sub('Does Ada sail?', 'Yes.'), sub('Does Ada row?', 'No.')),
    )

  def test_akew_cases(self):
    loaded = self.load(_case(_rewrite(), _rewrite('Ben')))
    first, second = loaded.requests
    self.assertEqual(loaded.format, 'akew')
    self.assertEqual((first.id, second.id), ('24.1', '24.2'))
    self.assertEqual({first.case, second.case}, {'24'})
    self.assertEqual({first.number, second.number}, {1})
    self.assertEqual(first.question, 'Where does Ada sail?')
    self.assertEqual(second.target, 'Ben, a sailor, is found on Lake Osk.')
    self.assertEqual(asked(first), ())
    self.assertEqual(
        first.probes_of('sub_question'),
        tuple(sub('Ada likes', answer) for answer in 'abcde'),
    )

  def test_akew_structured(self):
    first, second = self.load(
        _case(_rewrite(), _rewrite('Ben', target_new=' Lake Ox')),
        facts='structured',
        triplets=1,
    ).requests
    self.assertEqual(first.question, 'Ada sails on')
    self.assertEqual(first.target, 'Lake Osk')
    self.assertLen(first.probes_of('sub_question'), 1)
    self.assertEqual(second.question, 'Ben sails on')
    self.assertEqual(second.target, 'Lake Ox')

  def test_akew_single_rewrites(self):
    counterfact, wiki = self.load(
        _single(),
        without(
            _single(requested_rewrite=_rewrite('Ben')), 'paraphrase_prompts'
        ),
    ).requests
    self.assertEqual((counterfact.id, counterfact.case), ('7', ''))
    self.assertEqual(counterfact.question, 'Ada sails on')
    self.assertEqual(asked(counterfact), ('Rain. Ada sails on',))
    self.assertEqual(wiki.question, 'Where does Ben sail?')
    self.assertEqual(asked(wiki), ())
    self.assertLen(wiki.probes_of('sub_question'), 5)

  def test_akew_without_the_full_prompt(self):
    (passage,) = self.load(_single(requested_rewrite=_rewrite())).requests
    self.assertEqual(passage.question, 'Where does Ada sail?')
    self.assertEqual(asked(passage), ('Rain. Ada sails on',))

  def test_akew_triplets_without_a_place_for_the_subject(self):
    triplets = [{'subject': 'Ada', 'prompt': 'Sailors', 'target': 'sail'}]
    rewrite = _rewrite(unsfact_triplets_GPT=triplets)
    (passage,) = self.load(_case(rewrite)).requests
    self.assertEqual(
        passage.probes_of('sub_question'), (sub('Sailors', 'sail'),)
    )

  def test_source_and_hash(self):
    loaded = self.load(OWN)
    blob = pathlib.Path(self.path).read_bytes()
    self.assertEqual(loaded.sha256, hashlib.sha256(blob).hexdigest())
    self.assertEqual(loaded.source, self.path)

  def test_demo(self):
    loaded = load('demo')
    self.assertEqual((loaded.source, loaded.format), ('demo', 'jaxedit'))
    self.assertLen(loaded.requests, 18)
    self.assertEmpty(loaded.skipped)

  def test_facts_and_long_answers_of_one_file(self):
    kinds = ('fact', 'text')
    fact = {'prompt': '{} is', 'subject': 'Ada', 'target_new': 'x'}
    self.load(OWN)
    pathlib.Path(self.path).write_text('\n'.join(map(json.dumps, (fact, OWN))))
    loaded = datasets.load_requests(self.path, kinds=kinds)
    self.assertEqual(loaded.format, 'jaxedit')
    self.assertEqual([r.subject for r in loaded.requests], ['Ada', None])
    self.assertEqual(datasets.kind_of(self.path), 'fact')
    self.assertEqual(datasets.kind_of('demo'), 'fact')
    self.assertEqual(datasets.kind_of('demo_passages'), 'text')
    counterfact = _single(requested_rewrite=without(
        without(_rewrite(), 'fact_new_uns'), 'unsfact_triplets_GPT'
    ))  # fmt: skip
    for data, name in (
        (_case(_rewrite()), 'akew'), (_single(), 'akew'),
        (counterfact, 'counterfact'), (UNKE, 'unke'),
    ):  # fmt: skip
      pathlib.Path(self.path).write_text(json.dumps(data))
      loaded = datasets.load_requests(self.path, kinds=kinds)
      self.assertEqual(loaded.format, name)
      kind = 'fact' if name == 'counterfact' else 'text'
      self.assertEqual(datasets.kind_of(self.path), kind)
    pathlib.Path(self.path).write_text('{"odd": 1}')
    with self.assertRaisesRegex(InputError, 'question and answer, or prompt'):
      datasets.load_requests(self.path, kinds=kinds)


class ErrorTest(Base):

  @parameterized.parameters(
      (without(OWN, 'question'), "'question' is missing"),
      (OWN | {'answer': 3}, "'answer' holds a number; it must be text"),
      (OWN | {'answer': '\n'}, "'answer' is empty"),
      (OWN | {'paraphrases': 'x'}, "'paraphrases' holds text; .* a list"),
      (OWN | {'paraphrases': ['x', '']}, r"'paraphrases\[2\]' is empty"),
      (OWN | {'sub_questions': ['x']}, r"'sub_questions\[1\]' holds text"),
      (
          OWN | {'sub_questions': [{'prompt': 'x'}]},
          r"'sub_questions\[1\].answer' is missing",
      ),
      (OWN | {'paraphrase': []}, "'paraphrase' is unknown; .*sub_questions"),
      (OWN | {'case': 3}, "'case' holds a number"),
      (OWN | {'category': ''}, "'category' is empty"),
      (without(UNKE, 'para_question'), "'para_question' is missing"),
      (without(UNKE, 'answer'), "'answer' is missing"),
      (UNKE | {'sub_answer': ['Yes.']}, "'sub_answer' hold 2 and 1 texts"),
      (UNKE | {'sub_answer': ['Yes.', 1]}, r"'sub_answer\[2\]' holds a num"),
      (_case(), "'requested_rewrite' is an empty list"),
      (_single(requested_rewrite='x'), "'requested_rewrite' holds text"),
      (_single(paraphrase_prompts=[3]), r"'paraphrase_prompts\[1\]' holds"),
      (
          _case(_rewrite(), without(_rewrite('Ben'), 'fact_new_uns')),
          r"'requested_rewrite\[2\].fact_new_uns' is missing",
      ),
      (
          _case(_rewrite(unsfact_triplets_GPT=_triplets('a', ''))),
          r"unsfact_triplets_GPT\[2\].target' is empty",
      ),
      (_case(_rewrite(), 'x'), r"'requested_rewrite\[2\]' holds text"),
      (
          _case(_rewrite(), _rewrite(fact_new_uns='Else.')),
          r'rewrite 2: it answers the question of record 1 \(id 24.1\)',
      ),
      (_case(_rewrite(), _rewrite()), 'rewrite 2: it makes the same edit as'),
  )
  def test_one_error_one_sentence(self, data, pattern):
    (problem,) = self.problems(data)
    self.assertRegex(problem, r'^record 1 \(id \w+\): .*' + pattern)
    self.assertEndsWith(problem, '.')

  @parameterized.parameters(
      (_case(_rewrite(prompt='Ada sails on')), 'prompt. has 0 placeholders'),
      (_single(requested_rewrite=_rewrite(prompt='{}{}')), 'has 2 placeholde'),
      (
          _case(_rewrite(target_new={'id': 'Q1'})),
          r"'requested_rewrite\[1\].target_new.str' is missing",
      ),
  )
  def test_structured_facts(self, data, pattern):
    self.assertLen(self.load(data).requests, 1)
    (problem,) = self.problems(data, facts='structured')
    self.assertRegex(problem, pattern)

  def test_unknown_fields(self):
    (problem,) = self.problems({'prompt': 'a', 'target_new': 'b'})
    self.assertIn("'prompt', 'target_new'", problem)
    self.assertIn('our own needs question and answer', problem)
    for kind in ('akew', 'unke', 'jaxedit'):
      self.assertIn(kind, problem)

  def test_files(self):
    with self.assertRaisesRegex(InputError, 'no such file.*passages that come'):
      load(self.path)
    (problem,) = self.problems()
    self.assertIn('holds no records; give a file with passages', problem)
    (problem,) = self.problems(OWN, 3)
    self.assertStartsWith(problem, 'record 2 (id 2): the record is a number')

  def test_options(self):
    problems = self.problems(
        OWN,
        format='csv',
        limit=0,
        on_bad_record='drop',
        facts='both',
        triplets=-1,
    )
    self.assertLen(problems, 5)
    self.assertIn('unstructured, structured', ' '.join(problems))

  def test_a_question_asked_again(self):
    problems = self.problems(
        *_asked('a?', 'b?'),
        *_asked('a?', answer='else'),
        *_asked('a  b', ' a\nb', answer='c'),
    )
    self.assertLen(problems, 2)
    self.assertEqual(
        problems[0],
        'record 3 (id 3): it answers the question of record 1 (id 1) in another'
        ' way; keep one.',
    )
    self.assertRegex(
        problems[1], r'^record 5 .* same edit as record 4 \(id 4\); drop one'
    )

  def test_check_comes_through_the_same_door(self):
    def check(requests):
      return [
          ['it is b; leave b out.'] if passage.id in ('b', '24.2') else []
          for passage in requests
      ]

    a, b = (p | {'id': p['question']} for p in _asked('a', 'b'))
    (problem,) = self.problems(a, b, check=check)
    self.assertEqual(problem, 'record 2 (id b): it is b; leave b out.')
    case = _case(_rewrite(), _rewrite('Ben'))
    (problem,) = self.problems(case, check=check)
    self.assertEqual(
        problem, 'record 1 (id 24): rewrite 2: it is b; leave b out.'
    )


class CaseTest(Base):

  def test_cases_share_facts_that_agree(self):
    both = _case(_rewrite(), _rewrite('Ben'), number=2)
    loaded = self.load(_case(_rewrite(), number=1), both)
    self.assertEqual([p.id for p in loaded.requests], ['1.1', '2.1', '2.2'])
    other = _case(_rewrite(fact_new_uns='Else.'), number=3)
    (problem,) = self.problems(_case(_rewrite(), number=1), both, other)
    self.assertRegex(problem, r'^record 3 \(id 3\): it answers .* \(id 1.1\)')

  @parameterized.parameters('fail', 'skip')
  def test_limit_counts_cases(self, on_bad_record):
    cases = [
        _case(_rewrite('a'), _rewrite('b'), number=1),
        _case(_rewrite('c'), _rewrite('d'), _rewrite('e'), number=2),
        _case(_rewrite('f'), number=3),
    ]
    loaded = self.load(*cases, limit=2, on_bad_record=on_bad_record)
    self.assertEqual([p.case for p in loaded.requests], [*'11222'])
    mine = _asked('a', 'b', case='x') + _asked('c') + _asked('d', case='y')
    loaded = self.load(*mine, limit=2, on_bad_record=on_bad_record)
    self.assertEqual([p.question for p in loaded.requests], [*'abc'])

  def test_a_bad_record_takes_its_case_along(self):
    mine = _asked('a', 'b', case='x') + _asked('c', case='y')
    mine[1]['answer'] = ''
    loaded = self.load(*mine, limit=1, on_bad_record='skip')
    self.assertEqual([p.question for p in loaded.requests], ['c'])
    self.assertEqual(
        [s.reason for s in loaded.skipped],
        [
            'another record of its case is bad.',
            "field 'answer' is empty; write some text or drop the record.",
        ],
    )
    cases = _case(_rewrite(), 3), _case(_rewrite('Ben'), number=25)
    loaded = self.load(*cases, on_bad_record='skip')
    self.assertEqual([p.id for p in loaded.requests], ['25.1'])

  def test_a_case_stands_together(self):
    for first in _asked('a', case='x') + _asked('a', case='x', answer=1):
      mine = [first, *_asked('b'), *_asked('c', case='x')]
      problem = self.problems(*mine)[-1]
      self.assertRegex(
          problem, r"^record 3 \(id 3\): its case 'x' is that of record 1 "
      )
    (problem,) = self.problems(_case(_rewrite()), _case(_rewrite('Ben')))
    self.assertRegex(problem, r"^record 2 \(id 24\): its case '24' is that")

  def test_a_skipped_case_does_not_block_its_questions(self):
    mine = [*_asked('a', 'b', case='x'), *_asked('a', answer='else')]
    mine[1]['answer'] = ''
    loaded = self.load(*mine, on_bad_record='skip')
    self.assertEqual([p.target for p in loaded.requests], ['else'])


class RealRecordsTest(absltest.TestCase):

  def test_unke(self):
    loaded = load(testing.data_path('unke.jsonl'))
    self.assertEqual(loaded.format, 'unke')
    self.assertLen(loaded.requests, 500)
    for passage in loaded.requests:
      self.assertLen(asked(passage), 1)
      self.assertBetween(len(passage.probes_of('sub_question')), 4, 8)
      self.assertEqual(passage.case + passage.category, '')

  def test_akew(self):
    path = testing.data_path('akew_mquake_cf.jsonl')
    raw = [json.loads(line) for line in path.read_text('utf-8').splitlines()]
    sizes = {str(r['case_id']): len(r['requested_rewrite']) for r in raw}
    self.assertEqual(collections.Counter(sizes.values()), {1: 137, 2: 37, 3: 3})
    for facts in akew.FACTS:
      loaded = load(path, facts=facts)
      self.assertEqual(loaded.format, 'akew')
      self.assertLen(loaded.requests, 220)
      found = collections.Counter(p.case for p in loaded.requests)
      self.assertEqual(found, sizes)
      self.assertTrue(all(p.probes_of('sub_question') for p in loaded.requests))
    limited = load(path, limit=50)
    self.assertLen({p.case for p in limited.requests}, 50)
    self.assertLen(limited.requests, sum(list(sizes.values())[:50]))

  def test_editevery(self):
    path = testing.data_path('editevery.jsonl')
    # Two questions come twice, with different answers.
    with self.assertRaises(InputError) as caught:
      load(path)
    for problem, identifiers in zip(
        caught.exception.problems, ((303, 305), (473, 475)), strict=True
    ):
      for identifier in identifiers:
        self.assertIn(f'(id {identifier})', problem)
    loaded = load(path, on_bad_record='skip')
    self.assertLen(loaded.requests, 274)
    self.assertEqual(
        collections.Counter(p.category for p in loaded.requests),
        {
            'physics': 109,
            'biology': 45,
            'math': 39,
            'chemistry': 26,
            'code': 25,
            'poetry': 15,
            'news': 15,
        },
    )

  def test_sets_of_single_facts_are_refused(self):
    for name in ('counterfact_train.jsonl', 'zsre.jsonl', 'piqa.jsonl'):
      with self.assertRaisesRegex(InputError, 'no known format'):
        load(testing.data_path(name))


if __name__ == '__main__':
  absltest.main()
