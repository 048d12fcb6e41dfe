"""The one interface to an edited model.

  open_model(model, edited) -> LanguageModel with `score` and `generate`

Evaluation, serving and tracing use a `LanguageModel` and never ask which method
made the edit. Only this module decides

  * whether a change of weights is merged (weights of float32 or wider) or applied
    as the layers run (narrower ones, which merging would round);
  * whether edits side by side run as sequences of one batch, or one edit after
    the other (those that change whole matrices);
  * what prompting and routing rules do to a prompt before the model reads it; a
    rule of several rounds generates here, before scores as before texts.

`apply_model` is the pure function below it, for a caller's own jit, grad and mesh.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple, Protocol

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
      stop_texts: Sequence[Sequence[str]] | None = None,
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
      stop_texts: of each prompt, strings that end its text; see
        `models.stop_texts`.
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
    InputError: the edit does not fit the model, or `batch_size` is below 1.
  """
  check(model.spec, model.params, edited)
  if batch_size < 1:
    raise InputError(f'batch_size is {batch_size}; it must be at least 1')
  if edited.prompting is not None:
    edited = edited.replace(prompting=edited.prompting.bound(model.tokenizer))
  return _EditedModel(model, edited, batch_size)


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
    InputError: the edit rewrites or routes prompts, `edit_ids` does not go with
      it, or edits side by side change a bias or a scale.
  """
  if edited.rules:
    raise InputError(
        f'the edit has {" and ".join(edited.rules)}, which no pure function of'
        ' tokens follows; use `open_model`'
    )
  if (edited.size is None) != (edit_ids is None):
    raise InputError(_edit_ids_error(edited.size))
  if edited.size is not None and any(map(_is_small, edited.deltas)):
    raise InputError(
        'edits side by side change biases or scales, which are merged before a'
        ' run; `select` one of them or use `open_model`'
    )
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
    wider so that nothing is rounded; the other deltas, changes of weights
    first).
  """
  dtype = wide(params['embed']['embedding'].dtype)
  for delta in filter(_is_small, deltas):
    params = algebra.apply(params, Edited((delta,)), dtype=dtype)
  rest = [d for d in deltas if not _is_small(d)]
  return params, tuple(sorted(rest, key=lambda d: not d.mergeable))


def _edit_ids_error(size: int | None) -> str:
  """Says why `edit_ids` must be given, or must not."""
  if size is None:
    return 'edit_ids are given where no edits lie side by side: leave them out'
  return (
      f'{size} independent edits lie side by side: let edit_ids say which of'
      f' them, 0 to {size - 1}, each prompt is under'
  )


def _is_small(delta: SiteDelta) -> bool:
  """Whether it changes a bias or a scale."""
  return isinstance(delta, Dense) and delta.leaf != 'kernel'


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
    problems += [
        f'{name}: {problem}; load the model it was made for'
        for problem in _misfits(spec, params, delta, edited.size)
    ]
  if problems:
    raise InputError(*problems)


def _misfits(
    spec: ModelSpec, params: Params, delta: SiteDelta, size: int | None
) -> Iterator[str]:
  """Says what of a model a delta does not fit."""
  if list(delta.layers) != sorted(set(delta.layers) & {*range(spec.layers)}):
    yield (
        f'its layers are {list(delta.layers)}, where some of 0 to'
        f' {spec.layers - 1} are expected in ascending order'
    )
  leaf = _leaf(params, delta)
  if leaf is not None:
    widths = leaf.shape[1:]
    if min(delta.layers) < spec.layers - len(leaf):
      yield (
          f'it changes {delta.site} of layer {min(delta.layers)}, where the'
          f' layers from {spec.layers - len(leaf)} on alone have it'
      )
  elif delta.site in OUTPUT_SITES and not delta.mergeable:
    widths = (spec.width, spec.width)
  else:
    yield f'the model has no {algebra.path(delta)}'
    return
  names = ('in', 'out') if len(widths) == 2 else ('size',)
  known = {'n': len(delta.layers), 'E': size, **dict(zip(names, widths))}
  for name, axes in delta.axes.items():
    axes = [*(('n',) if size is None else ('n', 'E')), *axes.split()]
    shape = getattr(delta, name).shape
    pairs = list(zip(axes, shape))
    if len(axes) != len(shape) or any(
        known.setdefault(axis, length) != length for axis, length in pairs
    ):
      wanted = ', '.join(str(known.get(axis, axis)) for axis in axes)
      yield f'{name!r} has shape {list(shape)}, where [{wanted}] is expected'
    elif delta.chooses and 0 in shape:
      yield f'{name!r} has shape {list(shape)}: there is nothing to choose from'


def _leaf(params: Params, delta: SiteDelta) -> Array | None:
  """The stacked parameter that a delta is of."""
  found: Any = params
  for name in algebra.path(delta).split('/'):
    if not isinstance(found, Mapping) or name not in found:
      return None
    found = found[name]
  return found


class _Read(NamedTuple):
  """Prompts as the model reads them."""

  prompts: Sequence[Sequence[int]]
  answered: Sequence[bool]  # by the edited model
  problems: list[str]


class _Part(NamedTuple):
  """Prompts that one set of weights and deltas serves."""

  params: Params
  deltas: tuple[SiteDelta, ...]
  index: list[int]  # which of all prompts
  edit_ids: list[int] | None


class _EditedModel:
  """See `open_model`."""

  def __init__(self, model: Model, edited: Edited, batch_size: int):
    self.spec = model.spec
    # A memory brings the model's tokenizer where the model was loaded without.
    own = getattr(edited.prompting, 'tokenizer', None)
    self._tokenizer = model.tokenizer or own
    self._base, self._edited = model.params, edited
    self._batch_size = batch_size
    self._merged: tuple[Params, tuple[SiteDelta, ...]] | None = None

  def score(self, queries, *, edit_ids=None, progress=silent):
    prompts = [query.prompt for query in queries]
    read = self._read(prompts, edit_ids, progress)
    asked = [Query(tuple(p), q.answers) for p, q in zip(read.prompts, queries)]
    advice = 'shorten them'
    if self._edited.prompting is not None:
      advice += ', or let fewer facts or demonstrations be read before them'
      advice += ' (--demonstration_count)'
    scoring.check(self.spec, asked, more=read.problems, advice=advice)
    results: list[Any] = [None] * len(asked)
    with progress('score', len(asked), 'prompt') as advance:
      for part in self._parts(read.answered, edit_ids):
        some = [asked[i] for i in part.index]
        groups = [(query, [i]) for i, query in enumerate(some)]
        # Contexts are long and many prompts share one: it is run once.
        if self._edited.prompting is not None and part.edit_ids is None:
          groups = scoring.branched(some)
        found = scoring.score(
            self.spec,
            part.params,
            part.deltas,
            [query for query, _ in groups],
            edit_ids=part.edit_ids,
            batch_size=self._batch_size,
            progress=counted(advance),
        )
        for (_, members), scores in zip(groups, found):
          rest = iter(scores)
          for i in members:
            results[part.index[i]] = [next(rest) for _ in some[i].answers]
    return results

  def generate(
      self,
      prompts,
      *,
      max_new_tokens,
      stop_ids=(),
      decoding=GREEDY,
      streams=None,
      stop_texts=None,
      edit_ids=None,
      progress=silent,
  ):
    read = self._read(prompts, edit_ids, progress)
    settings = dict(
        max_new_tokens=max_new_tokens,
        stop_ids=stop_ids,
        batch_size=self._batch_size,
    )
    decode.refuse_faulty(
        self.spec,
        read.prompts,
        decoding=decoding,
        streams=streams,
        stop_texts=stop_texts,
        more=read.problems,
        **settings,
    )
    return self._continued(
        read,
        edit_ids,
        streams=range(len(prompts)) if streams is None else streams,
        stop_texts=stop_texts or [()] * len(prompts),
        progress=progress,
        **settings,
        **decoding._asdict(),
    )

  def _continued(
      self,
      read: _Read,
      edit_ids: Sequence[int] | None,
      *,
      streams: Sequence[int],
      stop_texts: Sequence[Sequence[str]],
      progress: Progress,
      **settings: Any,
  ) -> list[list[int]]:
    """Continues prompts that were read and checked; see `decode.generate`."""
    results: list[list[int]] = [[] for _ in read.prompts]
    with progress('generate', len(results), 'text') as advance:
      for part in self._parts(read.answered, edit_ids):
        found = decode.generate(
            self.spec,
            part.params,
            [read.prompts[i] for i in part.index],
            deltas=part.deltas,
            edit_ids=part.edit_ids,
            streams=[streams[i] for i in part.index],
            stop_texts=[stop_texts[i] for i in part.index],
            tokenizer=self._tokenizer,
            share=self._edited.prompting is not None,
            progress=counted(advance),
            **settings,
        )
        for i, one in zip(part.index, found):
          results[i] = one
    return results

  def _read(
      self,
      prompts: Sequence[Sequence[int]],
      edit_ids: Sequence[int] | None,
      progress: Progress,
  ) -> _Read:
    """Applies the rules of the edit to prompts."""
    edited, everything = self._edited, [True] * len(prompts)
    if problems := self._problems(len(prompts), edit_ids):
      return _Read(prompts, everything, problems)
    answered = everything
    if edited.routing is not None:
      answered = edited.routing.applies(prompts, edit_ids)
    read = list(prompts)
    if edited.prompting is not None:
      chosen = [i for i, yes in enumerate(answered) if yes]
      ids = None if edit_ids is None else [edit_ids[i] for i in chosen]
      some = [prompts[i] for i in chosen]
      speak = _Speaker(self, ids, progress)
      found = edited.prompting.rewrite(some, ids, speak)
      routes = edited.prompting.routes
      answered = list(answered)
      for i, prompt in zip(chosen, found, strict=True):
        answered[i] = not routes or list(prompt) != list(prompts[i])
        read[i] = prompt
    return _Read(read, answered, [])

  def _problems(
      self, prompts: int, edit_ids: Sequence[int] | None
  ) -> list[str]:
    """Says what is wrong with `edit_ids`."""
    size = self._edited.size
    if (size is None) != (edit_ids is None):
      return [_edit_ids_error(size)]
    if size is None:
      return []
    problems = []
    if len(edit_ids) != prompts:
      problems.append(f'edit_ids has {len(edit_ids)} entries for {prompts}')
    if strange := sorted({i for i in edit_ids if not 0 <= i < size}):
      problems.append(
          f'edit_ids has {strange[0]}; the model has edits 0 to {size - 1}'
      )
    return problems

  def _parts(
      self, answered: Sequence[bool], edit_ids: Sequence[int] | None
  ) -> Iterator[_Part]:
    """Sorts prompts by what serves them."""
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
    if not edited.deltas:
      yield _Part(self._base, (), chosen, None)
      return
    ids = [edit_ids[i] for i in chosen]
    if not any(isinstance(d, Dense) for d in edited.deltas):
      yield _Part(*enter(self._base, edited.deltas), chosen, ids)
      return
    unruled = Edited(edited.deltas, size=edited.size)
    for one in sorted(set(ids)):
      # No name is kept: the next edit comes when this one has left memory.
      yield _Part(
          *enter(self._base, algebra.select(unruled, one).deltas),
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


class _Speaker(NamedTuple):
  """How a rule generates, under the deltas of each text's edit."""

  lm: _EditedModel
  edit_ids: Sequence[int] | None
  progress: Progress

  @property
  def most(self) -> int:
    return self.lm.spec.max_positions

  def __call__(self, texts, which, *, max_new_tokens, stop_ids, stop_texts):
    ids = self.edit_ids
    # pylint: disable-next=protected-access
    return self.lm._continued(
        _Read(texts, [True] * len(texts), []),
        None if ids is None else [ids[i] for i in which],
        streams=range(len(texts)),
        stop_texts=[stop_texts] * len(texts),
        progress=self.progress,
        max_new_tokens=max_new_tokens,
        stop_ids=stop_ids,
        batch_size=self.lm._batch_size,
    )


def counted(advance: Callable[[int], None]) -> Progress:
  """A progress that counts on one which is open already."""

  @contextlib.contextmanager
  def progress(
      stage: str, total: int, unit: str
  ) -> Iterator[Callable[[int], None]]:
    del stage, total, unit
    yield advance

  return progress
