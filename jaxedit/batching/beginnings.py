"""What prompts begin with alike, so that it is run once."""

from __future__ import annotations

from collections.abc import Sequence

# Tokens that prompts must begin with alike to share them.
LEAST = 32


def common(one: Sequence[int], other: Sequence[int]) -> int:
  """Counts the tokens that two prompts begin with alike.

  A source (`jaxedit.sources`) is shared by none: its tokens depend on later ones.
  """
  if len(one) and one[0] < 0:
    return 0
  pairs = enumerate(zip(one, other))
  return next((n for n, (a, b) in pairs if a != b), min(len(one), len(other)))


def groups(
    prompts: Sequence[Sequence[int]], least: int = LEAST
) -> dict[int, tuple[int, int]]:
  """Groups prompts by what they begin with.

  Args:
    prompts: token ids.
    least: tokens that a group must share.

  Returns:
    prompt -> (its group, tokens that all of the group begin with); a prompt that
    shares fewer is in none, and one token is always its own. A prompt that would
    halve what a group shares begins another.
  """
  order = sorted(range(len(prompts)), key=lambda i: prompts[i])
  found: dict[int, tuple[int, int]] = {}
  first = 0
  while first < len(order):
    one, last, shared = prompts[order[first]], first + 1, 0
    while last < len(order):
      alike = min(common(one, prompts[order[last]]), len(one) - 1)
      if alike < max(least, shared // 2):
        break
      shared, last = alike, last + 1  # in order, so the last differs soonest
    if last - first > 1:
      shared = min(shared, *(len(prompts[i]) - 1 for i in order[first:last]))
      found |= {i: (first, shared) for i in order[first:last]}
    first = last
  return found
