"""What a model answers in full, under one change or each prompt under its own.

Changes that lie side by side are run in the way that their form allows:

  low-rank   every row of a batch under its own factors
  dense      one edit after the other, with all of its prompts as one call

Either way kernels are changed as the layers run, at the cost of one more
product each: nothing is rounded to the dtype of the parameters, and none of
them is copied but biases and scales. A prompt draws from the same random stream
in both.

Not here: what an answer is worth (`similarity`, `metrics`), chat templates.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

from jaxedit import edited as edited_lib
from jaxedit.edited import lm
from jaxedit.models import decode
from jaxedit.models.decode import GREEDY, Decoding
from jaxedit.models.spec import ModelSpec
from jaxedit.types import (
    Edited,
    InputError,
    LowRank,
    Params,
    Progress,
    silent,
)


def end_ids(
    tokenizer: Any, vocab: int, chat_end: str = '', named: Iterable[int] = ()
) -> tuple[int, ...]:
  """Lists the tokens that end an answer.

  Args:
    tokenizer: a transformers tokenizer.
    vocab: rows of the model's embedding; ids from there up cannot occur.
    chat_end: text that ends a turn of the chat, '' without one. Of several
      tokens the special ones count.
    named: further ids, those of the model's generation_config.json.

  Returns:
    Ids of the end-of-text token, of the end of a turn and those named,
    ascending.

  Raises:
    InputError: the end of a turn is several tokens, all of them ordinary.
  """
  ends = {tokenizer.eos_token_id, *named} - {None}
  if chat_end:
    ids = tokenizer(chat_end, add_special_tokens=False)['input_ids']
    if len(ids) > 1:
      ids = [i for i in ids if i in tokenizer.added_tokens_decoder]
    if not ids:
      raise InputError(
          f'the end of a turn, {chat_end!r}, is no token of this tokenizer, so'
          ' nothing can stop at it; name the token that ends a turn, or none'
      )
    ends |= set(ids)
  return tuple(sorted(i for i in ends if i < vocab))


def answers(
    spec: ModelSpec,
    params: Params,
    edited: Edited,
    prompts: Sequence[Sequence[int]],
    *,
    tokenizer: Any,
    stop: Sequence[int],
    max_new_tokens: int,
    stack: Edited | None = None,
    owner: Sequence[int] | None = None,
    decoding: Decoding = GREEDY,
    streams: Sequence[int] | None = None,
    batch_size: int = 64,
    progress: Progress = silent,
) -> list[str]:
  """Lets the model answer prompts until it stops by itself.

  Args:
    spec: the architecture.
    params: canonical parameters of the unedited model.
    edited: a change that all prompts share.
    prompts: token ids, BOS included where the model wants one.
    tokenizer: turns the new tokens into text.
    stop: tokens that end a text, see `end_ids`.
    max_new_tokens: tokens at most.
    stack: E changes side by side, see `continuations`.
    owner: an index into the stack a prompt.
    decoding: how tokens are chosen.
    streams: number of each prompt's random stream, see `continuations`.
    batch_size: prompts a batch.
    progress: progress display.

  Returns:
    The answer to every prompt as it was written, without the token that ended
    it, special tokens and surrounding white space.

  Raises:
    InputError: see `continuations`.
  """
  tokens = continuations(
      spec,
      params,
      edited,
      prompts,
      stop=stop,
      max_new_tokens=max_new_tokens,
      stack=stack,
      owner=owner,
      decoding=decoding,
      streams=streams,
      batch_size=batch_size,
      progress=progress,
  )
  ends = set(stop)
  return texts(
      tokenizer, [t[:-1] if t and t[-1] in ends else t for t in tokens]
  )


def texts(tokenizer: Any, tokens: Sequence[Sequence[int]]) -> list[str]:
  """Turns new tokens into text.

  Args:
    tokenizer: a transformers tokenizer.
    tokens: ids of each text.

  Returns:
    The texts without special tokens and surrounding white space; what is inside
    stays as it is.
  """
  if not tokens:  # which a tokenizer takes for one text without tokens
    return []
  decoded = tokenizer.batch_decode(
      tokens, skip_special_tokens=True, clean_up_tokenization_spaces=False
  )
  return [text.strip() for text in decoded]


def continuations(
    spec: ModelSpec,
    params: Params,
    edited: Edited,
    prompts: Sequence[Sequence[int]],
    *,
    stop: Sequence[int],
    max_new_tokens: int,
    stack: Edited | None = None,
    owner: Sequence[int] | None = None,
    decoding: Decoding = GREEDY,
    streams: Sequence[int] | None = None,
    batch_size: int = 64,
    progress: Progress = silent,
) -> list[list[int]]:
  """Continues prompts, each by the model it belongs to.

  Args:
    spec: the architecture.
    params: canonical parameters of the unedited model.
    edited: a change that all prompts share.
    prompts: token ids.
    stop: tokens that end a text.
    max_new_tokens: tokens at most.
    stack: E changes side by side: low-rank factors [n, E, M, .], or dense
      changes [n, E, ...]. Prompt i is continued by the model that has change
      owner[i] besides `edited`.
    owner: an index into `stack` a prompt; given exactly when `stack` is.
    decoding: how tokens are chosen.
    streams: number of each prompt's random stream, below 2^31; its place if not
      given. Named ones make a sampled text independent of the other prompts of
      the call.
    batch_size: prompts a batch; where a change is dense, of one edit.
    progress: progress display.

  Returns:
    New tokens of every prompt, the one that ended it included.

  Raises:
    InputError: a setting is out of range, a prompt is empty, too long for the
      model or has a token that it lacks, or the stack does not fit.
  """
  settings = dict(
      max_new_tokens=max_new_tokens, stop_ids=stop, batch_size=batch_size
  )
  decode.refuse_faulty(
      spec,
      prompts,
      decoding=decoding,
      streams=streams,
      more=decode.stack_faults(
          edited.deltas,
          None if stack is None else stack.deltas,
          owner,
          len(prompts),
          full=True,
      ),
      **settings,
  )
  streams = range(len(prompts)) if streams is None else streams
  write = functools.partial(
      lm.generate, spec, params, **settings, **decoding._asdict()
  )
  if stack is None or not stack.deltas:
    return write(edited, prompts, streams=streams, progress=progress)
  if all(isinstance(d, LowRank) for d in stack.deltas):
    return write(
        edited,
        prompts,
        stack=stack.deltas,
        owner=owner,
        streams=streams,
        progress=progress,
    )
  tokens: list[list[int]] = [[] for _ in prompts]
  with progress('generate', len(prompts), 'text') as advance:
    for edit in sorted(set(owner)):
      chosen = [i for i, own in enumerate(owner) if own == edit]
      # No name is kept: the next change comes when this one has left memory.
      found = write(
          _beside(edited, edited_lib.one(stack, edit)),
          [prompts[i] for i in chosen],
          streams=[streams[i] for i in chosen],
          progress=_within(advance),
      )
      for i, text in zip(chosen, found):
        tokens[i] = text
  return tokens


def _beside(edited: Edited, own: Edited) -> Edited:
  """Two changes of different parameters as one."""
  return edited.replace(deltas=(*edited.deltas, *own.deltas))


def _within(advance: Callable[[int], None]) -> Progress:
  """A progress that counts on one which is open already."""

  @contextlib.contextmanager
  def progress(
      stage: str, total: int, unit: str
  ) -> Iterator[Callable[[int], None]]:
    del stage, total, unit
    yield advance

  return progress
