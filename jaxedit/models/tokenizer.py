"""Loads the tokenizer of a model folder.

Nothing here reaches the network, runs code from the folder, or needs torch.
"""

from __future__ import annotations

import os
import pathlib
from collections.abc import Mapping
from typing import Any

from jaxedit import io, sources, types
from jaxedit.models import tokenizer_rules

# The files of a folder that make a tokenizer.
_READ = (
    'tokenizer.json', 'tokenizer_config.json', 'special_tokens_map.json',
    'added_tokens.json', 'config.json',
)  # fmt: skip


def load_tokenizer(folder: str | os.PathLike[str]) -> Any:
  """Loads the fast tokenizer of a Hugging Face folder, from disk alone.

  Where there is a tokenizer.json, it is followed to the letter: transformers 5
  lets some classes that a tokenizer_config.json may name (GPT2Tokenizer, for
  SmolLM2) rebuild their own pre-tokenizer, which gives other ids for numerals.
  bos and eos that no tokenizer file names are taken from config.json.

  A tokenizer without a padding token pads with its eos (else unk, else bos)
  token: columns of padding are masked, so the id only has to exist. No token is
  ever added to the vocabulary.

  Args:
    folder: holds tokenizer.json, or tokenizer files that transformers can
      convert to it.

  Returns:
    A `transformers.PreTrainedTokenizerFast`, with its chat template; that of an
    encoder-decoder knows what lies between source and answer (`jaxedit.sources`).

  Raises:
    InputError: the folder or its tokenizer files are missing, need code from
      the folder, do not load, or give no fast tokenizer.
  """
  folder = pathlib.Path(folder)
  if not folder.is_dir():
    raise types.InputError(
        f'{folder}: there is no such folder to load a tokenizer from.'
    )
  types.InputError.raise_for(_folder_faults(folder))
  # Heavy, and of no use to those who only convert a file.
  import transformers

  # By name: to look AutoTokenizer up imports torch where it is installed.
  kind, options = 'AutoTokenizer', {'trust_remote_code': False}
  if (folder / 'tokenizer.json').is_file():
    kind, options = 'PreTrainedTokenizerFast', {}
  try:
    tokenizer = getattr(transformers, kind).from_pretrained(
        str(folder), local_files_only=True, **options
    )
  # What a broken file raises is not specified: besides ValueError, OSError and
  # ImportError, the part of tokenizers below Python raises plain Exception, and
  # where it panics a BaseException of its own.
  except BaseException as error:
    if isinstance(error, KeyboardInterrupt | SystemExit):
      raise
    reason = ' '.join(str(error).split()) or type(error).__name__
    raise types.InputError(
        f'{folder}: its tokenizer does not load: {reason[:300]}'
    ) from error
  if not getattr(tokenizer, 'is_fast', False):
    raise types.InputError(
        f'{folder}: its tokenizer ({type(tokenizer).__name__}) has no fast'
        ' version; add a tokenizer.json, which gives character offsets.'
    )
  config = _settings(folder / 'config.json')
  _fill_roles(tokenizer, config)
  if config.get('is_encoder_decoder') is True:
    names = 'decoder_start_token_id', 'pad_token_id'
    given = [config[n] for n in names if type(config.get(n)) is int]
    tokenizer = sources.with_border(tokenizer, *given[:1])
  return tokenizer


def end_ids(folder: str | os.PathLike[str]) -> tuple[int, ...]:
  """Lists the tokens at which a model is meant to stop.

  Args:
    folder: of the model.

  Returns:
    `eos_token_id` of generation_config.json, which may name several; empty
    where there is no such file or field.

  Raises:
    InputError: the file is not what it should be.
  """
  path = pathlib.Path(folder) / 'generation_config.json'
  found = _settings(path).get('eos_token_id')
  ids = found if isinstance(found, list) else [found] * (found is not None)
  if not all(type(i) is int and i >= 0 for i in ids):
    raise types.InputError(
        f'{path}: eos_token_id {found!r} is neither a token id nor a list of'
        ' them; correct or remove it.'
    )
  return tuple(ids)


def _settings(path: pathlib.Path) -> dict[str, Any]:
  """Reads a JSON object; {} where there is no file."""
  return io.read_json(path, remedy='correct it') if path.is_file() else {}


def _folder_faults(folder: pathlib.Path) -> list[str]:
  """Lists what can be told without loading anything."""
  # transformers opens what it knows by name; a pipe would never answer.
  problems = [
      f'{path}: is a pipe or a device, not a file; remove it.'
      for path in sorted(folder.iterdir())
      if path.exists() and not path.is_file() and not path.is_dir()
  ]
  if problems:
    return problems
  wanted = ('tokenizer.json', 'tokenizer.model', 'vocab.json', 'spiece.model')
  if not any((folder / name).is_file() for name in wanted):
    problems.append(
        f'{folder}: holds no tokenizer (looked for {", ".join(wanted)}); copy'
        ' the tokenizer files of the model there.'
    )
  found = {}
  for name in _READ:
    with types.InputError.collected(problems):
      found[name] = _settings(folder / name)
  rules = tokenizer_rules.errors(found.get('tokenizer.json', {}))
  problems += [f'{folder / "tokenizer.json"}: {rule}' for rule in rules]
  for name in ('tokenizer_config.json', 'config.json'):
    auto_map = found.get(name, {}).get('auto_map') or {}
    if not isinstance(auto_map, dict):
      problems.append(
          f'{folder / name}: auto_map is {str(auto_map)[:40]!r} where an object'
          ' is needed; correct or remove it.'
      )
    # Without this, transformers asks on the terminal whether to run the code.
    # A tokenizer.json is read without any, so its folder may name what it likes.
    elif (
        'AutoTokenizer' in auto_map
        and not (folder / 'tokenizer.json').is_file()
    ):
      problems.append(
          f'{folder / name}: names Python code as the tokenizer (auto_map),'
          ' which is never run; use a model with a tokenizer.json.'
      )
  return problems


def _fill_roles(tokenizer: Any, config: Mapping[str, Any]) -> None:
  """Sets bos, eos and padding where the tokenizer's own files do not."""
  for role in ('bos_token', 'eos_token'):
    token = config.get(f'{role}_id')
    known = type(token) is int and 0 <= token < len(tokenizer)
    if getattr(tokenizer, role) is None and known:
      setattr(tokenizer, role, tokenizer.convert_ids_to_tokens(token))
  # A padding token past the embedding table would need a new row there.
  rows = config.get('vocab_size')
  pad = tokenizer.pad_token_id
  if pad is not None and (type(rows) is not int or pad < rows):
    return
  for role in ('eos_token', 'unk_token', 'bos_token'):
    if getattr(tokenizer, role) is not None:
      tokenizer.pad_token = getattr(tokenizer, role)
      return
