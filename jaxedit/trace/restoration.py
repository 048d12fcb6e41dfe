"""What a trace restores.

  hidden       the block's output, at one token in one layer
  mlp, attn    the output of that part at one token, in a window of layers
  severed_*    as hidden, while that part keeps its corrupted output at the token
               in every layer above

A window of w layers around l is l - floor(w / 2) .. l + ceil(w / 2) - 1, cut at
the ends of the model.

Source: Meng et al. 2022 (ROME, arXiv 2202.05262), section 2.1 and appendix B;
their windows have 10 layers.
"""

from __future__ import annotations

from typing import NamedTuple

WINDOW = 10
# Name -> what is restored, and what keeps its corrupted output above.
_PARTS = {
    'hidden': ('block', None),
    'mlp': ('mlp', None),
    'attn': ('attn', None),
    'severed_mlp': ('block', 'mlp'),
    'severed_attn': ('block', 'attn'),
}
NAMES = tuple(_PARTS)


class Restoration(NamedTuple):
  """One way of restoring.

  Attributes:
    name: how results are called.
    part: what is restored, 'block', 'mlp' or 'attn'.
    window: layers restored at once; 1 for a block, whose output hides those
      of the layers below.
    sever: the part that keeps its corrupted output above, 'mlp' or 'attn', or
      None.
  """

  name: str
  part: str
  window: int = 1
  sever: str | None = None

  def layers(self, layer: int, count: int) -> tuple[int, int]:
    """The layers restored around `layer` of `count`: (first, one past last)."""
    half = self.window // 2
    return max(0, layer - half), min(count, layer + self.window - half)

  @property
  def program(self) -> Restoration:
    """What a compiled run depends on: windows of any size share a program."""
    return self._replace(name=self.part, window=min(self.window, 2))


def restoration(name: str, window: int = WINDOW) -> Restoration:
  """Returns one of `NAMES`; a block's window is 1 in any case."""
  part, sever = _PARTS[name]
  return Restoration(name, part, 1 if part == 'block' else window, sever)


HIDDEN = restoration('hidden')
