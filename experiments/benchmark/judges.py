"""The last stage of an edit: what the edited model says is scored, or sampled.

Facts are scored (prompts, paraphrases and neighbours under the change); long
answers are given in full, every question by the model that its edit alone has
changed. The texts themselves are not looked at.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence

from experiments.benchmark.setup import Setup
from experiments.benchmark.stages import Stage, dtype_of, itemsize
from jaxedit import edited as edited_lib
from jaxedit.deltas import Edited
from jaxedit.edited import scoring
from jaxedit.eval.scorers import base
from jaxedit.planning import costs
from jaxedit.planning.machine import peak_bytes, timed
from jaxedit.types import LOCALITY, REPHRASE, EditRequest, Progress


def queries(
    requests: Sequence[EditRequest],
) -> list[tuple[str, tuple[str, ...]]]:
  """Lists what the evaluation stage scores, each once.

  Args:
    requests: the facts.

  Returns:
    (prompt, answers) of edit prompts, paraphrases and neighbours.
  """
  found: dict[tuple[str, tuple[str, ...]], None] = {}
  for request in requests:
    texts = tuple(filter(None, (request.target, request.target_true)))
    rephrases = [probe.prompt for probe in request.probes_of(REPHRASE)]
    for prompt in (request.question, *rephrases):
      found[prompt, texts] = None
    for probe in request.probes_of(LOCALITY):
      found[probe.prompt, (probe.answers[0], request.target)] = None
  return list(found)


class Evaluation:
  """The stage of facts: edit prompts, paraphrases and neighbours scored."""

  def __init__(self, setup: Setup):
    self._setup = setup
    self._batch = setup.config.eval_batch_size
    spec = setup.model.spec
    self._queries = scoring.encode_queries(
        setup.tokenizer, queries(setup.requests)
    )
    tokens = sum(query.tokens for query in self._queries)
    scored = sum(query.scored for query in self._queries)
    flops = costs.score_flops(spec, tokens, scored)
    self.stage = Stage('evaluate', 'edit', len(setup.edits))
    self.stage.flops = {dtype_of(setup): flops}
    self.stage.bytes = costs.model_bytes(
        spec, spec.layers, itemsize(setup), head=True
    )
    self.stage.more = {'rows': len(self._queries), 'tokens': tokens}

  def __call__(self, edited: Edited, progress: Progress) -> None:
    """Scores all queries under a delta, and times it."""
    whole = Edited(deltas=tuple(map(edited_lib.compact, edited.deltas)))
    lm = edited_lib.open_model(self._setup.model, whole, batch_size=self._batch)
    _, seconds = timed(lambda: lm.score(self._queries, progress=progress))
    self.stage.seconds.append(seconds)
    self.stage.peak = peak_bytes()


class Answers:
  """The stage of long answers: questions answered, counted by the token.

  A token written is a pass through all layers and the head, one of the question
  through the layers. Whole batches read the weights once a token of their
  longest answer, and once more for the questions.
  """

  def __init__(self, setup: Setup):
    self._setup = setup
    self._batch = setup.config.eval_batch_size
    chat = setup.task.words(setup.tokenizer)['chat']
    self._stop = base.end_ids(setup.tokenizer, setup.model.spec.vocab, chat.end)
    self.stage = Stage('answer', 'token', 0)

  def __call__(self, edited: Edited, progress: Progress) -> None:
    """Lets every changed model answer its own question, and times it."""
    edits, model = self._setup.edits, self._setup.model
    lm = edited_lib.open_model(model, edited, batch_size=self._batch)
    answer = functools.partial(
        lm.generate,
        [edit.rows[0].tolist() for edit in edits],
        max_new_tokens=self._setup.settings.max_new_tokens,
        stop_ids=self._stop,
        edit_ids=range(len(edits)),
        progress=progress,
    )
    texts, seconds = timed(answer)
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


def judges_of(setup: Setup) -> list[Evaluation | Answers]:
  """Chooses the stage of facts, or of long answers if any are generated."""
  if not setup.independent:
    return [Evaluation(setup)]
  return [Answers(setup)] if setup.settings.max_new_tokens else []
