"""The ladders of lengths to which static shapes are rounded up.

A shape that is rounded up is shared by inputs of similar length, so that they
share a compiled program.
"""

from __future__ import annotations

Ladder = tuple[int, ...]

# Steps of one while lengths are small, of a quarter of a power of two beyond.
LADDER: Ladder = (2, 3, *(q << p for p in range(16) for q in range(4, 8)))


def round_up(n: int, ladder: Ladder = LADDER) -> int:
  """Returns the lowest rung not below n; past the top, multiples of the top.

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
