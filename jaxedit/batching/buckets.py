"""The ladder of lengths to which static shapes are rounded up.

Inputs of similar length then share a shape, and so a compiled program. A ladder
has a fixed number of rungs an octave, evenly spaced, so a shape that is rounded
to it compiles at most that many programs for each doubling of the length and
leaves at most 1 / rungs of the tokens empty:

  POWERS     1 2 4 8 16 32 ...               rows, caches: few programs
  HALVES     1 2 3 4 6 8 12 16 24 ...        batches, labels
  QUARTERS   1 2 3 4 5 6 7 8 10 12 14 ...    lengths of tokens: little padding

Not here: budgets (`plan`), which fit the edits of one run, whose batches all
share them.
"""

from __future__ import annotations

Ladder = tuple[int, ...]

_END = 2**18


def octaves(rungs: int, first: int = 1, *, step: int = 1) -> Ladder:
  """Makes a ladder.

  Args:
    rungs: rungs an octave, a power of two; fewer where they would not be whole.
    first: the lowest rung.
    step: rungs are its multiples.

  Returns:
    The rungs from `first` up to 2^18, which is left out.
  """
  all_rungs = {
      (1 << power) + ((part << power) // rungs)
      for power in range(_END.bit_length() - 1)
      for part in range(rungs)
  }
  return tuple(
      sorted(n for n in all_rungs if first <= n < _END and n % step == 0)
  )


POWERS, HALVES, QUARTERS = octaves(1), octaves(2), octaves(4)
# Lengths of sequences; one token is as good as two.
LENGTHS = QUARTERS[1:]


def round_up(n: int, ladder: Ladder = LENGTHS) -> int:
  """Returns the lowest rung not below n; beyond the last, its multiples.

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
