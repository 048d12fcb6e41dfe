"""Writes a trace as one HTML page that needs no network and no script.

Averages come first, then facts as sections that open. Plots are SVG inside the
page and take its colours, light or dark; every one has a text in its place for
those who cannot see it. All numbers are those of results.json and facts.jsonl.
The page itself is page.html.j2.
"""

from __future__ import annotations

import functools
import html
import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

import jinja2

from jaxedit.trace import effects, figures, results


def page(
    report: Mapping[str, Any],
    rows: Sequence[Mapping[str, Any]],
    drawn: Mapping[str, str],
) -> str:
  """Writes the page.

  Args:
    report: as in results.json.
    rows: as in facts.jsonl.
    drawn: name -> SVG of a plot, see `plots.draw_all`; maybe none.

  Returns:
    The HTML document.
  """
  environment = jinja2.Environment(
      loader=jinja2.PackageLoader('jaxedit.trace', ''),
      autoescape=True,
      trim_blocks=True,
      lstrip_blocks=True,
  )
  return environment.get_template('page.html.j2').render(
      results=report,
      protocol=report['protocol'],
      effects=report['average_effects'],
      severed=_severed(report['average_effects']),
      cards=_cards(report),
      entries=_entries(report),
      rows=rows,
      drawn=drawn,
      maps=figures.MAPS,
      interval=results.interval,
      title=functools.partial(
          figures.title, window=report['protocol']['window']
      ),
      peak_list=_peak_list,
      svg=lambda name, text: inline(drawn[name], name, text),
  )


def inline(svg: str, name: str, text: str) -> str:
  """Makes an SVG file part of a page.

  Args:
    svg: as matplotlib writes it.
    name: of the plot; keeps its ids apart from those of other plots.
    text: what the plot shows.

  Returns:
    An <svg> element in the colours of the page.
  """
  svg = svg[svg.index('<svg') :]
  svg = re.sub(r'<metadata>.*?</metadata>', '', svg, flags=re.DOTALL)
  svg = re.sub(r' xmlns(:\w+)?="[^"]*"', '', svg)
  svg = re.sub(r'\s+', ' ', svg)
  svg = svg.replace(figures.INK, 'currentColor')
  svg = svg.replace(f'fill: {figures.PAPER}', 'fill: none')
  svg = re.sub(r' id="([^"]*)"', rf' id="{name}-\1"', svg)
  svg = re.sub(r'(url\(|href=")#', rf'\1#{name}-', svg)
  label = html.escape(text, quote=True)
  size = r'<svg([^>]*?) width="[^"]*"([^>]*?)>'
  svg = re.sub(r'<svg height="[^"]*"', '<svg', svg, count=1)
  svg = re.sub(size, r'<svg\1\2>', svg, count=1)
  return svg.replace('<svg', f'<svg role="img" aria-label="{label}"', 1)


def _peak_list(peaks: Mapping[str, Any]) -> str:
  """Names peaks in a line."""
  tops = {name: one['peak'] for name, one in peaks.items()}
  return '; '.join(
      f'{name}: {top["mean"]:+.3f} at layer {top["layer"]}'
      for name, top in tops.items()
  )


def _cards(report: Mapping[str, Any]) -> list[tuple[str, str, str]]:
  """The few numbers that come first: (what, value, more)."""
  split = lambda mean, half: results.interval(mean, half).partition(' ')[::2]
  cards = [
      ('facts traced', f'{report["facts"]["traced"]:,}', ''),
      ('p(answer), clean', f'{report["high"]:.3f}', ''),
      ('p(answer), corrupted', f'{report["low"]:.3f}', ''),
      ('total effect', *split(*report['total_effect'].values())),
  ]
  for name, roles in report['average_effects'].items():
    if name not in figures.MAPS:
      continue
    # The last state of all brings everything back, whatever was stored where.
    shown = [role for role in roles if (name, role) != ('hidden', 'last token')]
    role = max(shown or roles, key=lambda role: roles[role]['peak']['mean'])
    top = roles[role]['peak']
    value, half = split(top['mean'], top['half_width_95'])
    more = f'{half} {role}, layer {top["layer"]}'.strip()
    cards.append((f'{name}, largest effect', value, more))
  return cards


def _severed(table: Mapping[str, Any]) -> dict[str, Any]:
  """Ordinary and severed effects at the last subject token, if there are any."""
  role = effects.CLASSES[results.LAST_SUBJECT]
  severed = [name for name in table if name.startswith('severed')]
  ordinary = ['hidden'] if 'hidden' in table else []
  return {name: table[name][role] for name in severed and ordinary + severed}


def _entries(report: Mapping[str, Any]) -> dict[str, str]:
  """How the numbers were made."""
  work = report['work']
  return {
      **_flat(report['protocol']),
      'cells': f'{work["cells"]:,}',
      'FLOPs': f'{work["flops"]:.3g}; every cell from scratch'
      f' {work["naive_flops"]:.3g}, {work["ratio"]:.1f} times as many',
      'seconds': ', '.join(
          f'{stage} {value:.1f}' for stage, value in report['timing'].items()
      ),
      **report['versions'],
  }


def _flat(nested: Mapping[str, Any], lead: str = '') -> dict[str, str]:
  """Nested entries as lines; what is unset is left out."""
  out: dict[str, str] = {}
  for key, value in nested.items():
    if isinstance(value, Mapping):
      out |= _flat(value, f'{lead}{key} ')
    elif isinstance(value, bool):
      out[lead + key] = json.dumps(value)
    elif value is not None:
      shown = ', '.join(map(str, value)) if isinstance(value, list) else value
      out[lead + key] = str(shown)
  return out
