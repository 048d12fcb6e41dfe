"""Tiny random BERT folders with a tokenizer of letters."""

from __future__ import annotations

import json

import tokenizers
import torch
import transformers
from tokenizers import models, normalizers, pre_tokenizers, processors

LETTERS = 'abcdefghijklmnopqrstuvwxyz'
SIZES = dict(
    vocab_size=64, hidden_size=24, num_hidden_layers=3, num_attention_heads=4,
    intermediate_size=40, max_position_embeddings=300,
)  # fmt: skip


def write_tokenizer(folder):
  """Writes a word piece tokenizer of letters, with padding of its own."""
  words = ['[PAD]', '[UNK]', '[CLS]', '[SEP]', *LETTERS, '.']
  words += [f'##{letter}' for letter in LETTERS]
  vocab = {word: i for i, word in enumerate(words)}
  made = tokenizers.Tokenizer(models.WordPiece(vocab, unk_token='[UNK]'))
  made.normalizer = normalizers.BertNormalizer(lowercase=True)
  made.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
  made.post_processor = processors.TemplateProcessing(
      single='[CLS] $A [SEP]', special_tokens=[('[CLS]', 2), ('[SEP]', 3)]
  )
  made.enable_truncation(16)
  made.enable_padding(length=16)
  made.save(str(folder / 'tokenizer.json'))
  roles = {'pad_token': '[PAD]', 'unk_token': '[UNK]', 'cls_token': '[CLS]'}
  (folder / 'tokenizer_config.json').write_text(json.dumps(roles))


def write_encoder(folder, **changes):
  """Writes a random BERT that is sensitive to every one of its parts."""
  config = transformers.BertConfig(**{**SIZES, **changes})
  torch.manual_seed(0)
  model = transformers.BertModel(config).eval()
  with torch.no_grad():
    for parameter in model.parameters():
      # Norms around one, all else around zero.
      parameter.add_(torch.randn_like(parameter), alpha=0.3)
  model.save_pretrained(folder)
  write_tokenizer(folder)
  return model
