"""The words around a question come out of templates and literal texts."""

import copy

import text_tokenizers
from absl.testing import absltest, parameterized

from jaxedit import types
from jaxedit.text import chat

CHATML = (
    '{% for m in messages %}{% if loop.first and m["role"] != "system" %}'
    '{{ "<s>system\\nHelp.</s>\\n" }}{% endif %}'
    '{{ "<s>" + m["role"] + "\\n" + m["content"] + "</s>" + "\\n" }}'
    '{% endfor %}'
    '{% if add_generation_prompt %}{{ "<s>assistant\\n" }}{% endif %}'
)
LLAMA = (
    '{% for m in messages %}{% if m["role"] == "user" %}'
    '{{ bos_token + "[INST] " + m["content"].strip() + " [/INST]" }}'
    '{% else %}{{ " " + m["content"] + " " + eos_token }}{% endif %}'
    '{% endfor %}'
)
PLAIN = (
    '{% for m in messages %}{{ m["role"] }}: {{ m["content"] }}\n{% endfor %}'
    '{% if add_generation_prompt %}assistant:{% endif %}'
)
TWICE = '{% for m in messages %}{{ m["content"] + m["content"] }}{% endfor %}'
NEVER = 'Hello'
STRICT = '{{ raise_exception("Only turns with tools.") }}'
BROKEN = '{% for m in messages %}'


def tokenizer_with(template, *, end='</s>', special=()):
  """A small tokenizer with a chat template."""
  tokenizer = copy.deepcopy(text_tokenizers.byte_level())
  tokenizer.chat_template = template
  tokenizer.eos_token = end
  if special:
    tokenizer.add_special_tokens({'additional_special_tokens': list(special)})
  return tokenizer


class ChatTest(parameterized.TestCase):

  def test_none(self):
    tokenizer = text_tokenizers.byte_level()
    self.assertEqual(chat.chat_of(tokenizer, 'none'), chat.Chat('', '', ''))
    self.assertEqual(chat.chat_of(tokenizer, 'none', '</s>').end, '</s>')

  @parameterized.parameters(
      (CHATML, ('<s>system\nHelp.</s>\n<s>user\n', '</s>\n<s>assistant\n')),
      (LLAMA, ('<s>[INST] ', ' [/INST]')),
  )
  def test_template(self, template, words):
    made = chat.chat_of(tokenizer_with(template), 'template')
    self.assertEqual(made, chat.Chat(*words, '</s>'))
    self.assertEqual(made.wrap('{} Why?'), words[0] + '{} Why?' + words[1])

  def test_wrapping_is_what_the_template_writes(self):
    for template in (CHATML, LLAMA, PLAIN):
      tokenizer = tokenizer_with(template)
      question = 'Who plays the guitar {{ now }}?'
      wanted = tokenizer.apply_chat_template(
          [{'role': 'user', 'content': question}],
          tokenize=False,
          add_generation_prompt=True,
      )
      made = chat.chat_of(tokenizer, 'template')
      self.assertEqual(made.wrap(question), wanted)

  def test_end_of_turn_is_the_first_special_token_after_the_answer(self):
    template = CHATML.replace('</s>', '<turn><s>')
    tokenizer = tokenizer_with(template, special=['<turn>', '<tu'])
    self.assertEqual(chat.chat_of(tokenizer, 'template').end, '<turn>')
    self.assertEqual(chat.chat_of(tokenizer, 'template', '').end, '')
    self.assertEqual(chat.chat_of(tokenizer, 'template', 'x').end, 'x')

  def test_end_is_eos_where_the_template_has_none(self):
    made = chat.chat_of(tokenizer_with(PLAIN), 'template')
    self.assertEqual(made, chat.Chat('user: ', '\nassistant:', '</s>'))
    made = chat.chat_of(tokenizer_with(PLAIN, end=None), 'template')
    self.assertEqual(made.end, '')

  def test_literal(self):
    tokenizer = text_tokenizers.byte_level(begin=True)
    made = chat.chat_of(tokenizer, 'Q: {}\nA:')
    self.assertEqual(made, chat.Chat('Q: ', '\nA:', ''))
    made = chat.chat_of(tokenizer, '<s>[INST] {} [/INST]', '</s>')
    self.assertEqual(made, chat.Chat('<s>[INST] ', ' [/INST]', '</s>'))

  @parameterized.parameters(
      ('tempalte', "'tempalte' has '{}' 0 times"),
      ('', "'' has '{}' 0 times"),
      ('{} and {}', "has '{}' 2 times; give 'none', 'template', or"),
      ('template', 'has no chat template; add one'),
  )
  def test_refused(self, kind, words):
    with self.assertRaises(types.InputError) as caught:
      chat.chat_of(text_tokenizers.byte_level(), kind)
    self.assertIn(words, str(caught.exception))

  @parameterized.parameters(
      (TWICE, 'writes the question 2 times'),
      (NEVER, 'writes the question 0 times'),
      (STRICT, 'fails (Only turns with tools.)'),
      (BROKEN, 'fails ('),
      (CHATML.replace('m["content"]', '(m["content"] if loop.first else "")'),
       'writes the answer 0 times'),
  )  # fmt: skip
  def test_templates_that_cannot_be_used(self, template, words):
    with self.assertRaises(types.InputError) as caught:
      chat.chat_of(tokenizer_with(template), 'template')
    self.assertIn(words, str(caught.exception))

  def test_special_tokens(self):
    tokenizer = tokenizer_with(CHATML, special=['<turn>'])
    self.assertEqual(
        chat.special_tokens(tokenizer), ('</s>', '<s>', '<turn>', '<unk>')
    )


if __name__ == '__main__':
  absltest.main()
