"""What counts as a good edit: metrics of one record, and their means.

Every metric is a fraction. Within a record it is the mean over the prompts of
its group (the edit prompt, the paraphrases, the neighbours, the probes of one
kind); the table shows the mean over the records that have the group.

Probabilities. NLL is the mean negative log-likelihood an object token, in nats,
so objects of different lengths are compared after length normalisation; p =
exp(-NLL). 'new' is the object written, 'true' the one replaced; at a neighbour
'true' is its own right answer. Ties count as failure, and so does a number that
is not finite.

  es, ps              NLL(new) < NLL(true) at the edit prompt, at paraphrases
  ns                  NLL(true) < NLL(new) at neighbours
  em, pm, nm          the same comparisons as differences: p(wanted) - p(other)
  score               harmonic mean of the three means es, ps, ns; 0 if one is 0
  es_acc, ps_acc,     every token of the wanted object is the most probable one
  ns_acc              when the tokens before it are given

  true_preferred      NLL(true) < NLL(new) at the edit prompt
  true_acc            every token of the true object is the most probable one
                      there: what the model knew, and has not forgotten

Token accuracy: the share of an answer's tokens that are the most probable ones
when the tokens before them are given. It is much higher than what free
generation shows, as later tokens of an answer follow easily from its first.

  reliability         at the edit prompt
  generalization      at paraphrases
  locality_correct    at neighbours, of the right answer
  locality_agreement  at neighbours: share of the answer's tokens where the most
                      probable token is that of the unedited model, right or not
  portability_<kind>  at probes that follow from the new fact
  attribute_agreement at probes of another attribute of the subject, and
  distract_agreement  of neighbours after the edit was stated: as
                      locality_agreement

Free generation: what the model says by itself (see `scorers.generation`).

  exact_match         the text is the new object, after normalisation
  contains            the text has the new object as a run of words
  paraphrase_contains the same at the first paraphrase

The optimisation

  learned             it ended with a probability of 0.5 or more a target token
                      (see `runs.edit_reports`)

Numbers of the three protocols are not comparable with each other.

Intervals are 95 % percentile bootstrap intervals over records (`statistics`).

Sources: Meng et al. 2022 (arXiv 2202.05262) and 2023 (arXiv 2210.07229) for the
probabilities; Wang et al. 2023 (EasyEdit, arXiv 2308.07269) for token accuracy,
locality and portability. zsRE is published with another token accuracy, which
turns each token back into text and compares the first id of what that becomes;
here ids are compared.

Pure functions of numbers; it runs no model.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from jaxedit import statistics
from jaxedit.eval import similarity

# Id -> readable name, in the order of tables. `score` is made by `aggregate`.
NAMES: Mapping[str, str] = {
    'score': 'harmonic mean of es, ps and ns',
    'es': 'new object beats old one',
    'ps': 'same, at paraphrases',
    'ns': 'neighbours keep their object',
    'em': 'es as probability difference',
    'pm': 'ps as probability difference',
    'nm': 'ns as probability difference',
    'es_acc': 'all object tokens right',
    'ps_acc': 'same, at paraphrases',
    'ns_acc': 'same, at neighbours',
    'reliability': 'object tokens right',
    'generalization': 'same, at paraphrases',
    'locality_correct': 'same, at neighbours',
    'locality_agreement': 'neighbours as before the edit',
    'attribute_agreement': 'other attributes as before',
    'distract_agreement': 'distracting neighbours as before',
    'exact_match': 'generated text is the object',
    'contains': 'generated text has the object',
    'paraphrase_contains': 'same, at first paraphrase',
    'true_preferred': 'old object beats new one',
    'true_acc': 'all tokens of the old object right',
    'learned': 'the optimisation reached its target',
}
PORTABILITY = 'portability_'
_SUCCESS = ('es', 'ps', 'ns')


class Interval(NamedTuple):
  """A mean over records with its uncertainty.

  Attributes:
    mean: over the records that have the metric.
    low: lower end of the 95 % interval.
    high: upper end.
    n: how many records have it; for `score` the fewest of its three metrics.
  """

  mean: float
  low: float
  high: float
  n: int


# What is asked for long answers, in `scorers.long_form`.
_ASKED = {
    'question': 'asked as edited',
    'paraphrase': 'paraphrased',
    'sub': 'sub-questions',
}


def name(metric: str) -> str:
  """Returns the readable name of a metric's id."""
  asked, _, score = metric.partition('/')
  if score:
    what = similarity.NAMES.get(score, NAMES.get(score, score))
    return f'{what}; {_ASKED.get(asked, asked)}'
  if metric.startswith(PORTABILITY):
    kind = metric.removeprefix(PORTABILITY).replace('_', ' ')
    return f'answer tokens right: {kind}'
  return NAMES.get(metric, metric)


def success(pairs: Sequence[tuple[float, float]]) -> float:
  """Returns how often the wanted object is the more likely one.

  Args:
    pairs: (NLL of the wanted object, NLL of the other) a prompt, nats a token.
  """
  return float(np.mean([wanted < other for wanted, other in pairs]))


def magnitude(pairs: Sequence[tuple[float, float]]) -> float:
  """Returns the mean of p(wanted) - p(other), p = exp(-NLL).

  Args:
    pairs: as `success`. A likelihood that is not a number counts as 0.
  """
  prob = lambda nll: 0.0 if math.isnan(nll) else math.exp(-nll)
  return float(np.mean([prob(w) - prob(o) for w, o in pairs]))


def all_correct(answers: Sequence[Sequence[bool]]) -> float:
  """Returns how often all tokens of an answer are right.

  Args:
    answers: for each prompt, whether each token of its answer is right.
  """
  return float(np.mean([all(tokens) for tokens in answers]))


def token_accuracy(answers: Sequence[Sequence[bool]]) -> float:
  """Returns the share of right tokens, a mean over prompts of their means.

  Args:
    answers: as `all_correct`.
  """
  return float(np.mean([np.mean(tokens) for tokens in answers]))


def agreement(
    after: Sequence[Sequence[int]], before: Sequence[Sequence[int]]
) -> float:
  """Returns the share of positions where two models prefer the same token.

  Args:
    after: for each prompt, the most probable token at each token of its answer.
    before: the same of the other model.
  """
  pairs = zip(after, before, strict=True)
  return token_accuracy(
      [[a == b for a, b in zip(x, y, strict=True)] for x, y in pairs]
  )


def harmonic_mean(values: Any) -> np.ndarray:
  """Returns harmonic means over the last axis, 0 where a value is 0 or less."""
  values = np.asarray(values, np.float64)
  positive = np.all(values > 0, axis=-1)
  safe = np.where(positive[..., None], values, 1.0)
  mean = values.shape[-1] / np.sum(1 / safe, axis=-1)
  missing = np.any(np.isnan(values), axis=-1)
  return np.where(missing, np.nan, np.where(positive, mean, 0.0))


def by_case(entries: Sequence[Mapping[str, Any]]) -> list[dict[str, float]]:
  """Gives the metrics of every case: of several records the means.

  Args:
    entries: records, with 'metrics' and, where several records are one edit,
      the name of their 'case'.

  Returns:
    A metric id -> value a case, as `aggregate` wants them.
  """
  cases: dict[Any, list[Mapping[str, float]]] = {}
  for i, entry in enumerate(entries):
    cases.setdefault(entry.get('case') or i, []).append(entry['metrics'])
  found = []
  for rows in cases.values():
    names = dict.fromkeys(name for row in rows for name in row)
    known = {
        n: [row[n] for row in rows if row.get(n) is not None] for n in names
    }
    found.append({name: float(np.mean(x)) for name, x in known.items() if x})
  return found


def aggregate(
    per_record: Sequence[Mapping[str, float]],
    seed: int = 0,
    resamples: int = 1000,
) -> dict[str, dict[str, Any]]:
  """Averages metrics over records.

  Args:
    per_record: for each record, metric id -> value; a metric that a record
      lacks is absent or None.
    seed: of the bootstrap.
    resamples: bootstrap samples.

  Returns:
    Metric id -> the fields of `Interval`, in the order of `NAMES`, then by
    name. A metric that no record has is absent. `score` is there when es, ps
    and ns are.
  """
  found = {
      m for record in per_record for m, v in record.items() if v is not None
  }
  ids = [m for m in NAMES if m in found]
  ids += sorted(found.difference(ids))
  if not ids:
    return {}
  raw = [[record.get(m) for m in ids] for record in per_record]
  values = np.array(raw, np.float64)  # None becomes NaN
  drawn = statistics.bootstrap_means(values, seed=seed, resamples=resamples)
  present = ~np.isnan(values)
  means = np.nanmean(values, axis=0)
  counts = np.sum(present, axis=0)
  if all(m in ids for m in _SUCCESS):
    three = [ids.index(m) for m in _SUCCESS]
    ids = ['score', *ids]
    means = np.append(harmonic_mean(means[three]), means)
    counts = np.append(np.min(counts[three]), counts)
    drawn = np.column_stack([harmonic_mean(drawn[:, three]), drawn])
  low, high = statistics.percentiles(drawn)
  return {
      m: Interval(float(a), float(b), float(c), int(n))._asdict()
      for m, a, b, c, n in zip(ids, means, low, high, counts)
  }
