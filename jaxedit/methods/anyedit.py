"""AnyEdit: any method on targets of any length, chunk by chunk.

A target is cut into chunks. The hidden state of a chunk stands on the token before
it, and is optimised with the changes of earlier chunks in force, so that the model
predicts the chunk; all of them are inserted in one update. The other tokens of the
text are preserved keys.

Source: Jiang et al. 2025, "AnyEdit: Edit Any Knowledge Encoded in Language
Models" (arXiv 2502.05628), section 4; preserved keys as in its code.
"""

from __future__ import annotations

import dataclasses
from typing import Any, TypeVar

from jaxedit.text.chunking import Chunking, check_chunking

Config = TypeVar('Config', bound=Any)


def anyedit(
    config: Config, window: int = 40, overlap: int = 0, boundary: str = 'window'
) -> Config:
  """Makes a method edit long targets.

  Args:
    config: of a method that is chunkable.
    window: tokens a chunk (published 40 for Llama-3, 50 for Qwen2.5).
    overlap: tokens that a chunk shares with the one before it.
    boundary: 'window', or 'sentence' to end chunks where sentences, lines of
      code or verse end.

  Returns:
    The config, for texts of `text.passages`.

  Raises:
    InputError: a window or overlap that cannot be.
  """
  chunks = Chunking(window, overlap, boundary)
  check_chunking(chunks)
  return dataclasses.replace(config, chunks=chunks, anchor='prompt_last')
