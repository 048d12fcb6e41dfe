"""What editors need and a run provides: second moments, texts, tokens.

A need of a method's own says itself how it is made, see `methods.base.Need`.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from typing import Any

import numpy as np

from jaxedit.convert import hub
from jaxedit.eval import datasets
from jaxedit.methods import base
from jaxedit.methods.base import Need
from jaxedit.models import assets, decode
from jaxedit.models.loading import Model
from jaxedit.models.spec import ModelSpec
from jaxedit.runs import moments
from jaxedit.runs.cache import digest
from jaxedit.runs.config import RunConfig
from jaxedit.stats import corpora
from jaxedit.text import locate
from jaxedit.types import EditRequest, InputError, Progress

# Tokens of an answer to preserve.
_ANSWER_TOKENS = 16


def check(config: RunConfig, need: Need, spec: ModelSpec | None = None) -> None:
  """Refuses what cannot be provided, as far as that needs no weights.

  Args:
    config: says where it is from.
    need: of an editor.
    spec: the architecture, if it is known.

  Raises:
    InputError: it cannot be provided.
  """
  if isinstance(need, base.Moments):
    if config.moments:
      moments.check(config.moments, need)
    else:
      corpora.fingerprint(config.moments_corpus)
  elif isinstance(need, base.PreservedTexts):
    if config.preserve == 'self' and spec is not None and spec.encoder_layers:
      raise InputError(
          f'{spec.family} writes no text of its own accord; name prompts whose'
          ' answers shall stay (--preserve=file:PATH, one a line)'
      )
    if config.preserve != 'self':
      corpora.fingerprint(config.preserve)
  elif isinstance(need, base.TextEncoder):
    hub.find_encoder(_encoder(config))
  elif isinstance(need, base.Demonstrations):
    _demonstrations(config, need)
  else:
    need.check()


def provide(
    config: RunConfig,
    model: Model,
    tokenizer: Any,
    need: Need,
    *,
    double_bos: bool = False,
    copy: bool = True,
    progress: Progress,
) -> Any:
  """Finds or makes what an editor needs.

  Args:
    config: says where it is from.
    model: the unedited model.
    tokenizer: its tokenizer.
    need: of an editor.
    double_bos: whether texts begin with two BOS tokens.
    copy: whether collected moments appear in the output folder.
    progress: progress display.

  Raises:
    InputError: it cannot be provided.
  """
  if isinstance(need, base.Moments):
    return moments.find(
        config, model, tokenizer, need, copy=copy, progress=progress
    )
  if isinstance(need, base.PadToken):
    return pad_id(tokenizer)
  if isinstance(need, base.Tokenizer):
    return tokenizer
  if isinstance(need, base.TextEncoder):
    return hub.load_encoder(_encoder(config), progress)
  if isinstance(need, base.Demonstrations):
    return _demonstrations(config, need)
  if isinstance(need, base.PreservedTexts):
    return _preserved_texts(config, model, tokenizer, double_bos, progress)
  return need.provide(model, config.seed, progress)


def _encoder(config: RunConfig) -> str:
  """Names the text encoder; the demo's unless given."""
  return assets.ENCODER if config.encoder == 'none' else config.encoder


def _demonstrations(
    config: RunConfig, need: base.Demonstrations
) -> list[EditRequest]:
  """Reads the pool of demonstrations."""
  if config.demonstrations is None:
    raise InputError(
        f'--demonstrations is missing: name a file of at least {need.least}'
        ' records, other than those to edit, from which examples are taken'
    )
  limit = max(need.least, config.demonstrations_limit)
  loaded = datasets.open_requests(
      config.demonstrations, limit=limit, on_bad_record='skip'
  ).load()
  if len(loaded.requests) < need.least:
    raise InputError(
        f'--demonstrations={config.demonstrations}: holds'
        f' {len(loaded.requests)} good records, {need.least} are shown; give'
        ' more records or lower --demonstration_count'
    )
  return list(loaded.requests)


def pad_id(tokenizer: Any) -> int:
  """The token that pads: the tokenizer's own, or else its end of text."""
  ids = (tokenizer.pad_token_id, tokenizer.eos_token_id, 0)
  return next(i for i in ids if i is not None)


def sources(config: RunConfig, resources: Mapping[Need, Any]) -> dict[str, Any]:
  """Where an editor's resources are from, for results.json."""
  found: dict[str, Any] = {}
  for need, value in resources.items():
    if isinstance(need, base.Moments):
      found['moments'] = {**value.provenance, 'tokens': value.count}
    elif isinstance(need, base.PreservedTexts):
      found['preserved'] = dict(
          corpus=config.preserve, texts=len(value), ids_digest=digest(*value)
      )
    elif isinstance(need, base.TextEncoder):
      found['encoder'] = {'hash': value.model.hash}
    elif isinstance(need, base.Demonstrations):
      found['demonstrations'] = dict(
          file=config.demonstrations, records=len(value)
      )
    elif not isinstance(need, base.Tokenizer):
      found |= need.source(value)
  return found or {'moments': {'corpus': 'none', 'tokens': 0}}


def _preserved_texts(
    config: RunConfig,
    model: Model,
    tokenizer: Any,
    double_bos: bool,
    progress: Progress,
) -> list[np.ndarray]:
  """Texts whose outputs stay, as int32 ids."""
  count = config.preserve_count
  limit = min(config.preserve_tokens, model.spec.max_positions)
  if model.spec.encoder_layers:
    texts = _answered(config, model, tokenizer, limit)
  elif config.preserve != 'self':
    documents = corpora.open_documents(config.preserve, seed=config.seed)
    found = corpora.tokenised(documents, tokenizer, limit)
    texts = list(itertools.islice(filter(None, found), count))
    bos = tokenizer.bos_token_id
    if bos is not None and double_bos:
      texts = [[bos] * (ids[0] == bos) + ids for ids in texts]
  else:
    starts = corpora.sample_starts(tokenizer)
    texts = corpora.sample(
        model.spec,
        model.params,
        starts,
        tokens=1,  # one batch
        seed=config.seed,
        stop_ids=[i for i in [tokenizer.eos_token_id] if i is not None],
        length=limit - max(map(len, starts)),
        batch_rows=count,
        progress=progress,
    )
  if not texts:
    raise InputError(
        f'--preserve={config.preserve}: holds no text; name another corpus'
    )
  return [np.asarray(ids, np.int32) for ids in texts]


def _answered(
    config: RunConfig, model: Model, tokenizer: Any, limit: int
) -> list[list[int]]:
  """Prompts of an encoder-decoder, each with what the model answers."""
  check(config, base.PreservedTexts(), model.spec)
  documents = corpora.open_documents(config.preserve, seed=config.seed)
  some = list(itertools.islice(documents, config.preserve_count))
  prompts = [
      ids.tolist()
      for ids in locate.encode_prompts(tokenizer, some)
      if len(ids) + _ANSWER_TOKENS <= limit
  ]
  ends = [i for i in [tokenizer.eos_token_id] if i is not None]
  answers = decode.generate(
      model.spec, model.params, prompts,
      max_new_tokens=_ANSWER_TOKENS, stop_ids=ends,
  )  # fmt: skip
  return [prompt + answer for prompt, answer in zip(prompts, answers)]
