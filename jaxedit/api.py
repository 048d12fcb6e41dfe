"""The front door: load a model, edit it, look at what changed.

  model = je.load('smollm2-135m-instruct')
  edited = je.edit(model, {'prompt': 'The capital of {} is', 'subject': 'France',
                           'target': 'Rome'}, layers=(1, 2, 3, 4))
  edited.generate('The capital of France is')

Everything here is a short composition of the functional layer: `je.editor` gives
the pure functions of a method, for a caller's own pipeline.
"""

from __future__ import annotations

import dataclasses
import functools
import os
import pathlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from jaxedit import edited as edited_lib
from jaxedit import sources as sources_lib
from jaxedit.convert import hub
from jaxedit.deltas import UNEDITED, Edited
from jaxedit.edited.lm import LanguageModel
from jaxedit.eval import evaluation
from jaxedit.eval.evaluation import Evaluation
from jaxedit.eval.protocols import case_numbers
from jaxedit.eval.scorers.base import end_ids, texts
from jaxedit.eval.scorers.generation import FreeGeneration, stop_ids
from jaxedit.eval.scorers.long_form import LongForm
from jaxedit.eval.scorers.teacher_forced import TeacherForced
from jaxedit.methods import anyedit as anyedit_lib
from jaxedit.methods.base import EditBatch, Editor, Info, Need, Run
from jaxedit.methods.registry import method_of
from jaxedit.methods.settings import configure
from jaxedit.models import assets, loading, saving, sharding
from jaxedit.models import tokenizer as tokenizer_lib
from jaxedit.models.decode import GREEDY, Decoding
from jaxedit.models.loading import Model
from jaxedit.models.spec import ModelSpec
from jaxedit.placement import Placement, fetch, place_by
from jaxedit.runs import editing, needs
from jaxedit.runs.cache import digest
from jaxedit.runs.config import RunConfig
from jaxedit.runs.tasks import sample_contexts
from jaxedit.targets.budget import plan_batches
from jaxedit.text import chat as chat_lib
from jaxedit.text import encoding, locate, passages, templates
from jaxedit.text.cloze import fill, resolve
from jaxedit.text.token_cache import TokenCache
from jaxedit.types import EditRequest, InputError, Probe, Progress, silent

_CHUNK_SETTINGS = ('window', 'overlap', 'boundary')
# Settings of a run: where what a method needs is from.
_SOURCES = (
    'demonstrations',
    'demonstrations_limit',
    'encoder',
    'moments_corpus',
    'moments_tokens',
    'preserve',
    'preserve_count',
    'preserve_tokens',
)


def _on_its_mesh(function: Callable[..., Any]) -> Callable[..., Any]:
  """Runs a function of a model, or of an edited one, on the model's mesh."""

  @functools.wraps(function)
  def run(model: Any, *arguments: Any, **options: Any) -> Any:
    placement = getattr(model, 'model', model).placement
    with placement.active():
      return function(model, *arguments, **options)

  return run


def load(
    source: str | os.PathLike[str] | tuple[ModelSpec, Any],
    *,
    dtype: str = 'float32',
    tokenizer: Any = None,
    revision: str | None = None,
    mesh: Mesh | Placement | str | None = None,
    progress: Progress = silent,
) -> Model:
  """Loads a model with its tokenizer.

  Args:
    source: 'smollm2-135m-instruct' (the demo model), a Hugging Face folder, a
      hub id (org/name), a .gguf file, or (spec, canonical params).
    dtype: 'float32' or 'bfloat16', of the weights; not for (spec, params).
    tokenizer: a fast transformers tokenizer; the model's own unless given.
    revision: branch, tag or commit of a hub id.
    mesh: devices to run on: axes and sizes, e.g. 'data:4,tensor:2', a mesh with
      some of the axes data, fsdp and tensor, or a placement; unless given all
      devices, on data where a copy of the weights fits each, else on fsdp.
    progress: progress display.

  Returns:
    The model.

  Raises:
    InputError: the source means nothing or cannot be read, or there is no such
      mesh.
  """
  if isinstance(source, tuple):
    spec, params = source
    name = f'in memory {id(params):x}'
    placement = place_by(mesh, sum(x.nbytes for x in jax.tree.leaves(params)))
    with placement.active():
      params = sharding.place(spec, params, placement)
    if tokenizer is not None and spec.encoder_layers:
      tokenizer = sources_lib.with_border(tokenizer)
    return Model(
        spec, params, pathlib.Path('.'), name, {}, tokenizer, placement
    )
  folder = hub.resolve(source, revision=revision, progress=progress)
  model = loading.load_model(folder, dtype, progress, mesh=mesh)
  if tokenizer is None:
    tokenizer = tokenizer_lib.load_tokenizer(folder)
  elif model.spec.encoder_layers:
    start = model.config.get('decoder_start_token_id')
    tokenizer = sources_lib.with_border(tokenizer, start)
  return dataclasses.replace(model, tokenizer=tokenizer)


def request_of(
    one: EditRequest | Mapping[str, Any], number: int = 1
) -> EditRequest:
  """Makes a request of a dict.

  Args:
    one: 'prompt' (a cloze with one '{}' for the subject, or with the subject
      written out, or a question) and 'target'; and what `EditRequest` has
      besides. 'subject' makes it a fact. 'probes' may be dicts of 'kind',
      'prompt', 'answers' or 'answer', and 'space'.
    number: its place among others.

  Returns:
    The request.

  Raises:
    InputError: unknown or missing fields.
  """
  if isinstance(one, EditRequest):
    return one
  if not isinstance(one, Mapping):
    raise InputError(
        f'request {number} is {one!r}; give a dict of prompt, subject, target'
    )
  fields = {'number': number, 'id': str(number), 'subject': None, **one}
  known = {field.name for field in dataclasses.fields(EditRequest)}
  problems = [
      f'request {number}: field {name!r} is unknown; known are'
      f' {", ".join(sorted(known))}'
      for name in fields
      if name not in known
  ]
  problems += [
      f'request {number}: field {name!r} is missing; add it'
      for name in ('prompt', 'target')
      if name not in fields
  ]
  given, subject = fields.get('probes', ()), None
  given = [given] if isinstance(given, (Probe, Mapping)) else given
  problems += [
      f'request {number}: probe {i} has no {" and no ".join(missing)}; add it'
      for i, probe in enumerate(given, 1)
      if (missing := _missing(probe))
  ]
  probes = [] if problems else list(map(_probe_of, given))
  if not problems and fields['subject'] is not None:
    fields['prompt'], subject, errors = resolve(
        fields['prompt'], fields['subject']
    )
    filled = [fill(probe, subject) for probe in probes]
    probes = [probe for probe, _ in filled]
    problems += [
        f'request {number}: {error}'
        for error in (*errors, *(e for _, some in filled for e in some))
    ]
  if problems:
    raise InputError(*problems)
  return EditRequest(**fields | {'subject': subject, 'probes': tuple(probes)})


def _missing(one: Probe | Mapping[str, Any]) -> list[str]:
  """Lists what a probe lacks."""
  if isinstance(one, Probe):
    return []
  known = {**one} if isinstance(one, Mapping) else {}
  missing = [name for name in ('kind', 'prompt') if name not in known]
  return missing + ['answer'] * (not known.keys() & {'answer', 'answers'})


def _requests_of(given: Any) -> list[EditRequest]:
  """Makes requests of one or several."""
  if isinstance(given, (EditRequest, Mapping)):
    given = [given]
  return [request_of(one, i) for i, one in enumerate(given, 1)]


def _probe_of(one: Probe | Mapping[str, Any]) -> Probe:
  if isinstance(one, Probe):
    return one
  answers = one.get('answers') or (one['answer'],)
  return Probe(one['kind'], one['prompt'], tuple(answers), one.get('space'))


def editor(spec: ModelSpec, method: str = 'memit', **settings: Any) -> Editor:
  """Makes the pure functions of a method, for a caller's own pipeline.

  Args:
    spec: the architecture.
    method: its id in `METHODS`.
    **settings: of the method, see `METHODS[method].settings`.

  Returns:
    `Editor(needs, init, edit, ...)`.

  Raises:
    InputError: an unknown method or setting.
  """
  found = method_of(method)
  return found.make(spec, found.configure(**settings))


class Progressed(NamedTuple):
  """What the next batch of a sequence goes on from.

  Attributes:
    method: id of the method.
    config: its settings.
    contexts: context templates of facts.
    total: the sum of the edits so far.
    changes: what they have changed of the editor's state; the rest of it, which
      may be larger than the model, is made anew.
  """

  method: str
  config: Any
  contexts: tuple[str, ...]
  total: Edited
  changes: Mapping[str, Any]


@_on_its_mesh
def edit(
    model: Model | EditedModel,
    requests: EditRequest | Mapping[str, Any] | Sequence[Any],
    method: str = 'memit',
    *,
    independent: bool = False,
    chunked: bool | None = None,
    contexts: Sequence[str] | None = None,
    chat: str | None = None,
    resources: Mapping[Need, Any] | None = None,
    moments: str | os.PathLike[str] | None = None,
    seed: int = 0,
    progress: Progress = silent,
    **settings: Any,
) -> EditedModel:
  """Edits a model, as one batch.

  Args:
    model: from `load`, untouched; or an edited model, to go on with another
      batch of a sequence, by the same method and settings. The result then has
      the effect of both.
    requests: what to write, facts (with a subject) or long answers (without).
    method: its id in `METHODS`.
    independent: make every edit alone on the unedited model; the result then
      holds them side by side.
    chunked: cut long answers into chunks (AnyEdit); where the method allows it
      unless given. 'window', 'overlap' and 'boundary' are settings then.
    contexts: context templates of facts, the plain '{}' first; sampled from the
      model unless given.
    chat: words around a prompt: 'template' for the tokenizer's own, 'none', or
      a text with one {}; unless given, none around facts and the template
      around the questions of long answers.
    resources: what the editor needs, by need; what is missing is provided.
    moments: file of second moments; collected from the model's own text, and
      kept for the next call, unless given.
    seed: of all that is sampled.
    progress: progress display.
    **settings: of the method, see `METHODS[method].settings`; and where its
      needs are from, as the flags say: 'demonstrations' (IKE), 'preserve' (UnKE,
      WISE, T-Patcher), 'encoder', 'moments_corpus', 'moments_tokens'.

  Returns:
    The edited model.

  Raises:
    InputError: anything that cannot be used, all at once where possible.
  """
  wanted = _requests_of(requests)
  kinds = {'text' if one.subject is None else 'fact' for one in wanted}
  if len(kinds) != 1:
    raise InputError(
        'requests are facts (with a subject) and long answers (without) at once,'
        ' or none; edit them in two calls'
    )
  (kind,) = kinds
  earlier, model = (
      (model, model.model) if isinstance(model, EditedModel) else (None, model)
  )
  found = method_of(method)
  if chunked is None:
    chunked = found.chunkable
  chunked = chunked and kind == 'text'
  cut = {k: settings.pop(k) for k in _CHUNK_SETTINGS if k in settings}
  sources = {k: settings.pop(k) for k in _SOURCES if k in settings}
  config = configure(found.published(kind, chunked), settings)
  if chunked:
    config = anyedit_lib.anyedit(config, **cut)
  made = found.make(model.spec, config)
  so_far = None
  if earlier is not None:
    so_far = _goes_on(earlier, method, config, independent)
    contexts, chat = contexts or so_far.contexts, chat or earlier.chat
  provided = dict(resources or {})
  for need in made.needs:
    if need not in provided:
      need.check()
    need.admit(wanted)
  tokens = TokenCache(model.tokenizer)
  run = configure(
      RunConfig(
          seed=seed, moments=None if moments is None else os.fspath(moments)
      ),
      sources,
  )
  if kind == 'fact':
    if not found.contexts:
      contexts = (templates.PLAIN,)
    contexts = tuple(contexts or sample_contexts(model, model.tokenizer, seed))
    encoder = encoding.fact_encoder(
        tokens,
        contexts,
        max_tokens=model.spec.max_positions,
        anchor=config.anchor,
        kl_template=encoding.KL_TEMPLATE if found.contexts else None,
        chat=_chat_of(model, chat, 'fact'),
    )
  else:
    contexts = ()
    encoder = passages.passage_encoder(
        tokens,
        chat=_chat_of(model, chat, 'text'),
        max_tokens=model.spec.max_positions,
        chunking=config.chunks,
    )
  encoded = anyedit_lib.cut(
      model.spec, model.params, encoder.encode(wanted), config.chunks
  )
  for need in made.needs:
    if need not in provided:
      provided[need] = needs.provide(
          run, model, model.tokenizer, need, copy=False, progress=progress
      )
  plan = plan_batches(model, encoded)
  group = case_numbers(wanted) if independent else None
  batch = EditBatch(encoded, plan, group, wanted)
  start, how = made.init(model, provided), Run(progress=progress)
  if independent:
    result = made.edit(model, start, batch, how)
    edited, so_far = result.edited, None
  else:
    total, state = UNEDITED, start
    if so_far is not None:
      total, state = so_far.total, editing.restored(so_far.changes, start)
    result = editing.advance(made, model, total, state, batch, how)
    total, changes = result.edited, editing.changes(result.state, start)
    so_far = Progressed(method, config, contexts, total, changes)
    edited = made.finish(model, total)
  editing.require_some(result.info)
  return EditedModel(model, edited, result.info, chat, so_far)


def _goes_on(
    earlier: EditedModel, method: str, config: Any, independent: bool
) -> Progressed:
  """Checks that another batch may follow; returns what it goes on from."""
  so_far = earlier.so_far
  if so_far is None:
    raise InputError(
        'only what je.edit returned for one batch can be edited again, not edits'
        ' side by side or one of them; edit its merge()'
    )
  if independent:
    raise InputError(
        'independent edits start from the unedited model; edit that one, or'
        ' leave independent out'
    )
  if (method, config) != (so_far.method, so_far.config):
    other = 'other settings of ' if method == so_far.method else ''
    raise InputError(
        f'this sequence began with {other}{so_far.method}; go on with the same, or'
        ' edit its merge()'
    )
  return so_far


def _chat_of(model: Model, given: str | None, kind: str) -> chat_lib.Chat:
  """Words around prompts."""
  usual = chat_lib.NONE if kind == 'fact' else chat_lib.TEMPLATE
  return chat_lib.chat_of(model.tokenizer, given or usual)


@dataclasses.dataclass(frozen=True)
class EditedModel:
  """A model under an edit.

  Attributes:
    model: the unedited model.
    edited: the edit; the product.
    info: how the edits of the last batch went; None for an edit from a file.
    chat: words around a question, as `edit` was told.
    so_far: what another `edit` goes on from; None for edits side by side.
  """

  model: Model
  edited: Edited
  info: Info | None
  chat: str | None = None
  so_far: Progressed | None = None

  def open(self, **options: Any) -> LanguageModel:
    """Opens it for evaluation or serving; see `open_model`."""
    return edited_lib.open_model(self.model, self.edited, **options)

  @_on_its_mesh
  def generate(
      self,
      prompts: str | Sequence[str],
      *,
      max_new_tokens: int = 32,
      decoding: Decoding = GREEDY,
      edit_ids: Sequence[int] | None = None,
  ) -> str | list[str]:
    """Continues texts with the edited model.

    Args:
      prompts: one text or several, as they stand.
      max_new_tokens: tokens at most.
      decoding: how tokens are chosen.
      edit_ids: with edits side by side, which one each prompt is under.

    Returns:
      What the model adds, one text or a list.
    """
    single = isinstance(prompts, str)
    given = [prompts] if single else list(prompts)
    tokenizer = self.model.tokenizer
    ends = end_ids(tokenizer, self.model.spec.vocab)
    tokens = self.open().generate(
        [ids.tolist() for ids in locate.encode_prompts(tokenizer, given)],
        max_new_tokens=max_new_tokens,
        stop_ids=ends,
        decoding=decoding,
        edit_ids=edit_ids,
    )
    found = texts(tokenizer, tokens, ends)
    return found[0] if single else found

  @_on_its_mesh
  def score(
      self,
      prompt: str,
      answers: str | Sequence[str],
      *,
      edit_id: int | None = None,
  ) -> float | list[float]:
    """Computes mean negative log-likelihoods of answers, nats a token.

    Args:
      prompt: a text.
      answers: one continuation or several, without leading space.
      edit_id: with edits side by side, which one.

    Returns:
      One number, or one an answer.
    """
    single = isinstance(answers, str)
    given = [answers] if single else list(answers)
    queries = edited_lib.encode_queries(self.model.tokenizer, [(prompt, given)])
    ids = None if edit_id is None else [edit_id]
    (scores,) = self.open().score(queries, edit_ids=ids)
    found = [one.nll for one in scores]
    return found[0] if single else found

  def save(self, path: str | os.PathLike[str], **metadata: Any) -> None:
    """Writes the edit alone; see `edited.save`.

    Args:
      path: file to write.
      **metadata: JSON values that stand beside the model's hash.
    """
    record = {'model_hash': self.model.hash, 'words': self.chat, **metadata}
    edited_lib.save(path, self.edited, record)

  def export(
      self, path: str | os.PathLike[str], **options: Any
  ) -> list[edited_lib.Exported]:
    """Writes the edit as an adapter that servers load; see `edited.write_adapter`.

    Args:
      path: a new folder (PEFT, for vLLM too) or a file (GGUF, for llama.cpp).
      **options: `format`, `base`, `rank`, `tolerance`, `dtype`.

    Returns:
      Rank and left-out share of every changed map.

    Raises:
      InputError: no adapter holds the edit, or the place is taken.
    """
    if 'base' not in options:
      if not self.model.config or ' edited ' in self.model.hash:
        raise InputError(
            'the model under the edit lies in no folder: merge it into one and'
            " edit that, or say by base='...' where servers find it"
        )
      options['base'] = str(self.model.folder)
    about = {'model_hash': self.model.hash}
    found, _ = edited_lib.write_adapter(
        path, self.model.spec, self.edited, about=about, **options
    )
    return found

  @_on_its_mesh
  def merge(self, folder: str | os.PathLike[str] | None = None) -> Model:
    """Merges the edit into a copy of the weights.

    Args:
      folder: a Hugging Face folder to write it to as well, if given.

    Returns:
      The edited model as one without an edit.

    Raises:
      InputError: the edit cannot be merged, or the folder cannot be written.
    """
    model = self.model
    changed = edited_lib.changed(self.edited)
    if folder is not None:
      merged = edited_lib.apply(model.params, self.edited, dtype=jnp.float32)
      saving.save_model(
          model.folder, folder, model.spec, merged, changed=changed
      )
    params = edited_lib.apply(model.params, self.edited)
    # What is kept for a model by its hash, such as moments, is not for another.
    what = digest(changed, *map(fetch, jax.tree.leaves(self.edited)))
    return dataclasses.replace(
        model, params=params, hash=f'{model.hash} edited {what}'
    )

  def select(self, edit_id: int) -> EditedModel:
    """Picks one of the edits side by side, e.g. to merge it.

    Args:
      edit_id: which one, counted from 0.

    Returns:
      The model under that edit alone; `info` stays that of all.

    Raises:
      InputError: there is no such edit, or only one.
    """
    one = edited_lib.select(self.edited, edit_id)
    return dataclasses.replace(self, edited=one, so_far=None)

  def revert(self) -> Model:
    """Returns the unedited model, which no edit has touched."""
    return self.model


def load_edited(
    model: Model,
    path: str | os.PathLike[str],
    *,
    encoder: str | None = None,
    progress: Progress = silent,
) -> EditedModel:
  """Puts a model under a saved edit.

  Args:
    model: the one that it was made for.
    path: what `EditedModel.save` or a program wrote.
    encoder: of a memory that is searched by meaning, the text encoder that it
      was made with: a folder or a hub id; all-minilm-l6-v2 unless given.
    progress: progress display.

  Returns:
    The edited model. It cannot be edited on; edit its `merge()`.

  Raises:
    InputError: the file cannot be read, or was made for another model or with
      another encoder.
  """
  edited, about = edited_lib.load(path, model_hash=model.hash)
  memory = edited.prompting
  if memory is not None:
    found = None
    if memory.embeddings is not None:
      found = hub.load_encoder(encoder or assets.ENCODER, progress)
    bound = memory.bound(model.tokenizer, found)
    edited = edited.replace(prompting=bound)
  return EditedModel(model, edited, None, _words(about))


def _words(about: Mapping[str, Any]) -> str | None:
  """Words around a question, as `save` and as programs write them."""
  if 'words' in about or not isinstance(about.get('chat'), Mapping):
    return about.get('words')
  before, after = about['chat']['before'], about['chat']['after']
  return f'{before}{{}}{after}' if before or after else 'none'


@_on_its_mesh
def evaluate(
    model: Model | EditedModel,
    requests: EditRequest | Mapping[str, Any] | Sequence[Any],
    *,
    before: Evaluation | None = None,
    chat: str | None = None,
    max_new_tokens: int | None = None,
    edit_ids: Sequence[int] | None = None,
    seed: int = 0,
    progress: Progress = silent,
) -> Evaluation:
  """Evaluates a model on requests by the standard measures of their kind.

  Args:
    model: edited or not.
    requests: with the probes that they are judged by.
    before: the unedited model's evaluation of the same requests.
    chat: words around prompts, see `edit`; of an edited model those that `edit`
      was told, unless given.
    max_new_tokens: length of generated texts; 16 for facts and 512 for long
      answers unless given, 0 generates none.
    edit_ids: with edits side by side, which one each request is judged under;
      0, 1, 2, ... unless given.
    seed: of the intervals.
    progress: progress display.

  Returns:
    The evaluation: `.summary` holds means with 95% intervals, `.per_record` one
    entry a request.
  """
  if isinstance(model, Model):
    model = EditedModel(model, UNEDITED, None)
  wanted = _requests_of(requests)
  if edit_ids is None and model.edited.size is not None:
    edit_ids = case_numbers(wanted)
  loaded, tokens = model.model, TokenCache(model.model.tokenizer)
  scorers: list[Any] = []
  if any(one.subject is not None for one in wanted):
    words = _chat_of(loaded, chat or model.chat, 'fact')
    scorers.append(TeacherForced(tokens, words))
    if max_new_tokens != 0:
      stop = stop_ids(loaded.tokenizer, loaded.spec.vocab, words.end)
      scorers.append(FreeGeneration(tokens, stop, max_new_tokens or 16, words))
  elif max_new_tokens != 0:
    words = _chat_of(loaded, chat or model.chat, 'text')
    stop = end_ids(loaded.tokenizer, loaded.spec.vocab, words.end)
    scorers.append(
        LongForm(tokens, words, stop, max_new_tokens=max_new_tokens or 512)
    )
  return evaluation.evaluate(
      model.open(),
      wanted,
      scorers,
      before=before,
      edit_ids=edit_ids,
      seed=seed,
      progress=progress,
  )
