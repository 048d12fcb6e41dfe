"""How close a long answer is to its reference, as numbers between two texts.

Numbers of two kinds that do not compare with each other, hence the names.

The published protocol of long-form editing (UnKEBench and AnyEdit):

  bleu_char        character BLEU: exp(mean over n = 1..4 of log p_n) * brevity,
                   p_n = clipped share of p's character n-grams that r has,
                   brevity = exp(1 - |r| / |p|) where p is the shorter one, else
                   1. No smoothing: without a common n-gram of one order it is 0
  rouge_1_recall   share of the different words of r that p has
  rouge_2_recall   the same of pairs of neighbouring words
  rouge_l_recall   share of the different words of r that lie in a longest
                   common subsequence of one sentence of r and one of p
  minilm_cosine    cosine of sentence embeddings (see `retrieval`), there called
                   'Bert Score' although it is not BERTScore

The usual definitions:

  bleu_word        sacrebleu's sentence BLEU (13a words, exponential smoothing,
                   effective order), as a fraction
  rouge_l_f1       rouge-score's ROUGE-L F1 (lower case, no stemming), whose
                   words are runs of ASCII letters and digits; absent where the
                   reference has none
  bleu_word_unicode, rouge_l_f1_unicode
                   the same over words of any script: letters of any alphabet
                   make words, characters of scripts without blanks stand alone,
                   and so do emoji (see `text.scripts`). On ASCII texts they
                   are equal to the two above
  exact_match      the same words after normalisation (see `matching`: case,
                   punctuation and articles do not count), 1 or 0

For the recalls, words are what white space separates, case and punctuation
kept, and sentences are what '.' separates, also inside 3.5 or U.S.; n-grams run
across sentences. Recall alone: a text that never ends is not punished.

As published, a prediction without a space is taken with one at its end before
the first five numbers; it makes an empty prediction a text.

Sources: Deng et al. 2024 (UnKE, arXiv 2405.15349) and Jiang et al. 2025
(AnyEdit, arXiv 2502.05628), evaluated with nltk's sentence_bleu on strings in
place of lists of words and with the `rouge` package 1.0.1. Where an order has
no common n-gram, nltk gives something between 0 and 1e-76 (1e-231 where only
single characters agree), after a warning; here that is 0.

Not here: means and intervals (`metrics.aggregate`), BERTScore, a model.
"""

from __future__ import annotations

import collections
import functools
import importlib.util
import math
import re
import unicodedata
from collections.abc import Callable, Mapping, Sequence

import numpy as np

from jaxedit import retrieval
from jaxedit.eval import matching
from jaxedit.models.encoder import Encoder
from jaxedit.text import scripts
from jaxedit.types import InputError

# Id -> readable name, in the order of tables.
NAMES: Mapping[str, str] = {
    'bleu_char': 'BLEU over characters',
    'rouge_1_recall': 'ROUGE-1 recall, different words',
    'rouge_2_recall': 'ROUGE-2 recall, different pairs',
    'rouge_l_recall': 'ROUGE-L recall, different words',
    'minilm_cosine': 'MiniLM cosine',
    'bleu_word': 'BLEU over words',
    'rouge_l_f1': 'ROUGE-L F1',
    'bleu_word_unicode': 'BLEU over words of any script',
    'rouge_l_f1_unicode': 'ROUGE-L F1, any script',
    'exact_match': 'same words, normalised',
}
# Id -> the package that computes it, as imported and as installed.
_NEEDS = {
    'bleu_word': ('sacrebleu', 'sacrebleu'),
    'rouge_l_f1': ('rouge_score', 'rouge-score'),
    'bleu_word_unicode': ('sacrebleu', 'sacrebleu'),
    'rouge_l_f1_unicode': ('rouge_score', 'rouge-score'),
}
_ORDERS = 4
_PUBLISHED, _UNICODE = 'published', 'unicode'


def missing() -> list[str]:
  """Says which scores cannot be computed here, and what to install.

  Returns:
    A sentence a score; none where all packages are there.
  """
  return [_sentence(metric) for metric in _NEEDS if not _is_there(metric)]


def scores(
    predictions: Sequence[str],
    references: Sequence[str],
    *,
    encoder: Encoder | None = None,
) -> list[dict[str, float]]:
  """Scores predictions against their references with everything there is.

  Args:
    predictions: N texts that a model gave; they may be empty.
    references: N texts that they should be.
    encoder: sentence encoder; without it there is no `minilm_cosine`.

  Returns:
    For each pair, id -> score in the order of `NAMES`, made for
    `metrics.aggregate`. What `missing` names is absent.

  Raises:
    InputError: the numbers differ, or a reference has no word; all at once.
  """
  _check(predictions, references)
  found = {
      metric: score
      for metric, score in _SCORES.items()
      if metric not in _NEEDS or _is_there(metric)
  }
  rows = [
      {
          metric: float(score(p, r))
          for metric, score in found.items()
          if metric != 'rouge_l_f1' or _ASCII_WORD.search(r)
      }
      for p, r in zip(predictions, references)
  ]
  if encoder is None or not rows:
    return rows
  # A reference often stands for several predictions; embed each text once.
  texts = list(dict.fromkeys([*map(_spaced, predictions), *references]))
  place = {text: i for i, text in enumerate(texts)}
  vectors = retrieval.embed(encoder, texts)
  said = vectors[[place[_spaced(p)] for p in predictions]]
  wanted = vectors[[place[r] for r in references]]
  for row, one in zip(rows, cosine(said, wanted)):
    row['minilm_cosine'] = float(one)
  return [{m: row[m] for m in NAMES if m in row} for row in rows]


def cosine(a: np.ndarray, b: np.ndarray) -> np.ndarray:
  """Returns the cosine of each pair of rows.

  Args:
    a: [N, D].
    b: [N, D].

  Returns:
    [N] f64 from -1 to 1; 0 where a row is zero.
  """
  a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
  length = np.linalg.norm(a, axis=-1) * np.linalg.norm(b, axis=-1)
  product = np.sum(a * b, axis=-1)
  safe = np.where(length > 0, length, 1.0)
  return np.clip(np.where(length > 0, product / safe, 0.0), -1.0, 1.0)


def bleu_char(prediction: str, reference: str) -> float:
  """Returns the BLEU-4 of two texts whose tokens are characters.

  Args:
    prediction: what the model said.
    reference: what it should say.

  Returns:
    The score of the module head; 0 for texts of fewer than four characters.
  """
  prediction = _spaced(prediction)
  total = 0.0
  for n in range(1, _ORDERS + 1):
    said, wanted = _counts(prediction, n), _counts(reference, n)
    common = sum((said & wanted).values())
    if common == 0:
      return 0.0
    total += math.log(common / sum(said.values()))
  shortfall = max(0.0, len(reference) / len(prediction) - 1)
  return math.exp(total / _ORDERS - shortfall)


def rouge_1_recall(prediction: str, reference: str) -> float:
  """Returns the share of the reference's words that the prediction has.

  Args:
    prediction: what the model said.
    reference: what it should say.
  """
  return _ngram_recall(prediction, reference, 1)


def rouge_2_recall(prediction: str, reference: str) -> float:
  """Returns the share of the reference's word pairs that the prediction has.

  Args:
    prediction: what the model said.
    reference: what it should say; one of a single word gives 0, always.
  """
  return _ngram_recall(prediction, reference, 2)


def rouge_l_recall(prediction: str, reference: str) -> float:
  """Returns the share of the reference's words on common subsequences.

    |U| / |words of r|,  U = union of the words of LCS(s, t) over all sentences
    s of r and t of p

  Args:
    prediction: what the model said.
    reference: what it should say.
  """
  said, wanted = _sentences(_spaced(prediction)), _sentences(reference)
  words = {word for sentence in wanted for word in sentence}
  union: set[str] = set()
  for sentence in wanted:
    for other in said:
      # What has been found cannot count again.
      if not union.issuperset(set(sentence).intersection(other)):
        union.update(_common_words(sentence, other))
  return len(union) / len(words) if words else 0.0


def bleu_word(
    prediction: str, reference: str, tokenizer: str = _UNICODE
) -> float:
  """Returns sacrebleu's sentence BLEU, from 0 to 1.

  Its own defaults, spelt out: 13a tokens, case kept, exponential smoothing, and
  effective order, so orders that the prediction is too short for are left out.

  Args:
    prediction: what the model said.
    reference: what it should say.
    tokenizer: 'unicode', which sets characters of scripts without blanks,
      emoji and all punctuation apart first, or 'published', 13a alone.

  Raises:
    InputError: sacrebleu is not installed.
  """
  _require('bleu_word')
  # Optional, and slow to import.
  from sacrebleu.metrics import bleu

  scorer = bleu.BLEU(
      lowercase=False,
      tokenize='13a',
      smooth_method='exp',
      max_ngram_order=_ORDERS,
      effective_order=True,
  )
  if tokenizer == _UNICODE:
    prediction, reference = _set_apart(prediction), _set_apart(reference)
  # Its sums go past 100 by rounding.
  score = scorer.sentence_score(prediction, [reference]).score
  return min(score / 100, 1.0)


def rouge_l_f1(
    prediction: str, reference: str, tokenizer: str = _UNICODE
) -> float:
  """Returns rouge-score's ROUGE-L F1 of two texts, each as one sentence.

  Args:
    prediction: what the model said.
    reference: what it should say.
    tokenizer: 'unicode', words of any script, or 'published', runs of ASCII
      letters and digits.

  Raises:
    InputError: rouge-score is not installed.
  """
  _require('rouge_l_f1')
  # Optional, and slow to import.
  from rouge_score import rouge_scorer

  scorer = rouge_scorer.RougeScorer(
      ['rougeL'],
      use_stemmer=False,
      tokenizer=_UnicodeWords() if tokenizer == _UNICODE else None,
  )
  return float(scorer.score(reference, prediction)['rougeL'].fmeasure)


def exact_match(prediction: str, reference: str) -> float:
  """Returns 1 if two texts have the same words after normalisation, else 0.

  Args:
    prediction: what the model said.
    reference: what it should say.
  """
  return float(matching.exact_match(prediction, reference))


_SCORES: Mapping[str, Callable[[str, str], float]] = {
    'bleu_char': bleu_char,
    'rouge_1_recall': rouge_1_recall,
    'rouge_2_recall': rouge_2_recall,
    'rouge_l_recall': rouge_l_recall,
    'bleu_word': functools.partial(bleu_word, tokenizer=_PUBLISHED),
    'rouge_l_f1': functools.partial(rouge_l_f1, tokenizer=_PUBLISHED),
    'bleu_word_unicode': bleu_word,
    'rouge_l_f1_unicode': rouge_l_f1,
    'exact_match': exact_match,
}


# Packages.


def _is_there(metric: str) -> bool:
  return importlib.util.find_spec(_NEEDS[metric][0]) is not None


def _sentence(metric: str) -> str:
  return (
      f'{metric} needs the package {_NEEDS[metric][1]}; install it with pip'
      " install 'jaxedit[text]'."
  )


def _require(metric: str) -> None:
  if not _is_there(metric):
    raise InputError(_sentence(metric))


def _check(predictions: Sequence[str], references: Sequence[str]) -> None:
  """Refuses pairs that no score is defined for."""
  problems = []
  if len(predictions) != len(references):
    problems.append(
        f'{len(predictions)} predictions cannot be scored against'
        f' {len(references)} references; give one reference a prediction.'
    )
  for i, reference in enumerate(references):
    if not has_words(reference):
      problems.append(
          f'reference {i} ({reference[:40]!r}) has no word to score against;'
          ' remove the pair or correct the reference.'
      )
  InputError.raise_for(problems)


# Texts.

_ASCII_WORD = re.compile('[A-Za-z0-9]')


class _UnicodeWords:
  """Words of any script, as rouge-score asks for them."""

  def tokenize(self, text: str) -> list[str]:
    text = unicodedata.normalize('NFKC', text).lower()
    return scripts.pieces(scripts.strip_invisible(text), scripts.is_word)


def _set_apart(text: str) -> str:
  """Puts blanks where 13a, which knows ASCII alone, sees one word."""
  if text.isascii():
    return text
  text = unicodedata.normalize('NFC', text)
  mark = lambda c: not c.isascii() and unicodedata.category(c)[0] == 'P'
  text = ''.join(f' {char} ' if mark(char) else char for char in text)
  return ' '.join(scripts.pieces(text))


def _spaced(prediction: str) -> str:
  """Adds the space that the published protocol wants somewhere."""
  return prediction if ' ' in prediction else prediction + ' '


def has_words(text: str) -> bool:
  """Says whether scores can be read against a text."""
  return any(any(sentence) for sentence in _sentences(text))


def _sentences(text: str) -> list[list[str]]:
  """Splits a text into sentences of words.

  A piece of white space between two full stops is a sentence whose one word is
  empty, and counts as a word: as published.
  """
  pieces = (' '.join(piece.split()) for piece in text.split('.') if piece)
  return [piece.split(' ') for piece in pieces]


def _counts(text: str, n: int) -> collections.Counter[str]:
  """Counts the character n-grams of a text."""
  return collections.Counter(text[i : i + n] for i in range(len(text) - n + 1))


def _ngrams(text: str, n: int) -> set[tuple[str, ...]]:
  """The different word n-grams of a text, across its sentences."""
  words = [word for sentence in _sentences(text) for word in sentence]
  return set(zip(*(words[i:] for i in range(n))))


def _ngram_recall(prediction: str, reference: str, n: int) -> float:
  said, wanted = _ngrams(_spaced(prediction), n), _ngrams(reference, n)
  return len(said & wanted) / len(wanted) if wanted else 0.0


def _common_words(x: Sequence[str], y: Sequence[str]) -> set[str]:
  """The different words of one longest common subsequence.

  Which one, where there are several, changes the score. As published: from the
  ends, take equal words; else shorten x where that alone keeps the length, and
  y otherwise.
  """
  ids = {word: i for i, word in enumerate(dict.fromkeys([*x, *y]))}
  right = np.array([ids[word] for word in y])
  # length[i, j] of the first i words of x and the first j of y.
  length = np.zeros((len(x) + 1, len(y) + 1), np.int32)
  for i, word in enumerate(x):
    match = length[i, :-1] + (right == ids[word])
    row = np.maximum(match, length[i, 1:])
    length[i + 1, 1:] = np.maximum.accumulate(row)
  found = set()
  i, j = len(x), len(y)
  while i and j:
    if x[i - 1] == y[j - 1]:
      found.add(x[i - 1])
      i, j = i - 1, j - 1
    elif length[i - 1, j] > length[i, j - 1]:
      i -= 1
    else:
      j -= 1
  return found
