"""Chunks go on from each other and are cut where a reader would cut."""

import itertools
import json
import re
import time

import numpy as np
import text_tokenizers
from absl.testing import absltest, parameterized

from jaxedit import testing, types
from jaxedit.text import chunking

POEM = """A river flows, unbound, unseen,
Through years. And moments in between;
The echoes drift, like autumn leaves,
As memory folds, as daylight grieves.

Each hour, a petal falling fast,
No hand can slow; no spell can cast!
"""
CODE = '''def mean(values):
    """Means. Of all. And so on."""
    total = 0.
    for value in values:
\t# Adds. Then goes on.
        total += value
    return total / len(values) if values else print('No. None. At all.')
'''
PIECES = (
    'The capital of France is Paris. ', 'Dr. A. B. Lee (born 3.5) said so! ',
    'Toko plays the guitar\n', '\n\n', '  ', '- one. two.\n', '1. first\n',
    '$x + y$ ', '\\[a = b\\]\n', '```\nx = 1\n```\n', '    return x\n',
    'Zoë 🎸', '北京是首都。', '「はい。」と', 'مرحبا؟ ', '...', '\t', '`a. B` ',
    '\\begin{a}\n1. A\n', '\\end{a}', '$5 and $6. ', 'for x in y:\n', '\r\n',
    '"Why?" ', '{', '}\n', '\u2028',
)  # fmt: skip


def words(text):
  """One token a word, with the white space before it; the rest is one more."""
  return [match.span() for match in re.finditer(r'\s*\S+|\s+$', text)]


def marked(text):
  """The text with a bar at every place where it may be cut."""
  ends, _ = chunking.cuts(text)
  parts = [text[a:b] for a, b in itertools.pairwise([0, *ends, len(text)])]
  return '|'.join(parts)


def split(text, **options):
  """The chunks of a text as texts, a word being a token."""
  offsets = words(text)
  options = {'boundary': 'sentence'} | options
  chunks = chunking.chunk(
      text, range(len(offsets)), offsets, chunking.Chunking(**options)
  )
  return [text[offsets[a][0] : offsets[b - 1][1]] for a, b in chunks]


class ChunksCase(parameterized.TestCase):
  """What every cutting must hold."""

  def check(self, chunks, n, most):
    self.assertEqual(chunks[0][0], 0)
    self.assertEqual(chunks[-1][1], n)
    for begin, end in chunks:
      self.assertBetween(end - begin, 1, most)
    for (a, b), (c, d) in itertools.pairwise(chunks):
      self.assertTrue(a < c <= b < d, f'{a}-{b}, {c}-{d}')


class SpansTest(ChunksCase):

  @parameterized.parameters(
      (7, 3, 0, ((0, 3), (3, 6), (6, 7))),
      (6, 3, 0, ((0, 3), (3, 6))),
      (3, 3, 0, ((0, 3),)),
      (1, 3, 2, ((0, 1),)),
      # Begins at 6 would be 6-7, inside 4-7: what the overlap holds is not new.
      (7, 3, 1, ((0, 3), (2, 5), (4, 7))),
      (8, 3, 1, ((0, 3), (2, 5), (4, 7), (6, 8))),
      (8, 6, 4, ((0, 6), (2, 8))),
      (0, 3, 1, ()),
  )
  def test_by_hand(self, n, window, overlap, wanted):
    self.assertEqual(chunking.spans(n, window, overlap), wanted)

  def test_every_chunk_adds_a_token(self):
    for n, window in itertools.product(range(1, 30), range(1, 9)):
      for overlap in range(window):
        chunks = chunking.spans(n, window, overlap)
        self.check(chunks, n, window)
        for (_, b), (c, _) in itertools.pairwise(chunks):
          self.assertEqual(b - c, overlap)

  @parameterized.parameters(
      ((0, 0, 'window'), ('window is 0',)),
      (
          (4, 4, 'window'),
          ('overlap is 4 tokens with a window of 4; give 0 to 3',),
      ),
      ((4, -1, 'line'), ('overlap is -1', "boundary 'line' is unknown")),
  )
  def test_refused(self, options, sentences):
    with self.assertRaises(types.InputError) as caught:
      chunking.check_chunking(chunking.Chunking(*options))
    self.assertLen(caught.exception.problems, len(sentences))
    for problem, sentence in zip(caught.exception.problems, sentences):
      self.assertIn(sentence, problem)


class CutsTest(parameterized.TestCase):

  @parameterized.parameters(
      'He came.| She left.| "Why?"| They asked.',
      'Dr. Lee met J. K. Rowling, e.g. The Author, in D.C.| She left.',
      'The U.S. House and St. Mary of Acme Inc. Berlin.| It is so.',
      'It is 3.5 or .5.| Then 2.| See Fig. 3 and No. 5.| No.| Why?',
      'So... it goes on.| Well...| Then it stops!| “Quite.”| (Yes.)| Next',
      '"Go on!" he said.| Yahoo! is a name… maybe.| **Bold.**| _So._| End',
      'Steps: 1. Do this.| 2. Do that.',
      'In vitamin C.| The end.| On 3 Jan. 1998 at 3 a.m.| Note it.',
      'x = 2 and y = 3.| We can go on.| Let me.',
      '北京是首都。|他走了！|“好？”|再见。',
      '「はい。」と言った。|次。',
      'यह है।|वह है॥| ما هذا؟| نعم۔| Ինչ։| ሰላም።|ጤና',
      'A. \u4f60\u597d!|\u518d\u89c1',
      'First.\n\n|Second.\n|Third.\n \n|',
      'no end here',
      '',
      ' \n ',
  )
  def test_prose(self, text):
    wanted = text.removesuffix('|')
    self.assertEqual(marked(text.replace('|', '')), wanted)

  def test_prose_that_is_broken_into_lines(self):
    text = (
        'The first sentence of this paragraph runs over its line\n'
        'and stops here. The second one has to be put on the next\n'
        'line.\n\n|Third. '
    )
    marks = marked(text.replace('|', ''))
    self.assertEqual(marks.count('|'), 2)
    self.assertIn('stops here.| The second', marks)
    self.assertIn('line.\n\n|Third', marks)

  @parameterized.parameters(POEM, CODE, '```\nSome. Text.\n\nx. Y\n```\n')
  def test_lines(self, text):
    lines = re.findall(r'.*\S.*\s*?\n(?:\s*\n)?', text)
    self.assertEqual(''.join(lines), text)
    self.assertEqual(marked(text), '|'.join(lines))

  @parameterized.parameters(
      'Use this:\n\n|```python\n|x = "A. B"\n|```\n|Then go.| Done.',
      'Run\n|~~~\n|a. B\n\n|c. D',
      'Text. More.\n\n|def f(x):\n|  return x  # A. B\n\n|  # So. It.\n'
      '|  y = 1\n\n|That is all.| Really.',
      '#include <a.h>\n|int main() {\n|  puts("A. B");\n|}\n',
      'SELECT a. B FROM c\n|WHERE x;\n',
      'for (;;) {\n|\tA. B();\n|}',
      'x = 1\n|# First. Then.\n|# Second. So.\n|y = 2\n',
      '# Opens. A file.\n|# With two. Of them.\n\n|import os\n',
      '# Opens. A file.\n|"""Does. Things.\n\n|And more. So.\n|"""\n|x = 1\n',
      '-- First. Then.\n|SELECT a FROM b;\n',
      "'''Ada''' was born.| She wrote.\n\n|It was '''good'''.| So.",
      "x = '''\n|A. B\n\n|C. D\n|'''\n|y = 1",
      'def a\n|  puts "Hello. World"\n|end\n',
      'This is it. It works.\n|It is short. It has a text.\n'
      f'|print("Hello. World. {"Long. " * 12}")\n|That is all. Done.\n',
  )
  def test_code_in_prose(self, text):
    wanted = text.replace('Text. More', 'Text.| More')
    self.assertEqual(marked(wanted.replace('|', '')), wanted)

  @parameterized.parameters(
      'Since \\(a. B\\) it is.| So $x. Y$ holds.| Use `a. B` now.',
      'Thus:\n|\\[\na = b.\nC\n\\]\n|And $$a. B$$ too.\n\n|End.',
      'A\n|\\begin{align}\nx &= 1. \\\\\n\ny &= 2. Z\n\\end{align}\n|So.',
      '\\begin{a}\n\\begin{a}\nB. C\n\\end{a}\nD. E\n\\end{a}\n|So.',
      '```latex\n|\\begin{a}\nB. C\nD\n\\end{a}\n|```\n|So.',
      'It costs $5. The other is $6.| End of \\$3. Costs $4.',
      'An open \\( bracket. Here.| And $x and. Then.| And \\begin{a}. End.',
  )
  def test_formulas(self, text):
    wanted = re.sub(
        r'(\$5\.|\\\$3\.|bracket\.|x and\.|a\}\.) (?=[A-Z])', r'\1| ', text
    )
    self.assertEqual(marked(wanted.replace('|', '')), wanted)

  def test_lists(self):
    text = (
        'Types are:\n\n|1. Size: small. |They are. \n|2. Kind.\n|- a. B\n'
        '|* **c.**|\n(d) e'
    )
    marks = marked(text.replace('|', ''))
    for item in ('1. Size', '2. Kind', '- a. B', '* **c', '(d) e'):
      self.assertIn(f'\n|{item}', marks)
    self.assertIn('small.| They', marks)

  @parameterized.parameters(*PIECES, 'a', 'a ', 'x=', 'import ', '(', 'a. B')
  def test_time_is_linear(self, piece):
    def seconds(count, start):
      begin = time.process_time()
      chunking.cuts(start + piece * count)
      return time.process_time() - begin

    # Four times the text; quadratic time would be sixteen times as much.
    for start in ('', 'import '):
      short, long = (
          min(seconds(count, start) for _ in range(2)) for count in (500, 2000)
      )
      self.assertLess(long, 8 * short + 0.05)


class ChunkTest(ChunksCase):

  def test_short_neighbours_are_merged(self):
    text = 'One two three. Four five. Six. Seven eight nine ten. Eleven.'
    self.assertEqual(
        split(text, window=6),
        ['One two three. Four five. Six.', ' Seven eight nine ten. Eleven.'],
    )
    self.assertEqual(split(text, window=99), [text])

  def test_long_sentences_are_cut_by_window(self):
    text = 'a b c d e f g. Then h i.'
    self.assertEqual(
        split(text, window=3), ['a b c', ' d e f', ' g.', ' Then h i.']
    )
    self.assertEqual(split(text, window=4)[1:], [' e f g.', ' Then h i.'])

  def test_formulas_stay_whole_where_they_fit(self):
    text = 'so it is that $a + b$ holds for every number'
    self.assertEqual(
        split(text, window=5),
        ['so it is that', ' $a + b$ holds for', ' every number'],
    )
    self.assertEqual(
        split(text, window=2)[2:4], [' $a +', ' b$ holds'], 'longer than it'
    )

  def test_rows_of_a_long_environment_stay_whole(self):
    rows = [f'x_{i} &= a + b_{i} \\\\\n' for i in range(6)]
    text = '\\begin{align}\n' + ''.join(rows) + '\\end{align}'
    offsets = [match.span() for match in re.finditer(r' *\S+\n?', text)]
    chunks = chunking.chunk(
        text, range(len(offsets)), offsets, chunking.Chunking(15, 0, 'sentence')
    )
    parts = [text[offsets[a][0] : offsets[b - 1][1]] for a, b in chunks]
    self.assertEqual(
        parts,
        [
            '\\begin{align}\n' + ''.join(rows[:2]),
            ''.join(rows[2:4]),
            ''.join(rows[4:]) + '\\end{align}',
        ],
    )

  def test_overlap(self):
    text = 'One two three. Four. Five six seven.'
    chunks = split(text, window=3, overlap=2)
    self.assertEqual(
        chunks,
        [
            'One two three.',
            ' two three. Four.',
            ' three. Four. Five six seven.',
        ],
    )

  def test_overlap_is_shorter_than_the_chunk_before(self):
    text = 'One. Two three four. Five.'
    offsets = words(text)
    chunks = chunking.chunk(
        text, range(5), offsets, chunking.Chunking(3, 2, 'sentence')
    )
    self.assertEqual(chunks, ((0, 1), (1, 4), (2, 5)))

  def test_token_across_an_end_belongs_to_the_chunk_before(self):
    text = 'Go.\n\n    Stop it. Now'
    offsets = [(0, 2), (2, 6), (6, 13), (13, 16), (16, 20), (20, 21)]
    chunks = chunking.chunk(
        text, range(6), offsets, chunking.Chunking(2, 0, 'sentence')
    )
    self.assertEqual(chunks, ((0, 2), (2, 4), (4, 6)))

  def test_tokens_behind_the_text_belong_to_the_last_chunk(self):
    text = 'One two. Three.\n'
    offsets = words(text)[:3] + [(len(text), len(text) + 5)] * 2
    chunks = chunking.chunk(
        text, range(5), offsets, chunking.Chunking(3, 0, 'sentence')
    )
    self.assertEqual(chunks, ((0, 2), (2, 5)))

  def test_no_tokens(self):
    for boundary in ('window', 'sentence'):
      options = chunking.Chunking(boundary=boundary)
      self.assertEqual(chunking.chunk('', [], [], options), ())

  def test_window_ignores_the_text(self):
    self.assertEqual(
        split('One. Two. Three four', window=3, boundary='window'),
        ['One. Two. Three', ' four'],
    )

  def test_random_texts(self):
    rng = np.random.default_rng(0)
    tokenizer = text_tokenizers.byte_level()
    for _ in range(150):
      text = ''.join(rng.choice(PIECES, rng.integers(1, 25)))
      out = tokenizer(text, return_offsets_mapping=True, verbose=False)
      ids, offsets = out['input_ids'], out['offset_mapping']
      window = int(rng.integers(1, 30))
      overlap = int(rng.integers(0, window))
      for boundary in ('window', 'sentence'):
        options = chunking.Chunking(window, overlap, boundary)
        chunks = chunking.chunk(text, ids, offsets, options)
        extra = overlap if boundary == 'sentence' else 0
        self.check(chunks, len(ids), window + extra)

  def test_code_is_cut_between_lines(self):
    tokenizer = text_tokenizers.byte_level()
    out = tokenizer(CODE, return_offsets_mapping=True)
    ids, offsets = out['input_ids'], out['offset_mapping']
    lines = [len(tokenizer(line).input_ids) for line in CODE.splitlines(True)]
    for window in range(max(lines), 4 * max(lines), 7):
      options = chunking.Chunking(window, 0, 'sentence')
      chunks = chunking.chunk(CODE, ids, offsets, options)
      self.check(chunks, len(ids), window)
      for begin, _ in chunks[1:]:
        # White space in front of a line may belong to the line before.
        before = CODE[: offsets[begin][0]].rstrip(' \t')
        self.assertEndsWith(before, '\n')


class RealTextsTest(ChunksCase):

  def test_sentences_of_records(self):
    path = testing.data_path('editevery.jsonl')
    with path.open(encoding='utf-8') as file:
      texts = [json.loads(line)['answer'] for line in file]
    for text in texts:
      offsets = words(text)
      chunks = chunking.chunk(
          text,
          range(len(offsets)),
          offsets,
          chunking.Chunking(40, 0, 'sentence'),
      )
      self.check(chunks, len(offsets), 40)


class SurpriseTest(parameterized.TestCase):

  @parameterized.named_parameters(
      ('none', [], 4, ()),
      ('one', [1, 9, 1], 4, ((0, 3),)),
      # The two largest of eight; the first token replaces the lesser one.
      ('first', [0, 1, 1, 1, 9, 8, 1, 1], 4, ((0, 4), (4, 8))),
      ('kept', [9, 1, 1, 1, 8, 1, 1, 1], 4, ((0, 4), (4, 8))),
      # A chunk of 17 tokens, more than two windows, is cut at token 9.
      ('long', [9] + 8 * [1] + [5] + 7 * [1] + 4 * [8, 2, 2, 2], 8,
       ((0, 9), (9, 17), (17, 21), (21, 25), (25, 29), (29, 33))),
      # Chunks of fewer than four tokens join the one before.
      ('short', [9, 1, 1, 1, 8, 7, 1, 1, 1, 1, 1, 1], 4, ((0, 5), (5, 12))),
  )  # fmt: skip
  def test_by_hand(self, surprise, window, want):
    self.assertEqual(chunking.surprise_spans(surprise, window), want)

  def test_overlap_is_refused(self):
    with self.assertRaisesRegex(types.InputError, 'do not overlap: give 0'):
      chunking.check_chunking(chunking.Chunking(8, 2, 'surprise'))


if __name__ == '__main__':
  absltest.main()
