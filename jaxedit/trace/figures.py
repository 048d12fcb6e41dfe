"""Draws traces: heat maps of facts, average effects by token, severed bars.

  heat map   tokens down, layers across, colour p(answer) with a state restored
  lines      average indirect effect by layer, one line a role of a token, with
             its 95 % interval
  bars       ordinary effects at the last subject token, severed ones as steps

Every function makes one matplotlib figure. As SVG its text stays text, and a
map is one small picture.

The form of the heat maps and bars follows Meng et al. 2022 (ROME, arXiv
2202.05262), figures 1 to 3; colours of lines are those of Okabe and Ito.
"""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from jaxedit.trace import effects

# Ink and paper of every figure; a page puts its own colours in their place.
INK, PAPER = '#1b1e24', '#ffffff'
MAPS = {'hidden': 'Purples', 'mlp': 'Greens', 'attn': 'Reds'}
LINES = ('#0072b2', '#56b4e9', '#d55e00', '#e69f00', '#009e73', '#cc79a7')
_STRONG = (2, 5)  # last subject token, last token
# Restoration -> its name in the plot of severed paths, and its colour.
_SEVERED = {
    'hidden': ('ordinary', '#8f7cc0'),
    'severed_mlp': ('MLPs severed', '#2f9a48'),
    'severed_attn': ('attentions severed', '#d2483f'),
}
_STYLE = {
    'axes.edgecolor': INK,
    'axes.facecolor': PAPER,
    'axes.labelcolor': INK,
    'axes.spines.right': False,
    'axes.spines.top': False,
    'axes.titlesize': 10,
    'figure.facecolor': PAPER,
    'font.size': 9,
    'legend.frameon': False,
    'savefig.facecolor': PAPER,
    'svg.fonttype': 'none',
    'svg.hashsalt': 'trace',
    'text.color': INK,
    'text.parse_math': False,
    'xtick.color': INK,
    'ytick.color': INK,
}
_WIDTH = 4.5  # inches; 432 px, so that a phone shows it at nearly full size
_LONGEST = 16  # characters of a token that are shown


def title(name: str, window: int) -> str:
  """Says what is restored."""
  layers = 'one layer' if window == 1 else f'{window} layers'
  return {
      'hidden': 'Hidden state restored in one layer',
      'mlp': f'MLP outputs restored in {layers}',
      'attn': f'Attention outputs restored in {layers}',
      'severed_mlp': 'Hidden state restored, MLPs above severed',
      'severed_attn': 'Hidden state restored, attentions above severed',
  }[name]


def token_label(text: str, in_subject: bool) -> str:
  """Makes a token readable on an axis, with a star inside the subject."""
  shown = ''.join(c if c.isprintable() else '\N{RETURN SYMBOL}' for c in text)
  shown = shown.strip() or '\N{OPEN BOX}'
  if len(shown) > _LONGEST:
    shown = shown[: _LONGEST - 1] + '\N{HORIZONTAL ELLIPSIS}'
  return shown + '*' * in_subject


def heat_map(
    values: np.ndarray,
    labels: Sequence[str],
    *,
    name: str,
    window: int,
    bar: str,
    floor: float,
) -> Any:
  """Draws one value a token and layer.

  Args:
    values: [rows, L]; NaN is left blank.
    labels: what the rows are.
    name: of the restoration; chooses colours and titles.
    window: layers restored at once.
    bar: what the values are.
    floor: value of the palest colour.
  """
  with styled():
    figure, axes = new(1.05 + 0.2 * len(labels))
    most = float(np.nanmax(values))
    image = axes.imshow(
        np.ma.masked_invalid(values),
        cmap=MAPS[name],
        vmin=floor,
        vmax=most if most > floor else floor + 1e-6,
        aspect='auto',
        interpolation='none',  # the cells themselves go into an SVG
    )
    axes.set_yticks(range(len(labels)), labels)
    axes.tick_params(axis='y', length=0)
    axes.spines[:].set_visible(False)
    _layers(axes, values.shape[1], name, window)
    colours = figure.colorbar(image, ax=axes, pad=0.02, aspect=24)
    colours.solids.set_rasterized(True)
    colours.outline.set_visible(False)
    colours.set_label(bar)
  return figure


def effect_lines(average: effects.Average, *, name: str, window: int) -> Any:
  """Draws average indirect effects of a restoration by layer, a line a role."""
  with styled():
    figure, axes = new(3.6)
    for row, role in enumerate(effects.CLASSES):
      mean, half = average.mean[row], average.half_width[row]
      if np.isnan(mean).all():
        continue
      axes.plot(
          np.arange(len(mean)), mean, color=LINES[row],
          linewidth=2 if row in _STRONG else 1.2,
          label=f'{role} ({average.count[row]})',
      )  # fmt: skip
      _band(axes, mean, half, color=LINES[row])
    _effects(axes)
    _layers(axes, average.mean.shape[1], name, window)
    figure.legend(loc='outside lower center', ncols=2, fontsize=8)
  return figure


def severed_bars(averages: Mapping[str, effects.Average]) -> Any:
  """Draws ordinary effects as bars and severed ones as steps before them."""
  row = effects.CLASSES.index('last subject token')
  shown = {name: averages[name] for name in _SEVERED if name in averages}
  with styled():
    figure, axes = new(3.4)
    for name, average in shown.items():
      label, colour = _SEVERED[name]
      mean, half = average.mean[row], average.half_width[row]
      x = np.arange(len(mean))
      if name == 'hidden':  # its interval would lie over all others
        axes.bar(x, mean, 0.9, color=colour, alpha=0.45, label=label)
        continue
      axes.plot(
          x, mean, color=colour, label=label, linewidth=2, drawstyle='steps-mid'
      )
      _band(axes, mean, half, color=colour, step='mid')
    _effects(axes)
    axes.set_title('Last subject token, ordinary and severed', loc='left')
    _ticks(axes, len(mean), 'restored layer')
    figure.legend(loc='outside lower center', ncols=len(shown), fontsize=8)
  return figure


def _band(axes: Any, mean: np.ndarray, half: np.ndarray, **look: Any) -> None:
  """Draws intervals, if there are any."""
  if not np.isnan(half).all():
    x = np.arange(len(mean))
    axes.fill_between(x, mean - half, mean + half, alpha=0.18, lw=0, **look)


def _effects(axes: Any) -> None:
  axes.axhline(0, color=INK, linewidth=0.6)
  axes.set_ylabel('average effect')


def new(height: float, rows: int = 1) -> tuple[Any, Any]:
  """Makes an empty figure.

  Args:
    height: in inches.
    rows: of axes, which share the horizontal one.

  Returns:
    (figure, its axes).
  """
  # Not pyplot: it would keep every figure.
  from matplotlib import figure as figure_lib

  figure = figure_lib.Figure(figsize=(_WIDTH, height), layout='constrained')
  return figure, figure.subplots(rows, sharex=True)


def _layers(axes: Any, count: int, name: str, window: int) -> None:
  several = name in ('mlp', 'attn') and window > 1
  label = f'centre of the {window} restored layers' if several else None
  axes.set_title(title(name, window), loc='left')
  _ticks(axes, count, label or 'restored layer')


def _ticks(axes: Any, count: int, label: str) -> None:
  step = next(s for s in (1, 2, 5, 10, 20, 50) if count <= 12 * s)
  axes.set_xticks(range(0, count, step))
  axes.set_xlabel(label)


@contextlib.contextmanager
def styled() -> Iterator[None]:
  """The look of all figures; characters that a font lacks are no news."""
  import matplotlib

  with warnings.catch_warnings(), matplotlib.rc_context(_STYLE):
    warnings.filterwarnings('ignore', message='Glyph .* missing')
    yield
