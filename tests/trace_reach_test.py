"""Pushing one token's state: equal to full forwards with a hook."""

from __future__ import annotations

import naive_oracle
import numpy as np
import torch
from absl.testing import absltest, parameterized

from jaxedit.trace import reach

PUSHES, SIZE = 3, 0.7


def naive(model, text, layer, draw):
  """[n, K] log-probabilities of the target where the anchor is pushed."""
  anchor, rows = text.start - 1, []
  ids = torch.tensor(text.ids.astype(np.int64))[None]
  for push in draw:

    def hook(x, push=push):
      x = x.clone()
      length = torch.linalg.vector_norm(x[:, anchor], dim=-1, keepdim=True)
      x[:, anchor] += length * torch.tensor(push)
      return x

    block = naive_oracle.part(model, layer, 'block')
    with naive_oracle.hooked(block, hook), torch.no_grad():
      logits = model(input_ids=ids, use_cache=False).logits[0, anchor:-1]
    found = torch.log_softmax(logits.double(), -1)
    rows.append(found.gather(1, ids[0, text.start :, None])[:, 0].numpy())
  return np.stack(rows)


class ReachTest(parameterized.TestCase):

  @parameterized.parameters('llama', 'gptj')
  def test_equals_full_forwards(self, family):
    pair = naive_oracle.pair(family)
    rng = np.random.default_rng(0)
    texts = [
        reach.Text(rng.integers(2, 90, n).astype(np.int32), start)
        for n, start in ((9, 4), (20, 3), (5, 1), (6, 5))
    ]
    layers = (0, 1)
    found = reach.reach(
        pair.spec, pair.params, texts,
        layers=layers, size=SIZE, pushes=PUSHES, seed=5,
    )  # fmt: skip
    width = pair.spec.width
    draw = np.random.default_rng(5).standard_normal((PUSHES, width))
    draw = SIZE * draw / np.linalg.norm(draw, axis=-1, keepdims=True)
    for text, got in zip(texts, found, strict=True):
      clean = naive(pair.torch, text, 0, np.zeros((1, width), np.float32))[0]
      np.testing.assert_allclose(got.logprob, clean, atol=1e-5)
      for i, layer in enumerate(layers):
        want = naive(pair.torch, text, layer, draw.astype(np.float32)) - clean
        np.testing.assert_allclose(got.change[i], want.mean(0), atol=2e-5)
        np.testing.assert_allclose(got.moved[i], abs(want).mean(0), atol=2e-5)

  @parameterized.parameters(
      (dict(layers=(2,)), 'the last one moves no other'),
      (dict(layers=()), 'give some'),
      (dict(start=0), 'a prompt and a target'),
      (dict(start=4), 'a prompt and a target'),
  )
  def test_says_what_is_wrong(self, changes, words):
    pair = naive_oracle.pair('llama')
    given = dict(start=2, layers=(0,)) | changes
    text = reach.Text(np.arange(2, 6, dtype=np.int32), given.pop('start'))
    with self.assertRaisesRegex(ValueError, words):
      reach.reach(pair.spec, pair.params, [text], **given)


if __name__ == '__main__':
  absltest.main()
