"""AnyEdit: any row on targets of any length, chunk by chunk.

A target is cut into chunks. The state of a chunk stands on the token before it,
and is optimised with the states of earlier chunks in force, so that the model
foretells the chunk; all states are written together. The other tokens of the
text are keys whose output is held.

Source: Jiang et al. 2025, "AnyEdit: Edit Any Knowledge Encoded in Language
Models" (arXiv 2502.05628), section 4; held keys as in its code.
"""

from __future__ import annotations

import dataclasses
from typing import Any, TypeVar

from jaxedit.text.chunking import Chunking, check_chunking

Row = TypeVar('Row', bound=Any)


def anyedit(
    recipe: Row, window: int = 40, overlap: int = 0, boundary: str = 'window'
) -> Row:
  """Makes a method edit long targets.

  Args:
    recipe: a closed-form row, or UnKE's.
    window: tokens a chunk (published 40 for Llama-3, 50 for Qwen2.5).
    overlap: tokens that a chunk shares with the one before it.
    boundary: 'window', or 'sentence' to end chunks where sentences, lines of
      code or verse end.

  Returns:
    The row under its new name, for texts of `text.passages`.

  Raises:
    InputError: a window or overlap that cannot be.
  """
  chunks = Chunking(window, overlap, boundary)
  check_chunking(chunks)
  return dataclasses.replace(
      recipe,
      name=f'{recipe.name}+anyedit',
      chunks=chunks,
      anchor='prompt_last',
  )
