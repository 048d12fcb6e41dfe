"""Tiny random Hugging Face torch models, the oracle of the model tests.

The sizes are those of `jaxedit.testing.models.tiny_spec`. Weights are large and
biases and norms are away from their neutral values, so that a part that is left
out or misplaced changes the logits.
"""

from __future__ import annotations

import json
import pathlib
from typing import Any

import numpy as np
import safetensors.torch
import torch
import transformers

# Threads cost tiny models more than they gain, far more on busy cores.
torch.set_num_threads(1)

_LLAMA = dict(
    hidden_size=32, intermediate_size=48, num_hidden_layers=3,
    num_attention_heads=4, num_key_value_heads=2, vocab_size=97,
    max_position_embeddings=64,
)  # fmt: skip
_GPT = dict(n_embd=32, n_layer=3, n_head=4, n_positions=64, vocab_size=97)
_TOKENS = dict(bos_token_id=0, eos_token_id=1, pad_token_id=None)
CONFIGS: dict[str, dict[str, Any]] = {
    'llama': dict(_LLAMA, rms_norm_eps=1e-5),
    'mistral': dict(_LLAMA, sliding_window=8, rms_norm_eps=1e-5),
    'qwen2': dict(_LLAMA, tie_word_embeddings=True),
    'qwen3': dict(_LLAMA, head_dim=16),
    'gptj': dict(_GPT, rotary_dim=4),
    'gpt_neox': dict(
        hidden_size=32, intermediate_size=128, num_hidden_layers=3,
        num_attention_heads=4, vocab_size=97, max_position_embeddings=64,
        rotary_pct=0.25,
    ),
    'gpt2': dict(_GPT),
}  # fmt: skip
FAMILIES = tuple(CONFIGS)
# An encoder-decoder; heads together are not as wide as the model.
CONFIGS['t5'] = dict(
    d_model=32, d_kv=6, d_ff=48, num_layers=2, num_heads=4, vocab_size=97,
    relative_attention_num_buckets=8, relative_attention_max_distance=12,
    n_positions=32, pad_token_id=0, bos_token_id=None, decoder_start_token_id=0,
)  # fmt: skip


def make(family: str, seed: int = 0, **changes: Any) -> Any:
  """Builds a random torch model with eager attention, in float32.

  Args:
    family: one of `FAMILIES`, or 't5'.
    seed: of the weights.
    **changes: config fields that differ.

  Returns:
    The transformers model, in evaluation mode.
  """
  fields = _TOKENS | CONFIGS[family] | changes
  config = transformers.AutoConfig.for_model(family, **fields)
  config._attn_implementation = 'eager'
  kind = transformers.AutoModelForCausalLM
  if config.is_encoder_decoder:
    kind = transformers.AutoModelForSeq2SeqLM
  model = kind.from_config(config, attn_implementation='eager')
  generator = torch.Generator().manual_seed(seed)
  with torch.no_grad():
    for name, parameter in model.named_parameters():
      noise = torch.randn(parameter.shape, generator=generator)
      if parameter.ndim == 2:
        parameter.copy_(noise * 0.2)
      elif name.endswith('bias'):
        parameter.copy_(noise * 0.1)
      else:
        parameter.copy_(1.0 + 0.1 * noise)
  return model.float().eval()


def save(model: Any, folder: str | pathlib.Path, **options: Any) -> None:
  """Writes a model as transformers does, as safetensors."""
  model.save_pretrained(folder, **options)


def load(folder: str | pathlib.Path, dtype: Any = torch.float32) -> Any:
  """Reads a folder with transformers."""
  return transformers.AutoModelForCausalLM.from_pretrained(
      folder, dtype=dtype, attn_implementation='eager'
  ).eval()


def state(folder: str | pathlib.Path) -> dict[str, np.ndarray]:
  """The tensors that transformers wrote, as float32 numpy arrays.

  Names in memory may differ: transformers 5 calls GPT-NeoX's head lm_head.
  """
  tensors = {}
  for path in pathlib.Path(folder).glob('model*.safetensors'):
    tensors |= safetensors.torch.load_file(path)
  return {name: tensor.float().numpy() for name, tensor in tensors.items()}


def logits(model: Any, tokens: np.ndarray, valid: np.ndarray) -> np.ndarray:
  """Logits [B, T, V] of padded rows, positions counted from the first token."""
  positions = np.maximum(np.cumsum(valid, axis=-1) - 1, 0)
  with torch.no_grad():
    out = model(
        input_ids=torch.tensor(tokens),
        attention_mask=torch.tensor(valid.astype(np.int64)),
        position_ids=torch.tensor(positions),
        use_cache=False,
    )
  return out.logits.float().numpy()


def edit_config(folder: str | pathlib.Path, **changes: Any) -> None:
  """Changes fields of a folder's config.json; None removes a field."""
  path = pathlib.Path(folder) / 'config.json'
  config = json.loads(path.read_text()) | changes
  kept = {k: v for k, v in config.items() if k not in changes or v is not None}
  path.write_text(json.dumps(kept))
