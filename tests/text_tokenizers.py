"""Small fast tokenizers for tests, trained in-process on a few lines."""

import functools
import string

import numpy as np
import tokenizers
import transformers
from tokenizers import (
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)

from experiments.benchmark import t5_training
from jaxedit.text import locate

LINES = (
    'The mother tongue of Danielle Darrieux is French.',
    'Toko Yasuda, the guitar. Toko Yasuda plays the piano in Paris, France.',
    'The Eiffel Tower is in Paris. The capital of France is Paris.',
    'Wellington is a twin city of Sydney. a an is was the The in of',
)
SPECIAL = ['<s>', '</s>', '<unk>']


@functools.cache
def byte_level(
    *, begin: bool = False, end: bool = False, trim: bool = True
) -> transformers.PreTrainedTokenizerFast:
  """Byte-level BPE, as of GPT-2 and Llama 3.

  Args:
    begin: whether a BOS token is put in front of texts.
    end: whether an EOS token is put behind them.
    trim: whether offsets leave out the space that a token begins with.

  Returns:
    The tokenizer.
  """
  core = tokenizers.Tokenizer(models.BPE())
  core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
  core.decoder = decoders.ByteLevel()
  trainer = trainers.BpeTrainer(
      vocab_size=400,
      special_tokens=SPECIAL,
      initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
      show_progress=False,
  )
  core.train_from_iterator(LINES, trainer)
  steps = [processors.ByteLevel(trim_offsets=trim)]
  if begin or end:
    single = ['<s>'] * begin + ['$A'] + ['</s>'] * end
    steps.append(
        processors.TemplateProcessing(
            single=' '.join(single), special_tokens=[('<s>', 0), ('</s>', 1)]
        )
    )
  core.post_processor = processors.Sequence(steps)
  return _wrap(core)


@functools.cache
def sentence_piece() -> transformers.PreTrainedTokenizerFast:
  """BPE over '\u2581' that puts a space before every text, as of Llama 2."""
  core = tokenizers.Tokenizer(models.BPE(unk_token='<unk>', byte_fallback=True))
  core.normalizer = normalizers.Sequence(
      [normalizers.Prepend('\u2581'), normalizers.Replace(' ', '\u2581')]
  )
  core.decoder = decoders.Sequence(
      [
          decoders.Replace('\u2581', ' '),
          decoders.ByteFallback(),
          decoders.Fuse(),
          decoders.Strip(' ', 1, 0),
      ]
  )
  trainer = trainers.BpeTrainer(
      vocab_size=600,
      special_tokens=SPECIAL + [f'<0x{i:02X}>' for i in range(256)],
      show_progress=False,
  )
  # Words one by one: without a pre-tokenizer merges would span whole lines.
  words = [' ' + word for line in LINES for word in line.split()]
  core.train_from_iterator([word.strip() for word in words], trainer)
  core.post_processor = processors.TemplateProcessing(
      single='<s> $A', special_tokens=[('<s>', 0)]
  )
  return _wrap(core)


def _wrap(
    core: tokenizers.Tokenizer,
) -> transformers.PreTrainedTokenizerFast:
  return transformers.PreTrainedTokenizerFast(
      tokenizer_object=core,
      bos_token='<s>',
      eos_token='</s>',
      unk_token='<unk>',
  )


def target_ids(
    tokenizer: transformers.PreTrainedTokenizerFast, target: str
) -> np.ndarray:
  """A target's ids behind a prompt that ends in a word."""
  (ids,) = locate.encode_targets(tokenizer, [locate.Continued('is', target)])
  return ids


# Of a tiny GGUF file.
ALPHABET = sorted(pre_tokenizers.ByteLevel.alphabet())
TOKENS = ['<end>', '<start>', '<think>', *ALPHABET]
TOKENS += ['12', 'Ġ1', 'ab', '34', 'xyz']
METADATA = {
    'general.architecture': 'llama',
    'llama.context_length': 64,
    'tokenizer.ggml.model': 'gpt2',
    'tokenizer.ggml.pre': 'smollm',
    'tokenizer.ggml.tokens': TOKENS,
    'tokenizer.ggml.token_type': [3, 3, 4] + [1] * (len(TOKENS) - 3),
    # In the order in which they are applied; nothing makes 'xyz'.
    'tokenizer.ggml.merges': ['1 2', 'Ġ 1', 'a b', '3 4'],
    'tokenizer.ggml.bos_token_id': 1,
    'tokenizer.ggml.eos_token_id': 0,
    'tokenizer.chat_template': '{{ messages[0]["content"] }}!',
}


def gguf_metadata(**values):
  """Returns `METADATA` with other `tokenizer.ggml.*` values."""
  return METADATA | {
      f'tokenizer.ggml.{key}': value for key, value in values.items()
  }


@functools.cache
def t5() -> tokenizers.Tokenizer:
  """A unigram model in the layout of T5's: it ends every text with </s>."""
  alphabet = ' '.join(string.ascii_letters + string.punctuation)
  return t5_training.unigram([*LINES, alphabet], 160)
