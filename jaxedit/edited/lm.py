"""The one interface to an edited model.

  open_model(model, edited) -> LanguageModel with `score` and `generate`

Evaluation, serving and tracing use a `LanguageModel` and never ask which method
made the edit. Only this module decides

  * whether a change of weights is merged (weights of float32 or wider) or applied
    as the layers run (narrower ones, which merging would round);
  * whether edits side by side run as sequences of one batch, or one edit after
    the other (those that change whole matrices);
  * what prompting and routing rules do to a prompt before the model reads it.

`apply_model` is the pure function below it, for a caller's own jit, grad and mesh.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple, Protocol

import jax.numpy as jnp

from jaxedit import deltas as deltas_lib
from jaxedit.deltas import UNEDITED, Dense, Edited, SiteDelta
from jaxedit.edited import algebra, scoring
from jaxedit.edited.scoring import Query, Scored
from jaxedit.models import decode, decoder
from jaxedit.models.decode import GREEDY, Decoding
from jaxedit.models.loading import Model
from jaxedit.models.spec import ModelSpec
from jaxedit.numerics import wide
from jaxedit.types import (
    Array,
    InputError,
    Params,
    Progress,
    TokenLayout,
    silent,
)

OUTPUT_SITES = ('attn', 'mlp', 'block')


class LanguageModel(Protocol):
  """All that evaluation, serving and tracing may ask of a model.

  Attributes:
    spec: the architecture, for its vocabulary and context length.
  """

  spec: ModelSpec

  def score(
      self,
      queries: Sequence[Query],
      *,
      edit_ids: Sequence[int] | None = None,
      progress: Progress = silent,
  ) -> list[list[Scored]]:
    """Scores the answers of queries under teacher forcing.

    Args:
      queries: prompts with answers.
      edit_ids: which edit each query is under; needed exactly where the model
        has edits side by side.
      progress: progress display.

    Returns:
      For each query the scores of its answers, in order.

    Raises:
      InputError: queries that the model cannot take, all at once.
    """

  def generate(
      self,
      prompts: Sequence[Sequence[int]],
      *,
      max_new_tokens: int,
      stop_ids: Sequence[int] = (),
      decoding: Decoding = GREEDY,
      streams: Sequence[int] | None = None,
      edit_ids: Sequence[int] | None = None,
      progress: Progress = silent,
  ) -> list[list[int]]:
    """Continues prompts.

    Args:
      prompts: token ids.
      max_new_tokens: tokens to add at most.
      stop_ids: tokens that end a text; the stop token is kept as its last.
      decoding: how tokens are chosen.
      streams: number of each prompt's random stream, below 2^31; its index if
        not given.
      edit_ids: as for `score`.
      progress: progress display.

    Returns:
      New tokens of every prompt, in order.

    Raises:
      InputError: settings or prompts that the model cannot take, all at once.
    """


def open_model(
    model: Model,
    edited: Edited = UNEDITED,
    *,
    batch_size: int = 64,
) -> LanguageModel:
  """Opens a model under an edit.

  Args:
    model: the unedited model; untouched.
    edited: the edit, or edits side by side.
    batch_size: sequences that are run together.

  Returns:
    The edited model.

  Raises:
    InputError: the edit does not fit the model.
  """
  check(model.spec, model.params, edited)
  return _EditedModel(model.spec, model.params, edited, batch_size)


def apply_model(
    spec: ModelSpec,
    params: Params,
    edited: Edited,
    tokens: Array,
    layout: TokenLayout,
    *,
    edit_ids: Array | None = None,
) -> Array:
  """Computes the logits of an edited model; a pure function.

  Args:
    spec: the architecture.
    params: canonical parameters of the unedited model.
    edited: the edit.
    tokens: [B, T] int32.
    layout: of the tokens.
    edit_ids: [B] int32, with edits side by side.

  Returns:
    [B, T, V] logits, float32 or wider.

  Raises:
    ValueError: the edit rewrites or routes prompts, or `edit_ids` does not go
      with it.
  """
  if edited.prompting is not None or edited.routing is not None:
    raise ValueError('prompting and routing rules need `open_model`')
  if (edited.size is None) != (edit_ids is None):
    raise ValueError('edit_ids are needed exactly with edits side by side')
  params, deltas = enter(params, edited.deltas)
  h = decoder.embed(spec, params, tokens, layout)
  h, _ = decoder.run_layers(
      spec,
      params,
      h,
      layout,
      start=0,
      stop=spec.layers,
      deltas=deltas_lib.active(deltas, edit_ids),
  )
  return decoder.logits(spec, params, h)


def enter(
    params: Params, deltas: Sequence[SiteDelta]
) -> tuple[Params, tuple[SiteDelta, ...]]:
  """Merges what the layers cannot apply as they run.

  Args:
    params: canonical parameters of the unedited model; untouched.
    deltas: of one edit.

  Returns:
    (parameters with the changes of biases and scales merged, in float32 or
    wider so that nothing is rounded; the other deltas).
  """
  small = [d for d in deltas if isinstance(d, Dense) and d.leaf != 'kernel']
  for delta in small:
    params = algebra.apply(params, Edited((delta,)), dtype=jnp.float32)
  return params, tuple(d for d in deltas if d not in small)


def check(spec: ModelSpec, params: Params, edited: Edited) -> None:
  """Refuses an edit that does not fit a model.

  Args:
    spec: the architecture.
    params: canonical parameters.
    edited: the edit.

  Raises:
    InputError: layers, sites or widths that the model lacks.
  """
  problems = []
  for delta in edited.deltas:
    name = f'the {type(delta).__name__} delta of {delta.site}'
    if strange := [i for i in delta.layers if not 0 <= i < spec.layers]:
      problems.append(
          f'{name}: layers {strange} are not in the model, which has 0 to'
          f' {spec.layers - 1}; load the model it was made for'
      )
    if delta.site not in OUTPUT_SITES and _leaf(params, delta) is None:
      problems.append(
          f'{name}: the model has no such site; load the model it was made for'
      )
    elif isinstance(delta, Dense):
      wanted = _leaf(params, delta).shape[1:]
      given = delta.value.shape[1 if edited.size is None else 2 :]
      if wanted != given:
        problems.append(
            f'{name}: has shape {given}, the parameter {wanted}; load the model'
            ' it was made for'
        )
  if problems:
    raise InputError(*problems)


def _leaf(params: Params, delta: SiteDelta) -> Array | None:
  """The stacked parameter that a delta is of."""
  found: Any = params
  for name in algebra.path(delta).split('/'):
    if name not in found:
      return None
    found = found[name]
  return found


class _Part(NamedTuple):
  """Prompts that one set of weights and deltas serves."""

  params: Params
  deltas: tuple[SiteDelta, ...]
  index: list[int]  # which of all prompts
  edit_ids: list[int] | None


class _EditedModel:
  """See `open_model`."""

  def __init__(
      self, spec: ModelSpec, params: Params, edited: Edited, batch_size: int
  ):
    self.spec = spec
    self._base, self._edited = params, edited
    self._batch_size = batch_size
    self._merged: tuple[Params, tuple[SiteDelta, ...]] | None = None

  def score(self, queries, *, edit_ids=None, progress=silent):
    prompts = self._rewrite([query.prompt for query in queries], edit_ids)
    asked = [Query(tuple(p), q.answers) for p, q in zip(prompts, queries)]
    scoring.check(self.spec, asked)
    results: list[Any] = [None] * len(asked)
    with progress('score', len(asked), 'prompt') as advance:
      for part in self._parts([q.prompt for q in queries], edit_ids):
        found = scoring.score(
            self.spec,
            part.params,
            part.deltas,
            [asked[i] for i in part.index],
            edit_ids=part.edit_ids,
            batch_size=self._batch_size,
            progress=_counted(advance),
        )
        for i, one in zip(part.index, found):
          results[i] = one
    return results

  def generate(
      self,
      prompts,
      *,
      max_new_tokens,
      stop_ids=(),
      decoding=GREEDY,
      streams=None,
      edit_ids=None,
      progress=silent,
  ):
    given, prompts = prompts, self._rewrite(prompts, edit_ids)
    settings = dict(
        max_new_tokens=max_new_tokens,
        stop_ids=stop_ids,
        batch_size=self._batch_size,
    )
    decode.refuse_faulty(
        self.spec, prompts, decoding=decoding, streams=streams, **settings
    )
    streams = range(len(prompts)) if streams is None else streams
    results: list[list[int]] = [[] for _ in prompts]
    with progress('generate', len(prompts), 'text') as advance:
      for part in self._parts(given, edit_ids):
        found = decode.generate(
            self.spec,
            part.params,
            [prompts[i] for i in part.index],
            deltas=part.deltas,
            edit_ids=part.edit_ids,
            streams=[streams[i] for i in part.index],
            progress=_counted(advance),
            **settings,
            **decoding._asdict(),
        )
        for i, one in zip(part.index, found):
          results[i] = one
    return results

  def _rewrite(
      self,
      prompts: Sequence[Sequence[int]],
      edit_ids: Sequence[int] | None,
  ) -> list[Sequence[int]]:
    """Checks `edit_ids` and rewrites the prompts that the edit answers."""
    size = self._edited.size
    if (size is None) != (edit_ids is None):
      raise InputError(
          f'edit_ids are {edit_ids}: they are needed exactly where edits lie side'
          f' by side, and this model has {size or "one"}'
      )
    if edit_ids is not None and (
        len(edit_ids) != len(prompts)
        or any(not 0 <= i < size for i in edit_ids)
    ):
      raise InputError(
          f'{len(edit_ids)} edit_ids for {len(prompts)} prompts: give one a'
          f' prompt, from 0 to {size - 1}'
      )
    if self._edited.prompting is None:
      return list(prompts)
    answered = self._answered(prompts, edit_ids)
    chosen = [i for i, yes in enumerate(answered) if yes]
    ids = None if edit_ids is None else [edit_ids[i] for i in chosen]
    rewritten: list[Sequence[int]] = list(prompts)
    found = self._edited.prompting.rewrite([prompts[i] for i in chosen], ids)
    for i, prompt in zip(chosen, found):
      rewritten[i] = prompt
    return rewritten

  def _answered(
      self,
      prompts: Sequence[Sequence[int]],
      edit_ids: Sequence[int] | None,
  ) -> list[bool]:
    """Which prompts the edited model answers."""
    if self._edited.routing is None:
      return [True] * len(prompts)
    return self._edited.routing.applies(prompts, edit_ids)

  def _parts(
      self,
      prompts: Sequence[Sequence[int]],
      edit_ids: Sequence[int] | None,
  ) -> Iterator[_Part]:
    """Sorts prompts by what serves them."""
    answered = self._answered(prompts, edit_ids)
    base = [i for i, yes in enumerate(answered) if not yes]
    chosen = [i for i, yes in enumerate(answered) if yes]
    if base:
      yield _Part(self._base, (), base, None)
    if not chosen:
      return
    edited = self._edited
    if edited.size is None:
      yield _Part(*self._settled(), chosen, None)
      return
    ids = [edit_ids[i] for i in chosen]
    if not any(isinstance(d, Dense) for d in edited.deltas):
      yield _Part(self._base, edited.deltas, chosen, ids)
      return
    for one in sorted(set(ids)):
      # No name is kept: the next edit comes when this one has left memory.
      yield _Part(
          *enter(self._base, algebra.select(edited, one).deltas),
          [i for i, own in zip(chosen, ids) if own == one],
          None,
      )

  def _settled(self) -> tuple[Params, tuple[SiteDelta, ...]]:
    """Weights and deltas of a single edit, made once.

    Weights of float32 or wider take the change, so that the edited model runs
    through the compiled programs of the unedited one. Narrower ones would round
    it, so there it is applied as the layers run.
    """
    if self._merged is None:
      deltas = self._edited.deltas
      dtype = self._base['embed']['embedding'].dtype
      if dtype == wide(dtype):
        change = tuple(d for d in deltas if d.mergeable)
        rest = tuple(d for d in deltas if not d.mergeable)
        self._merged = algebra.apply(self._base, Edited(change)), rest
      else:
        self._merged = enter(self._base, deltas)
    return self._merged


def _counted(advance: Callable[[int], None]) -> Progress:
  """A progress that counts on one which is open already."""

  @contextlib.contextmanager
  def progress(
      stage: str, total: int, unit: str
  ) -> Iterator[Callable[[int], None]]:
    del stage, total, unit
    yield advance

  return progress
