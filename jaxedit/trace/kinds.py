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

from collections.abc import Callable
from typing import NamedTuple

WINDOW = 10


class Kind(NamedTuple):
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


HIDDEN = Kind('hidden', 'block')


def mlp(window: int = WINDOW) -> Kind:
  """Restores the outputs of MLPs."""
  return Kind('mlp', 'mlp', window)


def attention(window: int = WINDOW) -> Kind:
  """Restores the outputs of attentions."""
  return Kind('attn', 'attn', window)


def severed_mlp(window: int = WINDOW) -> Kind:
  """Restores a block's output and holds the MLPs above."""
  del window  # a block's
  return Kind('severed_mlp', 'block', sever='mlp')


def severed_attention(window: int = WINDOW) -> Kind:
  """Restores a block's output and holds the attentions above."""
  del window
  return Kind('severed_attn', 'block', sever='attn')


KINDS: dict[str, Callable[[int], Kind]] = {
    'hidden': lambda window: HIDDEN,
    'mlp': mlp,
    'attn': attention,
    'severed_mlp': severed_mlp,
    'severed_attn': severed_attention,
}
