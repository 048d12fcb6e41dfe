"""The model families: one file each, named after Hugging Face's model_type.

A family module has

  spec_from_hf(config) -> ModelSpec
  TENSORS   canonical leaf path -> tensors.Source
  PREFIX    what base model checkpoints leave out of every name
  IGNORED   tensors that may be present and are not needed
  OLDER     if there are such: endings of tensor names, and what they were once
  PLAIN     if there are such: rows of TENSORS for an MLP without a gate

A config field is read by the family, or listed as harmless here or in the
family, or empty; any other field is refused, because it could change the
mathematics without a word.
"""

from __future__ import annotations

import importlib
import types
from collections.abc import Mapping, Sequence
from typing import Any

from jaxedit.models import spec as spec_lib
from jaxedit.models.tensors import Source
from jaxedit.types import InputError

# Decoders and encoder-decoders, which are edited, and encoders of texts.
NAMES = ('gpt2', 'gpt_neox', 'gptj', 'llama', 'mistral', 'qwen2', 'qwen3', 't5')
ENCODERS = ('bert',)

# Fields that transformers writes for every model and that leave a decoder's
# forward pass as it is: bookkeeping, outputs, training, and text generation.
HARMLESS = frozenset("""
    _attn_implementation _attn_implementation_autoset _commit_hash _name_or_path
    architectures attn_implementation dtype finetuning_task id2label
    initializer_range is_decoder keys_to_ignore_at_inference label2id model_type
    name_or_path num_labels problem_type task_specific_params tokenizer_class
    torch_dtype torchscript transformers.js_config transformers_version
    use_bfloat16 use_cache

    chunk_size_feed_forward gradient_checkpointing output_attentions
    output_hidden_states output_past return_dict return_dict_in_generate

    attention_dropout attention_probs_dropout_prob attn_pdrop classifier_dropout
    embd_pdrop hidden_dropout hidden_dropout_prob resid_pdrop
    summary_first_dropout summary_activation summary_proj_to_labels summary_type
    summary_use_proj

    bad_words_ids begin_suppress_tokens bos_token_id decoder_start_token_id
    diversity_penalty do_sample early_stopping encoder_no_repeat_ngram_size
    eos_token_id exponential_decay_length_penalty forced_bos_token_id
    forced_eos_token_id length_penalty max_length max_new_tokens min_length
    no_repeat_ngram_size num_beam_groups num_beams num_return_sequences
    output_scores pad_token_id prefix remove_invalid_values repetition_penalty
    sep_token_id suppress_tokens temperature tf_legacy_loss top_k top_p
    typical_p unk_token_id
    """.split())


def get(model_type: str) -> types.ModuleType:
  """Finds the family of a model_type.

  Args:
    model_type: as in config.json.

  Returns:
    The family's module.

  Raises:
    InputError: there is no such family; the sentence lists those there are.
  """
  if model_type not in NAMES + ENCODERS:
    raise InputError(_unsupported(model_type, NAMES))
  return importlib.import_module(f'{__name__}.{model_type}')


def tensors_of(spec: spec_lib.ModelSpec) -> dict[str, Source]:
  """Returns the key table of a model: canonical leaf path -> source."""
  family = get(spec.family)
  return {
      **family.TENSORS,
      **({} if spec.gated else getattr(family, 'PLAIN', {})),
  }


def _unsupported(model_type: Any, names: Sequence[str]) -> str:
  return (
      f'model_type {model_type!r} is not supported; supported are '
      f'{", ".join(names)}'
  )


def spec_from_hf(
    config: Mapping[str, Any], names: Sequence[str] = NAMES
) -> spec_lib.ModelSpec:
  """Reads the architecture out of a Hugging Face config of any family.

  Args:
    config: the parsed config.json.
    names: the families that are wanted.

  Returns:
    What the model computes.

  Raises:
    InputError: unknown family, missing fields, or fields that would change the
      mathematics in a way that is not supported; all of them at once.
  """
  if 'model_type' not in config:
    raise InputError(
        'the config has no model_type; add one of ' + ', '.join(names)
    )
  if config['model_type'] not in names:
    raise InputError(_unsupported(config['model_type'], names))
  return get(config['model_type']).spec_from_hf(config)
