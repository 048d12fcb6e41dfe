"""What a search for layers is given: the method, facts to try, a proposal.

A proposal is the suggest.json of an earlier search: the layers that it found are
compared with the best that is found here, on facts that the search never saw,
neither tried nor traced.
"""

from __future__ import annotations

import dataclasses
import pathlib
import sys
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from jaxedit import io
from jaxedit.eval import datasets
from jaxedit.methods.base import Moments
from jaxedit.models.loading import Model
from jaxedit.runs import moments
from jaxedit.runs.clock import Clock
from jaxedit.runs.config import RunConfig
from jaxedit.runs.method_flags import Chosen
from jaxedit.runs.tasks import FactTask
from jaxedit.runs.trace_config import TraceRunConfig
from jaxedit.stats import corpora, storage
from jaxedit.text.token_cache import TokenCache
from jaxedit.types import LOCALITY, REPHRASE, InputError, Progress


class Proposal(NamedTuple):
  """What an earlier search found.

  Attributes:
    path: its suggest.json.
    layers: the best.
    facts: what they were tried on, as that names them.
    seen: facts that were tried or traced, as (hash of the file, number in it).
    model_hash: of the model.
  """

  path: str
  layers: tuple[int, ...]
  facts: Mapping[str, Any]
  seen: frozenset[tuple[str, int]]
  model_hash: str


def read_proposal(path: str | None) -> Proposal | None:
  """Reads the suggest.json of an earlier search, --proposal, if there is one.

  Raises:
    InputError: it is none.
  """
  if not path:
    return None
  remedy = 'give the suggest.json that an earlier --suggest_layers wrote'
  try:
    found = io.read_json(path, remedy=remedy)
    facts = found['facts']
    return Proposal(
        path,
        tuple(map(int, found['tries'][0]['layers'])),
        facts,
        frozenset(
            (str(some['sha256']), int(number))
            for some in (facts, found['traced'])
            for number in some['numbers']
        ),
        str(found['model_hash']),
    )
  except InputError as e:
    raise InputError(f'--proposal={e}') from e
  except (ValueError, LookupError, TypeError) as e:
    raise InputError(
        f'--proposal={path}: is no suggest.json ({e!r}); {remedy}'
    ) from e


def at(chosen: Chosen, layers: Sequence[int]) -> Chosen:
  """The method in these layers."""
  config = dataclasses.replace(chosen.config, layers=tuple(layers))
  return chosen._replace(config=config)


def need_of(chosen: Chosen, layers: Sequence[int]) -> Moments:
  """The second moments that the method needs in these layers."""
  return Moments(tuple(layers), chosen.settings['site'])


def errors(
    config: RunConfig, settings: TraceRunConfig, chosen: Chosen
) -> list[str]:
  """Finds settings that do not go together, or files that cannot be read."""
  problems = []
  if chosen.method.name != 'memit':
    problems.append(
        f'--method={chosen.method.name}: layers are searched with memit; leave it'
        ' out'
    )
  if chosen.parity != 'none':
    problems.append(
        f'--parity={chosen.parity}: layers are searched without; leave it out'
    )
  widths = settings.probe_widths
  if not widths or not all(x.isdecimal() and int(x) for x in widths):
    problems.append(
        f'--probe_widths={",".join(widths)}: give numbers of layers, e.g. 1,5'
    )
  if 'hidden' not in settings.kinds:
    problems.append('--suggest_layers needs the kind hidden; add it to --kinds')
  if settings.probe_data is None and settings.prompt is not None:
    problems.append('--suggest_layers: name facts to try with --probe_data')
  if problems:
    return problems
  # All are needed after the traces only; layer 0 is part of every search.
  need = need_of(chosen, (0,))
  checks = (
      lambda: moments.check(config.moments, need)
      if config.moments
      else corpora.fingerprint(config.moments_corpus),
      lambda: FactTask(config, chosen).given_contexts,
      lambda: read_proposal(settings.proposal),
  )
  for check in checks:
    with InputError.collected(problems):
      check()
  return problems


class Search(NamedTuple):
  """What a search works on.

  Attributes:
    config: of the run, its data and limits those of the facts to try.
    settings: of the search.
    chosen: MEMIT; its layers are replaced.
    model: the unedited model.
    tokens: of its tokenizer.
    loaded: the facts to try.
    proposal: of an earlier search, to be judged, if there is one.
    clock: stages are timed here.
    progress: progress display.
  """

  config: RunConfig
  settings: TraceRunConfig
  chosen: Chosen
  model: Model
  tokens: TokenCache
  loaded: datasets.Loaded
  proposal: Proposal | None
  clock: Clock
  progress: Progress

  @property
  def task(self) -> FactTask:
    """How facts are read, encoded and judged."""
    return FactTask(self.config, self.chosen)


def read(
    config: RunConfig,
    settings: TraceRunConfig,
    chosen: Chosen,
    *,
    model: Model,
    tokenizer: Any,
    clock: Clock,
    progress: Progress,
) -> Search:
  """Reads all that a search needs.

  Raises:
    InputError: the proposal is another model's; second moments lack a layer that
      will be tried; facts are faulty, too few, or lack what they are judged by.
  """
  proposal = read_proposal(settings.proposal)
  seen = proposal.seen if proposal else frozenset()
  if config.moments:
    layers = range(model.spec.layers) if settings.probe == 'all' else (0,)
    moments.check(config.moments, need_of(chosen, layers), model.hash)
  if proposal and proposal.model_hash != model.hash:
    raise InputError(f'--proposal={proposal.path}: was found for another model')
  source = settings.probe_data or settings.data
  wanted, skip = settings.probe_facts, settings.probe_skip
  count = skip + wanted + len(seen)
  config = dataclasses.replace(
      config, data=source, num_edits=count, max_new_tokens=0
  )
  tokens = TokenCache(tokenizer)
  loaded = FactTask(config, chosen).load(tokens, model.spec, progress)
  requests = [
      request
      for request in loaded.requests[skip:]
      if (loaded.sha256, request.number) not in seen
  ][:wanted]
  if len(requests) < 2:
    passed = ' and those that the search has seen' if proposal else ''
    raise InputError(
        f'{source}: {len(loaded.requests)} good records leave {len(requests)}'
        f' after --probe_skip={skip}{passed}; at least 2 are needed'
    )
  for name, kind, part in (
      ('paraphrases', REPHRASE, 'PS'),
      ('neighbours', LOCALITY, 'NS'),
  ):
    if not any(request.probes_of(kind) for request in requests):
      raise InputError(
          f'{source}: no record has {name}, which {part} is read on; give'
          ' --probe_data that has, such as CounterFact'
      )
  loaded = dataclasses.replace(loaded, requests=tuple(requests))
  return Search(
      config, settings, chosen, model, tokens, loaded, proposal, clock,
      progress,
  )  # fmt: skip


def bounded(path: str, chosen: Chosen, top: int) -> int:
  """The last layer up to which a file of moments has all, `top` at most."""
  if not pathlib.Path(path).is_file():
    return top
  need = need_of(chosen, (0,))
  record = storage.check(path, layers=need.layers, site=need.site)
  have = {*map(int, record['layers'])}
  last = next((n - 1 for n in range(top + 1) if n not in have), top)
  if last < top:
    print(
        f'note: the traces leave layers 0 to {top}, of which --moments has 0 to'
        f' {last}: none above is tried',
        file=sys.stderr,
    )
  return last


def facts_of(loaded: Any, numbers: Sequence[int]) -> dict[str, Any]:
  """Names facts of a file by their numbers, in plain JSON types."""
  return {
      'source': str(loaded.source),
      'sha256': loaded.sha256,
      'numbers': list(numbers),
  }
