"""The stages of an editing run, as functions that programs compose.

  prepare -> edit (sequential batches, or independent ones) -> judge -> write

Nothing here reads a flag. Stages take a `types.Progress`; programs time
them with `Clock`.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import hashlib
import operator
import pathlib
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import logging

from experiments import collect_moments, common
from jaxedit import delta as delta_lib
from jaxedit import values
from jaxedit.edit.base import Editor, Info
from jaxedit.edit.closed_form import Recipe
from jaxedit.eval import datasets, generation, harness, perplexity
from jaxedit.models import decode, loading, saving
from jaxedit.models.spec import ModelSpec
from jaxedit.stats import corpora, storage
from jaxedit.stats import moments as moments_lib
from jaxedit.text import batching, seating, templates
from jaxedit.types import Edited, InputError, Progress, Record

# Tokens that a sampled context and its full stop may add to a prompt.
_CONTEXT_TOKENS = 16
_PERPLEXITY_ROW = 512  # tokens a window


class Clock:
  """Adds up wall seconds by stage."""

  def __init__(self):
    self.seconds: dict[str, float] = {}

  @contextlib.contextmanager
  def __call__(self, stage: str) -> Iterator[None]:
    begin = time.monotonic()
    try:
      yield
    finally:
      self.add({stage: time.monotonic() - begin})

  def add(self, seconds: Mapping[str, float]) -> None:
    """Adds seconds measured elsewhere."""
    for stage, value in seconds.items():
      self.seconds[stage] = self.seconds.get(stage, 0.0) + value


@dataclasses.dataclass(frozen=True)
class Workbench:
  """What every stage works on.

  Attributes:
    model: the unedited model; never changed.
    tokenizer: its tokenizer.
    loaded: the records to edit.
    templates: context templates, the bare '{}' first.
    batch_size: edits a batch.
    anchor: the edited token, as the method has it.
    slots: edits optimised side by side; None for as many as are of use and
      have room in memory.
  """

  model: loading.Model
  tokenizer: Any
  loaded: datasets.Loaded
  templates: tuple[str, ...]
  batch_size: int
  slots: int | None
  anchor: str = 'subject_last'

  @property
  def records(self) -> Sequence[Record]:
    return self.loaded.records

  def batches(self) -> list[list[int]]:
    """Indices of the records of every batch."""
    count, size = len(self.records), self.batch_size
    return [list(range(i, min(i + size, count))) for i in range(0, count, size)]

  @functools.cached_property
  def encoded(self) -> list[batching.EncodedEdit]:
    """All records under the templates.

    Raises:
      InputError: records that are too long under them, all at once.
    """
    return batching.encode_edits(
        self.tokenizer,
        self.records,
        self.templates,
        max_tokens=self.model.spec.max_positions,
        anchor=self.anchor,
    )

  @functools.cached_property
  def frame(self) -> seating.Frame:
    """The static shapes that all batches share."""
    return values.frame_for(
        self.model.spec,
        self.model.params,
        self.encoded,
        slots=self.slots,
        batch=self.batch_size,
    )

  def edits(self, indices: Sequence[int]) -> list[batching.EncodedEdit]:
    """Some records, encoded."""
    return [self.encoded[i] for i in indices]


@dataclasses.dataclass(frozen=True)
class Outcome:
  """What editing gave.

  Attributes:
    edited: the change; of independent batches, [n, batches, M, .] factors.
    owner: batch of every record, for independent batches, else None.
    info: of all records together.
  """

  edited: Edited
  owner: tuple[int, ...] | None
  info: Info


def record_check(
    tokenizer: Any,
    spec: ModelSpec,
    *,
    contexts: Sequence[str],
    max_new_tokens: int,
    anchor: str = 'subject_last',
) -> Callable[[Record], list[str]]:
  """Makes the check of a loader: all that editing or judging would refuse.

  Args:
    tokenizer: of the model.
    spec: the architecture.
    contexts: context templates; empty if they are sampled later, for which
      some room is left.
    max_new_tokens: length of generated texts, tokens.
    anchor: the edited token.

  Returns:
    record -> sentences that do not name the record.
  """
  edit = batching.edit_check(
      tokenizer,
      contexts or (templates.BARE,),
      max_tokens=spec.max_positions - (0 if contexts else _CONTEXT_TOKENS),
      anchor=anchor,
  )
  evaluation = harness.record_check(
      spec, tokenizer, max_new_tokens=max_new_tokens
  )
  # What both find is told once, by the one that says more.
  return lambda record: edit(record) or evaluation(record)


def sample_templates(
    model: loading.Model, tokenizer: Any, seed: int
) -> tuple[str, ...]:
  """Draws context templates from the model itself, as MEMIT does (top 5).

  Args:
    model: the unedited model.
    tokenizer: its tokenizer.
    seed: of the draw.

  Returns:
    The bare '{}' and five sampled templates.
  """

  def sample(prompts: list[str], seed: int, length: int) -> list[str]:
    starts = [tokenizer(prompt)['input_ids'] for prompt in prompts]
    texts = decode.generate(
        model.spec,
        model.params,
        starts,
        max_new_tokens=length - min(map(len, starts)),
        temperature=1.0,
        top_k=5,
        seed=seed,
    )
    whole = [(s + t)[:length] for s, t in zip(starts, texts)]
    return tokenizer.batch_decode(whole, skip_special_tokens=True)

  return templates.sample_templates(
      sample, seed=seed, special_tokens=tokenizer.all_special_tokens
  )


def check_moments(path: str, recipe: Recipe) -> None:
  """Refuses what `load_moments` would, as far as needs no model.

  Args:
    path: as for `load_moments`.
    recipe: the method.

  Raises:
    InputError: the file is missing, cut short, or lacks a layer.
  """
  if not pathlib.Path(path).is_dir():
    storage.check(path, layers=recipe.layers, site=recipe.site)


def load_moments(
    model: loading.Model, recipe: Recipe, path: str | pathlib.Path
) -> moments_lib.Moments:
  """Loads the second moments of the layers to edit.

  Args:
    model: the model they must be of.
    recipe: the method.
    path: a file of collect_moments, or a folder of published .npz files.

  Returns:
    The moments.

  Raises:
    InputError: the file is damaged, of another model, or lacks a layer.
  """
  if not pathlib.Path(path).is_dir():
    return moments_lib.load(
        path, model_hash=model.hash, layers=recipe.layers, site=recipe.site
    )
  return moments_lib.load_npz(
      path,
      layers=recipe.layers,
      width=moments_lib.key_width(model.spec, recipe.site),
      model_hash=model.hash,
      site=recipe.site,
  )


def collect(
    bench: Workbench,
    recipe: Recipe,
    *,
    corpus: str,
    tokens: int | None,
    seed: int,
    folder: pathlib.Path,
    progress: Progress,
) -> moments_lib.Moments:
  """Collects second moments, unless an earlier run has done so.

  Args:
    bench: what to work on.
    recipe: the method; its layers are needed.
    corpus: text to collect from, see `stats.corpora`.
    tokens: how many, or None for 20 a key dimension.
    seed: of the text.
    folder: the moments appear here too, as moments.safetensors.
    progress: progress display.

  Returns:
    The moments.

  Raises:
    InputError: the corpus cannot be read, or the cache cannot be used.
  """
  model = bench.model
  kept = _place(model, recipe, (corpora.fingerprint(corpus), tokens, seed))
  try:
    found = load_moments(model, recipe, kept)
  except InputError:  # not there yet, or damaged
    config = collect_moments.Config(
        layers=recipe.layers,
        out=kept,
        corpus=corpus,
        tokens=tokens,
        seed=seed,
        site=recipe.site,
        overwrite=True,
    )
    report = collect_moments.collect(config, model, bench.tokenizer, progress)
    for warning in report.warnings():
      logging.warning(warning)
    found = load_moments(model, recipe, kept)
  common.link(kept, folder / 'moments.safetensors')
  return found


def _place(
    model: loading.Model, recipe: Recipe, sample: tuple[Any, ...]
) -> pathlib.Path:
  """Names a cached file by all that its moments depend on; makes its folder."""
  dtype = model.params['embed']['embedding'].dtype.name
  what = (
      (model.hash, model.spec, dtype),
      (recipe.layers, recipe.site),
      sample,
  )
  name = hashlib.sha256(repr(what).encode()).hexdigest()
  folder = common.cache_dir() / 'moments'
  try:
    folder.mkdir(parents=True, exist_ok=True)
  except OSError as e:
    raise InputError(
        f'{folder}: second moments cannot be kept there ({e.strerror}); let'
        ' JAXEDIT_CACHE name another folder'
    ) from e
  return folder / f'{name[:24]}.safetensors'


def edit_in_sequence(
    bench: Workbench, editor: Editor, state: Any, progress: Progress
) -> Outcome:
  """Edits batch after batch, each on the model that the last one left.

  Args:
    bench: what to work on.
    editor: the method.
    state: what its `init` returned.
    progress: progress display.

  Returns:
    The sum of all changes.
  """
  params, total, infos = bench.model.params, Edited(), []
  batches = bench.batches()
  for i, indices in enumerate(batches):
    edited, state, info = editor.edit(
        params,
        state,
        bench.edits(indices),
        frame=bench.frame,
        progress=progress,
    )
    total = delta_lib.add(total, edited)
    infos.append(info)
    if i + 1 < len(batches):
      # From the base each time: bf16 weights are rounded once in all.
      params = delta_lib.apply(bench.model.params, total)
  total = Edited(deltas=tuple(delta_lib.compact(d) for d in total.deltas))
  return Outcome(total, None, _join(infos))


def edit_apart(
    bench: Workbench, editor: Editor, state: Any, progress: Progress
) -> Outcome:
  """Edits batches that know nothing of each other.

  Args:
    bench: what to work on.
    editor: the method.
    state: what its `init` returned; every batch starts from it.
    progress: progress display.

  Returns:
    The changes side by side, one a batch.
  """
  batches = bench.batches()
  if bench.batch_size == 1:
    whole = dataclasses.replace(bench, batch_size=len(bench.records))
    edited, _, info = editor.edit_each(
        bench.model.params,
        state,
        whole.encoded,
        frame=whole.frame,
        progress=progress,
    )
    return Outcome(edited, tuple(range(len(bench.records))), info)
  edits, infos = [], []
  for indices in batches:
    edited, _, info = editor.edit(
        bench.model.params,
        state,
        bench.edits(indices),
        frame=bench.frame,
        progress=progress,
    )
    edits.append(edited)
    infos.append(info)
  rank = max(edited.deltas[0].key.shape[1] for edited in edits)
  edits = [_pad(edited, rank) for edited in edits]
  owner = tuple(b for b, indices in enumerate(batches) for _ in indices)
  return Outcome(delta_lib.stack(edits), owner, _join(infos))


def _pad(edited: Edited, rank: int) -> Edited:
  """Fills factors with zero rows, so that batches of any size stack."""
  grow = lambda x: jnp.pad(x, ((0, 0), (0, rank - x.shape[1]), (0, 0)))
  return jax.tree.map(grow, edited)


def _join(infos: Sequence[Info]) -> Info:
  """Puts the reports of batches end to end."""
  seconds: dict[str, float] = {}
  for info in infos:
    for stage, value in info.seconds.items():
      seconds[stage] = seconds.get(stage, 0.0) + value
  return Info(
      jax.tree.map(lambda *x: np.concatenate(x), *(i.targets for i in infos)),
      np.concatenate([i.written for i in infos]),
      np.concatenate([i.distance for i in infos], axis=1),
      seconds,
      functools.reduce(operator.add, (i.work for i in infos)),
  )


def replace_model(bench: Workbench, model: loading.Model) -> Workbench:
  """The same records and tokenizer on another model."""
  return dataclasses.replace(bench, model=model)


def judge(
    bench: Workbench,
    outcome: Outcome | None,
    base: harness.Evaluation | None,
    **settings: Any,
) -> harness.Evaluation:
  """Evaluates the edited model, or the unedited one.

  Args:
    bench: what to work on.
    outcome: what editing gave; None for the unedited model.
    base: the unedited model's evaluation.
    **settings: of `harness.evaluate`.

  Returns:
    The evaluation of all records, each under the change it belongs to.
  """
  evaluate = lambda edited, records, base, **more: harness.evaluate(
      bench.model.spec,
      bench.model.params,
      edited,
      records,
      bench.tokenizer,
      base=base,
      **settings,
      **more,
  )
  if outcome is None:
    return evaluate(Edited(), bench.records, base)
  if outcome.owner is None:
    return evaluate(outcome.edited, bench.records, base)
  if bench.batch_size == 1:
    stack = dict(stack=outcome.edited, owner=outcome.owner)
    return evaluate(Edited(), bench.records, base, **stack)
  # A change of many facts a row would not fit; one a batch is shared by its rows.
  parts = [
      evaluate(
          delta_lib.one(outcome.edited, batch),
          [bench.records[i] for i in indices],
          harness.select(base, indices) if base else None,
      )
      for batch, indices in enumerate(bench.batches())
  ]
  return harness.join(parts, seed=settings.get('seed', 0))


def knowledge(
    evaluation: harness.Evaluation,
) -> dict[str, float]:
  """What the unedited model knows of the facts to be overwritten.

  Args:
    evaluation: of the unedited model.

  Returns:
    'prefers_true' and 'completes_true', fractions of the records with a true
    object; empty where there are none.
  """
  summary = evaluation.summary
  names = {'prefers_true': 'true_preferred', 'completes_true': 'true_acc'}
  return {
      name: summary[metric]['mean']
      for name, metric in names.items()
      if metric in summary
  }


def save_folder(
    bench: Workbench,
    outcome: Outcome,
    folder: pathlib.Path,
    *,
    keep_float32: bool,
    keep_original: bool,
) -> saving.SaveReport:
  """Merges the change and writes a Hugging Face folder.

  Args:
    bench: what to work on.
    outcome: a change that all records share.
    folder: the folder to write.
    keep_float32: write edited matrices in float32, not the source's dtype.
    keep_original: keep the replaced matrices beside, for an exact restore.

  Returns:
    The rounding that merging cost.
  """
  model = bench.model
  merged = delta_lib.apply(model.params, outcome.edited, dtype=jnp.float32)
  changed = [
      (f'layers/{delta.site}/kernel', layer)
      for delta in outcome.edited.deltas
      for layer in delta.layers
  ]
  return saving.save_model(
      model.folder,
      folder,
      model.spec,
      merged,
      changed=changed,
      dtype='float32' if keep_float32 else None,
      keep_original=keep_original,
  )


def read_perplexity(
    bench: Workbench,
    path: str,
    tokens: int,
    progress: Progress,
    outcome: Outcome | None,
) -> dict[str, Any]:
  """Measures the perplexity of a text file.

  Args:
    bench: what to work on.
    path: plain text in UTF-8.
    tokens: how many are scored at most.
    progress: progress display.
    outcome: a change that all text is read under; None for no change.

  Returns:
    'value', 'nats' a token, 'tokens', 'protocol'.

  Raises:
    InputError: the file cannot be read, or holds nothing to score.
  """
  try:
    text = pathlib.Path(path).read_text('utf-8')
  except (OSError, UnicodeDecodeError) as e:
    raise InputError(
        f'{path}: cannot be read as UTF-8 text ({e}); name a plain text'
    ) from None
  found = perplexity.perplexity(
      bench.model.spec,
      bench.model.params,
      outcome.edited if outcome else Edited(),
      [text],
      bench.tokenizer,
      row_tokens=min(_PERPLEXITY_ROW, bench.model.spec.max_positions),
      limit=tokens,
      progress=progress,
  )
  return found._asdict()


def work_report(bench: Workbench, work: values.Work) -> dict[str, Any]:
  """What the optimiser ran and in what shapes, for results.json."""
  shape = lambda room: {
      name: getattr(room, name) for name in ('slots', 'places', 'width')
  }
  return {
      'rooms': [shape(room) for room in bench.frame.rooms],
      'steps': work.steps,
      'places_run': work.computed,
      'tokens_needed': work.needed,
      'wasted': work.waste,
      'seconds': dict(work.seconds),
  }


def record_rows(
    bench: Workbench,
    info: Info,
    pre: harness.Evaluation,
    post: harness.Evaluation,
) -> list[dict[str, Any]]:
  """One JSON object a record: the edit, how it went, before and after."""
  finite = lambda x: float(x) if np.isfinite(x) else None
  rows = []
  for i, record in enumerate(bench.records):
    drop = lambda entry: {
        k: v for k, v in entry.items() if k not in ('number', 'id')
    }
    rows.append(
        {
            'number': record.number,
            'id': record.id,
            'prompt': record.prompt,
            'subject': record.subject,
            'target_new': record.target_new,
            'target_true': record.target_true,
            'written': bool(info.written[i]),
            'loss': finite(info.targets.loss[i]),
            'likelihood': finite(info.targets.likelihood[i]),
            'steps': int(info.targets.steps[i]),
            'distance': [finite(x) for x in info.distance[:, i]],
            'before': drop(pre.per_record[i]),
            'after': drop(post.per_record[i]),
        }
    )
  return rows


def metric_tables(
    evaluations: Mapping[str, harness.Evaluation],
) -> dict[str, dict[str, Any]]:
  """The results of evaluations by name, as plain numbers.

  Args:
    evaluations: name ('pre', 'post', ...) -> evaluation.

  Returns:
    'metrics' (name -> id -> fraction), 'intervals' (name -> id -> [low, high],
    95% bootstrap over records) and 'counts' (name -> id -> records).
  """
  tables: dict[str, dict[str, Any]] = {
      'metrics': {},
      'intervals': {},
      'counts': {},
  }
  for name, evaluation in evaluations.items():
    items = evaluation.summary.items()
    tables['metrics'][name] = {k: v['mean'] for k, v in items}
    tables['intervals'][name] = {k: [v['low'], v['high']] for k, v in items}
    tables['counts'][name] = {k: v['n'] for k, v in items}
  return tables


def require_some(info: Info) -> None:
  """Refuses a run in which no edit could be written.

  Raises:
    InputError: no loss stayed finite.
  """
  if len(info.written) and not info.written.any():
    raise InputError(
        'no edit was written: every loss stopped being finite; lower'
        ' --value_rate or load the model with --dtype=float32'
    )


def stop_tokens(bench: Workbench) -> tuple[int, ...]:
  """Tokens that end a free generation, found once a run."""
  return generation.stop_ids(bench.tokenizer, bench.model.spec.vocab)


def write_delta(
    path: pathlib.Path, outcome: Outcome, metadata: Mapping[str, Any]
) -> None:
  """Writes the change with what it was made for."""
  independent = outcome.owner is not None
  delta_lib.save(path, outcome.edited, {**metadata, 'independent': independent})
