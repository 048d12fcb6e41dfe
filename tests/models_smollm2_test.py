"""The demo model gives the numbers and the texts that torch gives.

Torch runs in float64: in float32 it is itself off by 1e-3 at one of the tokens
below, seven times more than we are anywhere.
"""

from __future__ import annotations

import functools
from unittest import mock

import hf_oracle
import jax
import numpy as np
import torch
import transformers
from absl.testing import absltest

from jaxedit import testing
from jaxedit.models import decode, decoder, loading
from jaxedit.models import tokenizer as tokenizer_lib
from jaxedit.stats import corpora

SENTENCES = (
    'The lighthouse on the northern cape was built in 1871.',
    'Copper conducts heat better than iron does.',
    'My sister plays the cello in a small orchestra in Lyon.',
    'After the storm, three boats were missing from the harbour.',
    'def area(radius):\n  return 3.14159 * radius ** 2\n',
    'Nobody expected the baker to win the mayoral election!',
    'The capital of Portugal is Lisbon, and its river is the Tagus.',
    'Photosynthesis turns light, water and carbon dioxide into sugar.',
    'She said: "Leave the keys under the blue flower pot."',
    '1, 1, 2, 3, 5, 8, 13, 21,',
    'Die Brücke über den Fluss wird im Frühjahr gesperrt.',
    'Un café, deux croissants et un jus d’orange, s’il vous plaît.',
    'Whales are mammals; sharks are fish.',
    'In chess, a pawn that reaches the last rank is promoted.',
    'Wool.',
    'The train to Osaka leaves at 07:45 from platform 12.',
    'If it rains tomorrow, we will move the wedding indoors,',
    'Water boils at a lower temperature on top of a mountain because',
    'Her first novel, written on the backs of tram tickets, sold 300 copies.',
    '<|im_start|>user\nName a bird.<|im_end|>\n<|im_start|>assistant\n',
)
PROMPTS = (
    'The capital of Italy is',
    'Once upon a time, in a village by the sea,',
    'The opposite of hot is',
    'To make bread you need flour,',
    'Marie Curie discovered',
    'import numpy as',
    'The largest planet of the solar system is',
    '<|im_start|>user\nName a bird.<|im_end|>\n<|im_start|>assistant\n',
)
NEW = 12


def setUpModule():
  # On busy cores torch's threads wait for each other.
  torch.set_num_threads(1)


def padded(rows, left=False):
  """Token lists as an array with a mask, padded with zeros on one side."""
  width = max(map(len, rows))
  tokens = np.zeros((len(rows), width), np.int32)
  valid = np.zeros((len(rows), width), bool)
  for row, ids in enumerate(rows):
    part = slice(width - len(ids), None) if left else slice(len(ids))
    tokens[row, part] = ids
    valid[row, part] = True
  return tokens, valid


class SmolLm2Test(absltest.TestCase):
  OPTIMIZE = True  # see conftest

  @classmethod
  def setUpClass(cls):
    super().setUpClass()
    folder = testing.demo_model()
    # Eager attention takes its softmax in float32, whatever the weights are.
    cls.theirs = transformers.AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float64, attn_implementation='sdpa'
    ).eval()
    cls.ours = loading.load_model(folder)
    cls.tokenizer = tokenizer_lib.load_tokenizer(folder)

  @classmethod
  def tearDownClass(cls):
    # Half a GiB and a whole one.
    del cls.ours, cls.theirs
    super().tearDownClass()

  def test_logits(self):
    tokens, valid = padded(self.tokenizer(list(SENTENCES))['input_ids'])

    @functools.partial(jax.jit, static_argnums=0)
    def forward(spec, params, tokens, valid):
      layout = decoder.token_layout(valid)
      return decoder.forward(spec, params, tokens, layout)

    ours = np.asarray(forward(self.ours.spec, self.ours.params, tokens, valid))
    ours = ours[valid]
    theirs = hf_oracle.logits(self.theirs, tokens, valid)[valid]
    self.assertBetween(theirs.std(), 5, 10)
    # The weights are float32, so nothing is lost on the way back.
    rounded = hf_oracle.logits(self.theirs.float(), tokens, valid)[valid]
    self.theirs.double()
    # Measured: 2e-4, on logits from -32 to 39; at one token, where float32 is
    # off by 1.1e-3 in torch too, 1.7e-3 without AVX-512.
    error = lambda x: np.abs(x - theirs).max(-1)
    np.testing.assert_array_less(
        error(ours), np.maximum(5e-4, 3 * error(rounded))
    )
    np.testing.assert_array_equal(ours.argmax(-1), theirs.argmax(-1))

  def test_shipped_samples_are_of_this_model(self):
    tokenizer = self.tokenizer
    with mock.patch.object(decode, 'generate') as generate:
      texts = corpora.sample(
          self.ours.spec,
          self.ours.params,
          corpora.sample_starts(tokenizer),
          tokens=15360,
          seed=0,
          stop_ids=[tokenizer.eos_token_id],
          model=self.ours.hash,
          tokenizer=tokenizer,
      )
    generate.assert_not_called()
    self.assertBetween(sum(map(len, texts)), 15360, 15360 + 64 * 68)

  def test_greedy_texts(self):
    prompts = self.tokenizer(list(PROMPTS))['input_ids']
    stop = self.tokenizer.eos_token_id
    ours = decode.generate(
        self.ours.spec, self.ours.params, prompts, max_new_tokens=NEW,
        stop_ids=(stop,),
    )  # fmt: skip
    tokens, valid = padded(prompts, left=True)
    with torch.no_grad():
      out = self.theirs.generate(
          input_ids=torch.tensor(tokens, dtype=torch.int64),
          attention_mask=torch.tensor(valid, dtype=torch.int64),
          do_sample=False,
          max_new_tokens=NEW,
          eos_token_id=stop,
          pad_token_id=stop,
      )
    for text, row in zip(ours, out[:, tokens.shape[1] :].tolist()):
      self.assertEqual(text, row[: len(text)])
      # A text that is shorter has come to its end, theirs too.
      self.assertTrue(len(text) == NEW or text[-1] == stop)


if __name__ == '__main__':
  absltest.main()
