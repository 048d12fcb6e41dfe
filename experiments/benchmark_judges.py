"""The last stage of an edit: what the edited model says is scored, or sampled.

Facts are scored (prompts, paraphrases and neighbours under the change); long
answers are given in full, every question by the model that its edit alone has
changed. The texts themselves are not looked at.
"""

from __future__ import annotations

from collections.abc import Sequence

from experiments import benchmark_passages, costs
from experiments.benchmark_setup import Setup
from experiments.benchmark_stages import (
    Stage,
    dtype_of,
    itemsize,
    peak_bytes,
    timed,
)
from jaxedit import edited as edited_lib
from jaxedit.deltas import (
    Edited,
)
from jaxedit.edited import scoring
from jaxedit.eval.scorers import long_form
from jaxedit.types import (
    LOCALITY,
    REPHRASE,
    EditRequest,
    Progress,
)


def items(records: Sequence[EditRequest]) -> list[tuple[str, tuple[str, ...]]]:
  """Lists what the evaluation stage scores, each row once.

  Args:
    records: the facts.

  Returns:
    (prompt, answers) of edit prompts, paraphrases and neighbours.
  """
  found: dict[tuple[str, tuple[str, ...]], None] = {}
  for record in records:
    texts = tuple(filter(None, (record.target, record.target_true)))
    rephrases = [probe.prompt for probe in record.probes_of(REPHRASE)]
    for prompt in (record.question, *rephrases):
      found[prompt, texts] = None
    for probe in record.probes_of(LOCALITY):
      found[probe.prompt, (probe.answers[0], record.target)] = None
  return list(found)


class Evaluation:
  """The stage of facts: edit prompts, paraphrases and neighbours scored."""

  def __init__(self, setup: Setup, batch_size: int):
    self._setup, self._batch = setup, batch_size
    spec = setup.model.spec
    self._rows = scoring.encode_queries(setup.tokenizer, items(setup.records))
    tokens = sum(row.tokens for row in self._rows)
    scored = sum(row.scored for row in self._rows)
    self.stage = Stage('evaluate', 'edit', len(setup.edits))
    self.stage.flops = {
        dtype_of(setup): costs.score_flops(spec, tokens, scored)
    }
    self.stage.bytes = costs.model_bytes(
        spec, spec.layers, itemsize(setup), head=True
    )
    self.stage.more = {'rows': len(self._rows), 'tokens': tokens}

  def __call__(self, edited: Edited, progress: Progress) -> None:
    """Scores all rows under a change, and times it."""
    whole = Edited(deltas=tuple(map(edited_lib.compact, edited.deltas)))
    lm = edited_lib.open_model(self._setup.model, whole, batch_size=self._batch)
    _, seconds = timed(lambda: lm.score(self._rows, progress=progress))
    self.stage.seconds.append(seconds)
    self.stage.peak = peak_bytes()


class Answers:
  """The stage of long answers: questions answered, counted by the token.

  A token written is a pass through all layers and the head, one of the question
  through the layers. Whole batches read the weights once a token of their
  longest answer, and once more for the questions.
  """

  def __init__(self, setup: Setup, batch_size: int, max_new_tokens: int):
    self._setup, self._batch = setup, batch_size
    self._most = max_new_tokens
    words, spec = setup.tokenizer, setup.model.spec
    self._stop = long_form.end_ids(
        words, spec.vocab, benchmark_passages.chat(words).end
    )
    self.stage = Stage('answer', 'token', 0)

  def __call__(self, edited: Edited, progress: Progress) -> None:
    """Lets every changed model answer its own question, and times it."""
    edits = self._setup.edits
    lm = edited_lib.open_model(
        self._setup.model, edited, batch_size=self._batch
    )
    texts, seconds = timed(
        lambda: lm.generate(
            [edit.rows[0].tolist() for edit in edits],
            max_new_tokens=self._most,
            stop_ids=self._stop,
            edit_ids=range(len(edits)),
            progress=progress,
        )
    )
    self._count([len(text) for text in texts])
    self.stage.seconds.append(seconds)
    self.stage.peak = peak_bytes()

  def _count(self, written: Sequence[int]) -> None:
    """Counts the work; greedy answers are the same every time."""
    setup, stage, step = self._setup, self.stage, self._batch
    spec = setup.model.spec
    asked = sum(len(edit.rows[0]) for edit in setup.edits)
    stage.count = sum(written)
    # The last token written is not run.
    run = asked + stage.count - len(written)
    stage.flops = {dtype_of(setup): costs.score_flops(spec, run, stage.count)}
    passes = sum(
        max(written[i : i + step]) for i in range(0, len(written), step)
    )
    stage.bytes = passes * costs.model_bytes(
        spec, spec.layers, itemsize(setup), head=True
    )
    stage.more = {'texts': len(written), 'question_tokens': asked}


def judge(
    setup: Setup, batch_size: int, max_new_tokens: int
) -> Evaluation | Answers:
  """Chooses the stage.

  Args:
    setup: what it runs on.
    batch_size: rows, or questions, a batch.
    max_new_tokens: longest answer.
  """
  if setup.apart:
    return Answers(setup, batch_size, max_new_tokens)
  return Evaluation(setup, batch_size)
