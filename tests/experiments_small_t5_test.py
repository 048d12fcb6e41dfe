"""The program that trains a small T5: it learns, and others read its folder."""

import contextlib
import dataclasses
import io
import pathlib
import tempfile

import jax.numpy as jnp
import numpy as np
import programs
from absl.testing import absltest

from experiments.benchmark import small_t5
from jaxedit import api
from jaxedit.models import decoder
from jaxedit.runs import cli
from jaxedit.text import locate
from jaxedit.types import InputError

try:
  import torch
  import transformers
except ImportError:
  torch = transformers = None

# Three facts with 21 questions.
CONFIG = small_t5.SmallT5Config(
    records=(3,), judged=2, held_out=0.4, layers=2, width=48, mlp_width=64,
    heads=4, head_size=12, vocab=300, rate=5e-3, passes=25, stop_at=1.0,
)  # fmt: skip


class SmallT5Test(absltest.TestCase):

  @classmethod
  def setUpClass(cls):
    super().setUpClass()
    place = tempfile.TemporaryDirectory()
    cls.addClassCleanup(place.cleanup)
    cls.folder = pathlib.Path(place.name) / 'model'
    out = io.StringIO()
    with contextlib.redirect_stdout(out):
      config = dataclasses.replace(CONFIG, out=str(cls.folder))
      cls.lines = small_t5.run(config)
    cls.passes = [x for x in out.getvalue().splitlines() if 'pass ' in x]
    cls.model = api.load(cls.folder)
    cls.questions = small_t5.read(CONFIG)

  def test_it_learns(self):
    first, *_, last = (float(x.split()[2]) for x in self.passes)
    self.assertLess(last, 0.5 * first)
    self.assertLen(self.lines, 1 + 3 + 4)
    kinds = [one.kind for one in self.questions]
    self.assertEqual(kinds.count(small_t5.HELD_OUT), 1)
    self.assertEqual(kinds[:3], ['prompt', 'rephrase', 'rephrase'])

  @absltest.skipIf(torch is None, 'torch is missing')
  def test_transformers_agrees(self):
    twin = transformers.T5ForConditionalGeneration.from_pretrained(
        self.folder, attn_implementation='eager'
    ).eval()
    spec, params = self.model.spec, self.model.params
    (ids,) = locate.encode_prompts(
        self.model.tokenizer, [self.questions[0].prompt]
    )
    tokens = np.append(ids, [5, 9, 4]).astype(np.int32)[None]
    source = tokens < 0
    layout = decoder.token_layout(np.ones_like(source), jnp.asarray(source))
    got = decoder.forward(spec, params, jnp.asarray(tokens), layout)
    with torch.no_grad():
      want = twin(
          input_ids=torch.tensor(~tokens[source][None]).long(),
          decoder_input_ids=torch.tensor(tokens[~source][None]).long(),
      )
    np.testing.assert_allclose(
        np.asarray(got)[~source], want.logits[0], atol=1e-4, rtol=0
    )

  def test_answers_are_generated(self):
    known = [q for q in self.questions if q.kind == small_t5.PROMPT]
    unedited = api.EditedModel(self.model, api.UNEDITED, None)
    said = unedited.generate([q.prompt for q in known], max_new_tokens=8)
    right = np.mean([x.strip() == q.answer for x, q in zip(said, known)])
    self.assertIn(f'all, prompt: {right:.1%} of 3 exact', self.lines)

  def test_refusals(self):
    for change, sentence in (
        ({}, 'name the folder'),
        (dict(out='x', records=(1, 2)), '2 numbers for 1 files'),
        (dict(out='x', data=('none.jsonl',)), 'none.jsonl'),
    ):
      with self.assertRaisesRegex(InputError, sentence):
        small_t5.run(dataclasses.replace(CONFIG, **change))

  def test_flags(self):
    with programs.defined(small_t5):
      cli.parse(['program', '--data=a,b', '--records=1,2', '--kind=v1.0'])
      config = cli.read(small_t5.SmallT5Config)
    self.assertEqual((config.data, config.records), (('a', 'b'), (1, 2)))
    self.assertEqual(
        small_t5.hf_config(config, 99)['feed_forward_proj'], 'relu'
    )


if __name__ == '__main__':
  absltest.main()
