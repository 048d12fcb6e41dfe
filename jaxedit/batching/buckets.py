"""Bucket sizes to which static shapes are rounded up.

Inputs of similar length then share a shape, and so a compiled program.
"""

from __future__ import annotations

Ladder = tuple[int, ...]

# Steps of 1 for small lengths, of a quarter of a power of two beyond.
LADDER: Ladder = (2, 3, *(q << p for p in range(16) for q in range(4, 8)))


def round_up(n: int, ladder: Ladder = LADDER) -> int:
  """Returns the smallest bucket not below n; beyond the last, its multiples.

  Args:
    n: a length.
    ladder: ascending lengths.

  Returns:
    The rounded length.
  """
  for rung in ladder:
    if n <= rung:
      return rung
  return -(-n // ladder[-1]) * ladder[-1]
