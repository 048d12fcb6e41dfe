"""Tokenizers rebuilt from the metadata of a GGUF file.

A GGUF file holds a byte-level BPE as three lists (tokens, merges, token types)
and the name of a pre-tokenizer, the rule that cuts text into pieces before any
merge. The names known here, all followed by the byte-level alphabet of GPT-2:

  smollm          every numeral is a piece of its own, then GPT-2's rule
  gpt-2, gpt2     GPT-2's rule (contractions, words, numbers, symbols, spaces)
  llama-bpe       Llama 3's rule; numbers in runs of up to three numerals, and a
                  piece that is a token as it stands is not merged piecewise

The converter in transformers (5.24) ignores that name and uses GPT-2's rule, so
its ids differ for numerals; it also moved between versions 4 and 5. Hence our
own. An unknown rule is refused: a wrong one yields plausible but wrong ids.

Sources: Radford et al. 2019 (byte-level BPE); the tokenizer files published
with SmolLM2 and Llama 3.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import tokenizers
from tokenizers import decoders, pre_tokenizers, processors
from tokenizers import models as tokenizer_models

from jaxedit import types

# Token types of GGUF that are matched whole before the pre-tokenizer runs.
_CONTROL = 3
_USER_DEFINED = 4

_LLAMA3_RULE = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r'| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+'
)

_ROLES = {
    'bos_token': 'tokenizer.ggml.bos_token_id',
    'eos_token': 'tokenizer.ggml.eos_token_id',
    'unk_token': 'tokenizer.ggml.unknown_token_id',
    'pad_token': 'tokenizer.ggml.padding_token_id',
}

PRE_TOKENIZERS = ('smollm', 'gpt-2', 'gpt2', 'llama-bpe')


def _pre_tokenizer(name: str) -> Any:
  """Returns the rule of a known name."""
  rules = {
      'smollm': [pre_tokenizers.Digits(individual_digits=True)],
      'llama-bpe': [
          pre_tokenizers.Split(tokenizers.Regex(_LLAMA3_RULE), 'isolated')
      ],
  }
  byte_level = pre_tokenizers.ByteLevel(
      add_prefix_space=False, use_regex=name != 'llama-bpe'
  )
  if name not in rules:
    return byte_level
  return pre_tokenizers.Sequence([*rules[name], byte_level])


def _faults(metadata: Mapping[str, Any], source: str) -> list[str]:
  """Lists what keeps the metadata from describing a known tokenizer."""
  kind = metadata.get('tokenizer.ggml.model')
  if kind != 'gpt2':
    return [
        f"{source}: the tokenizer is of kind {kind!r}; only 'gpt2' (byte-level"
        ' BPE) can be rebuilt. Use the safetensors folder of this model.'
    ]
  problems = []
  pre = metadata.get('tokenizer.ggml.pre')
  if pre not in PRE_TOKENIZERS:
    problems.append(
        f'{source}: the pre-tokenizer {pre!r} is unknown; known are'
        f' {", ".join(PRE_TOKENIZERS)}. Use the safetensors folder of this'
        ' model.'
    )
  for key, item in (('tokens', str), ('merges', str), ('token_type', int)):
    value = metadata.get(f'tokenizer.ggml.{key}')
    if not isinstance(value, list) or not all(type(v) is item for v in value):
      problems.append(
          f'{source}: tokenizer.ggml.{key} is not a list of {item.__name__}.'
      )
  return problems or _list_faults(metadata, source)


def _list_faults(metadata: Mapping[str, Any], source: str) -> list[str]:
  """Lists where tokens, merges, types and roles do not fit together."""
  problems = []
  tokens = metadata['tokenizer.ggml.tokens']
  type_count = len(metadata['tokenizer.ggml.token_type'])
  if type_count != len(tokens):
    problems.append(
        f'{source}: {type_count} token types for {len(tokens)} tokens; the file'
        ' is damaged.'
    )
  known = set(tokens)
  if len(known) != len(tokens):
    problems.append(f'{source}: a token is listed twice; the file is damaged.')
  for number, merge in enumerate(metadata['tokenizer.ggml.merges'], 1):
    parts = merge.split(' ')
    if len(parts) != 2 or not known.issuperset((*parts, ''.join(parts))):
      problems.append(
          f'{source}: merge {number} ({merge!r}) does not join two tokens into'
          ' a third; the file is damaged.'
      )
      break  # one damaged merge says it; thousands would hide the rest
  for role, key in _ROLES.items():
    token = metadata.get(key, 0)
    if type(token) is not int or not 0 <= token < len(tokens):
      problems.append(
          f'{source}: {role} is token {token!r} of {len(tokens)}; the file is'
          ' damaged.'
      )
  return problems


def _roles(metadata: Mapping[str, Any]) -> dict[str, str]:
  """Maps 'bos_token' and its like to the tokens that the file names."""
  tokens = metadata['tokenizer.ggml.tokens']
  return {
      role: tokens[metadata[key]]
      for role, key in _ROLES.items()
      if metadata.get(key) is not None
  }


def _added_tokens(metadata: Mapping[str, Any]) -> list[tokenizers.AddedToken]:
  """Lists the tokens to be matched whole, in the order of their ids."""
  # A token with a role is special in transformers whatever its type says, so
  # it is declared special here and the folder means the same everywhere.
  named = set(_roles(metadata).values())
  return [
      tokenizers.AddedToken(
          token, special=kind == _CONTROL or token in named, normalized=False
      )
      for token, kind in zip(
          metadata['tokenizer.ggml.tokens'],
          metadata['tokenizer.ggml.token_type'],
          strict=True,
      )
      if kind in (_CONTROL, _USER_DEFINED) or token in named
  ]


def build_tokenizer(
    metadata: Mapping[str, Any], source: str = 'metadata'
) -> tokenizers.Tokenizer:
  """Builds the byte-level BPE that a GGUF file describes.

  Args:
    metadata: the file's keys and values; `tokenizer.ggml.*` are read.
    source: the file's name, for messages.

  Returns:
    A tokenizer whose ids are the positions in the file's token list.

  Raises:
    InputError: the kind or the pre-tokenizer is unknown, or the lists do not
      fit together.
  """
  types.InputError.raise_for(_faults(metadata, source))
  tokens = metadata['tokenizer.ggml.tokens']
  pre = metadata['tokenizer.ggml.pre']
  merges = [
      tuple(merge.split(' ')) for merge in metadata['tokenizer.ggml.merges']
  ]
  tokenizer = tokenizers.Tokenizer(
      tokenizer_models.BPE(
          vocab={token: number for number, token in enumerate(tokens)},
          merges=merges,
          ignore_merges=pre == 'llama-bpe',
      )
  )
  tokenizer.pre_tokenizer = _pre_tokenizer(pre)
  tokenizer.decoder = decoders.ByteLevel()
  tokenizer.add_tokens(_added_tokens(metadata))
  if template := _template(metadata):
    tokenizer.post_processor = template
  return tokenizer


def _template(metadata: Mapping[str, Any]) -> Any:
  """Returns what puts bos or eos around a text, None where neither is."""
  roles = _roles(metadata)
  # Files of Llama 3 that do not say so still mean a bos.
  bos_by_default = metadata['tokenizer.ggml.pre'] == 'llama-bpe'
  bos = metadata.get('tokenizer.ggml.add_bos_token', bos_by_default)
  eos = metadata.get('tokenizer.ggml.add_eos_token', False)
  before = [roles['bos_token']] if bos and 'bos_token' in roles else []
  after = [roles['eos_token']] if eos and 'eos_token' in roles else []
  if not before and not after:
    return None
  ids = {
      roles[role]: metadata[_ROLES[role]]
      for role in ('bos_token', 'eos_token')
      if role in roles
  }
  return processors.TemplateProcessing(
      single=[*before, '$A:0', *after],
      pair=[*before, '$A:0', *after, *before, '$B:0', *after],
      special_tokens=[(token, ids[token]) for token in {*before, *after}],
  )


def tokenizer_files(
    metadata: Mapping[str, Any], source: str = 'metadata'
) -> dict[str, str]:
  """Writes out the tokenizer of a GGUF file as the files of an HF folder.

  Args:
    metadata: the file's keys and values.
    source: the file's name, for messages.

  Returns:
    File name -> JSON text: tokenizer.json, tokenizer_config.json (with the
    chat template where the file has one) and special_tokens_map.json.

  Raises:
    InputError: as for `build_tokenizer`.
  """
  tokenizer = build_tokenizer(metadata, source)
  roles = _roles(metadata)
  config: dict[str, Any] = {
      # Not the class of the upstream repository: GPT2Tokenizer rebuilds its
      # own pre-tokenizer and would drop the one in tokenizer.json.
      'tokenizer_class': 'PreTrainedTokenizerFast',
      'add_prefix_space': False,
      'clean_up_tokenization_spaces': False,
      'model_input_names': ['input_ids', 'attention_mask'],
      **roles,
  }
  name = metadata.get('general.architecture')
  length = metadata.get(f'{name}.context_length')
  chat = metadata.get('tokenizer.chat_template') or None
  optional = {'model_max_length': length, 'chat_template': chat}
  config |= {k: value for k, value in optional.items() if value is not None}
  return {
      'tokenizer.json': tokenizer.to_str(pretty=False),
      'tokenizer_config.json': json.dumps(config, indent=2) + '\n',
      'special_tokens_map.json': json.dumps(roles, indent=2) + '\n',
  }
