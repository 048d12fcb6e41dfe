"""Tokenizers of GGUF files: ids worked out by hand, bad metadata."""

import text_tokenizers
from absl.testing import absltest, parameterized

from jaxedit import types
from jaxedit.convert import gguf_tokenizer

ALPHABET, TOKENS = text_tokenizers.ALPHABET, text_tokenizers.TOKENS
change = text_tokenizers.gguf_metadata


class BuildTest(parameterized.TestCase):

  @parameterized.parameters(
      # Every numeral is a piece of its own, the space before it another.
      ('smollm', 'ab 12', ['ab', 'Ġ', '1', '2']),
      ('smollm', '1234', ['1', '2', '3', '4']),
      ('smollm', 'xyz', ['x', 'y', 'z']),
      # Numerals that are not ASCII count too: U+00BD is the bytes C2 BD.
      ('smollm', '1\u00bd', ['1', 'Â', '½']),
      # A space belongs to the number after it; '1 2' merges before 'Ġ 1'.
      ('gpt-2', 'ab 12', ['ab', 'Ġ', '12']),
      ('gpt2', 'ab 1', ['ab', 'Ġ1']),
      ('gpt-2', '1234', ['12', '34']),
      ('gpt-2', 'xyz', ['x', 'y', 'z']),
      # Runs of up to three numerals without their space; whole tokens first.
      ('llama-bpe', 'ab 12', ['<start>', 'ab', 'Ġ', '12']),
      ('llama-bpe', '1234', ['<start>', '12', '3', '4']),
      ('llama-bpe', 'xyz', ['<start>', 'xyz']),
      # Control and user-defined tokens are matched before anything else.
      ('smollm', '<start>ab<think>1', ['<start>', 'ab', '<think>', '1']),
  )
  def test_ids_by_hand(self, pre, text, wanted):
    tokenizer = gguf_tokenizer.build_tokenizer(change(pre=pre))
    self.assertEqual(
        tokenizer.encode(text).ids, [TOKENS.index(token) for token in wanted]
    )

  @parameterized.parameters('smollm', 'gpt-2', 'llama-bpe')
  def test_round_trip(self, pre):
    tokenizer = gguf_tokenizer.build_tokenizer(change(pre=pre))
    text = ' naïve  ½ 日本 1,234.5\n\n\tab\U0001f600'
    ids = tokenizer.encode(text).ids
    self.assertEqual(tokenizer.decode(ids, skip_special_tokens=True), text)

  def test_vocabulary_is_the_files(self):
    tokenizer = gguf_tokenizer.build_tokenizer(text_tokenizers.METADATA)
    self.assertEqual(tokenizer.get_vocab_size(), len(TOKENS))
    added = tokenizer.get_added_tokens_decoder()
    self.assertEqual(
        {number: token.special for number, token in added.items()},
        {0: True, 1: True, 2: False},
    )

  def test_bos_and_eos_where_the_file_wants_them(self):
    tokenizer = gguf_tokenizer.build_tokenizer(
        change(add_bos_token=True, add_eos_token=True)
    )
    self.assertEqual(tokenizer.encode('ab').ids, [1, TOKENS.index('ab'), 0])
    tokenizer = gguf_tokenizer.build_tokenizer(
        change(pre='llama-bpe', add_bos_token=False)
    )
    self.assertEqual(tokenizer.encode('ab').ids, [TOKENS.index('ab')])

  @parameterized.parameters(
      (dict(pre='tekken'), "pre-tokenizer 'tekken' is unknown; known are smol"),
      (dict(pre=None), 'pre-tokenizer None is unknown'),
      (dict(model='llama'), "of kind 'llama'; only 'gpt2'"),
      (dict(merges=None), 'merges is not a list of str'),
      (dict(tokens=[1, 2]), 'tokens is not a list of str'),
      (dict(token_type=[1]), '1 token types for 264 tokens'),
      (dict(merges=['a b', 'q q']), r"merge 2 \('q q'\) does not join"),
      (dict(tokens=TOKENS[:-1] + ['ab']), 'a token is listed twice'),
      (dict(eos_token_id=264), 'eos_token is token 264 of 264'),
  )
  def test_refusals(self, values, pattern):
    with self.assertRaisesRegex(types.InputError, f'^x.gguf: .*{pattern}'):
      gguf_tokenizer.build_tokenizer(change(**values), 'x.gguf')

  def test_faults_come_together(self):
    with self.assertRaises(types.InputError) as caught:
      gguf_tokenizer.build_tokenizer(change(pre='x', tokens=None, merges=None))
    self.assertLen(caught.exception.problems, 3)


if __name__ == '__main__':
  absltest.main()
