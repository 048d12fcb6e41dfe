"""Chunks that begin at surprises, against the whole model."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
from absl.testing import absltest

from jaxedit.methods import anyedit
from jaxedit.models import decoder
from jaxedit.testing import facts, models
from jaxedit.text.chunking import Chunking, surprise_spans


class CutTest(absltest.TestCase):

  def test_by_the_whole_model(self):
    spec = models.tiny_spec('gpt2')
    edits = facts.random_edits(
        3, seed=2, contexts=1, targets=(17, 3, 12), kl=False
    )
    chunks = Chunking(4, 0, 'surprise')
    with jax.enable_x64(True):
      params = models.random_params(spec, 0, jnp.float64)
      got = anyedit.cut(spec, params, edits, chunks)
      for edit, one in zip(edits, got):
        text = edit.text(0)[None]
        layout = decoder.token_layout(np.ones(text.shape, bool))
        logits = decoder.forward(spec, params, text, layout)
        logprob = np.asarray(jax.nn.log_softmax(logits))[0]
        first = len(edit.rows[0]) - 1
        want = [-logprob[first + t, y] for t, y in enumerate(edit.target)]
        found = anyedit.surprise(spec, params, edit)
        np.testing.assert_allclose(found, want, rtol=1e-9)
        spans = surprise_spans(want, 4)
        self.assertEqual(one.chunks, spans if len(spans) > 1 else ())
    self.assertEqual(got[1].chunks, ())
    other = anyedit.cut(spec, params, edits, Chunking(4))
    self.assertEqual([e.chunks for e in other], [e.chunks for e in edits])


if __name__ == '__main__':
  absltest.main()
