"""Random edits as ids, and moments to go with them: no text, no tokenizer.

The edits have what real ones have: contexts of several lengths before one
prompt, subjects of one to three tokens, an anchor that may be the very first
token, targets of several lengths and a KL row. They are for models whose words
mean nothing.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np

from jaxedit.models.spec import ModelSpec
from jaxedit.stats.storage import Moments
from jaxedit.text.encoding import EncodedEdit

# Ids that no random edit uses, counted from the end of the vocabulary: tests
# give their embeddings strange values.
RESERVED = 2


def random_edits(
    count: int,
    *,
    seed: int,
    vocab: int = 97,
    contexts: int = 3,
    targets: Sequence[int] = (1, 3, 2),
    kl: bool = True,
) -> list[EncodedEdit]:
  """Draws edits.

  Args:
    count: number of edits (E).
    seed: of numpy's generator.
    vocab: ids are 2 to vocab - 1 - `RESERVED`.
    contexts: C; the first is the bare prompt, the others put 1 to 3 tokens
      before it.
    targets: target lengths in tokens, used in turn.
    kl: whether the edits have a KL row.

  Returns:
    Edits with at most 7 tokens before the anchor and 6 columns from it on, if
    targets have at most 3 tokens.
  """
  rng = np.random.default_rng(seed)
  draw = lambda n: rng.integers(2, vocab - RESERVED, n).astype(np.int32)
  heads = [draw(0)] + [draw(1 + i % 3) for i in range(contexts - 1)]
  edits = []
  for i in range(count):
    # The first edit has its anchor in the row's first column.
    before = draw(0 if i == 0 else rng.integers(0, 3))
    subject = draw(1 if i == 0 else rng.integers(1, 4))
    after = draw(rng.integers(0, 4))
    rows = [np.concatenate([h, before, subject, after]) for h in heads]
    last = len(before) + len(subject) - 1
    edits.append(
        EncodedEdit(
            number=i + 1,
            rows=tuple(rows),
            anchors=tuple(len(h) + last for h in heads),
            target=draw(targets[i % len(targets)]),
            kl=subject if kl else draw(0),
        )
    )
  return edits


def source(ids: np.ndarray) -> np.ndarray:
  """A prompt [T + 2] of an encoder-decoder that reads ids [T]."""
  return np.append(~ids, [~1, 0]).astype(np.int32)


def for_encoders(edits: Sequence[EncodedEdit]) -> list[EncodedEdit]:
  """Makes edits those of an encoder-decoder, anchored where answers begin."""
  found = []
  for edit in edits:
    rows = tuple(map(source, edit.rows))
    anchors = tuple(len(row) - 1 for row in rows)
    found.append(dataclasses.replace(edit, rows=rows, anchors=anchors))
  return found


def random_moments(
    spec: ModelSpec, layers: Sequence[int], *, seed: int, scale: float = 1.0
) -> Moments:
  """Draws second moments of correlated keys.

  Args:
    spec: the architecture; moments are of the input of 'mlp/down'.
    layers: layer numbers.
    seed: of numpy's generator.
    scale: mean square of a key's entries.

  Returns:
    Moments with [n, F, F] positive definite matrices.
  """
  rng = np.random.default_rng(seed)
  size, count = spec.mlp_width, 4 * spec.mlp_width
  grams = []
  for _ in layers:
    mix = rng.standard_normal((size, size)) / np.sqrt(size)
    keys = rng.standard_normal((count, size)) @ (mix + 0.3 * np.eye(size))
    gram = keys.T @ keys / count
    grams.append(gram * scale * size / np.trace(gram))
  provenance = {'site': 'mlp/down', 'layers': list(layers), 'seed': seed}
  return Moments(tuple(layers), np.stack(grams), count, provenance)
