"""Writes a trace as one HTML page that needs no network and no script.

Averages come first, then facts as sections that open. Plots are SVG inside the
page and take its colours, light or dark; every one has a text in its place for
those who cannot see it. All numbers are those of results.json and facts.jsonl.
"""

from __future__ import annotations

import html
import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

from experiments import trace_figures, trace_results
from jaxedit.text import locate

_LISTED = 100  # facts left out that are named

_STYLE = """
:root{color-scheme:light dark;--ink:#1b1e24;--soft:#5b6270;--line:#dfe2e8;
--paper:#fff;--card:#f6f7f9;--mark:#e9e1f7;--accent:#5a3f96}
@media(prefers-color-scheme:dark){:root{--ink:#e6e8ec;--soft:#a2a9b6;
--line:#343943;--paper:#14161a;--card:#1d2026;--mark:#3b2f58;--accent:#bba6ec}}
*{box-sizing:border-box}
body{margin:0;background:var(--paper);color:var(--ink);
font:16px/1.5 system-ui,sans-serif}
main{max-width:1180px;margin:0 auto;padding:24px 16px 64px}
h1{font-size:1.6rem;line-height:1.2;margin:0 0 4px;overflow-wrap:anywhere}
h2{font-size:1.2rem;margin:40px 0 8px}
h3{font-size:1rem;margin:24px 0 8px}
p{max-width:75ch;margin:8px 0}
.soft,figcaption,.cards dt{color:var(--soft)}
.cards{display:grid;gap:12px;margin:20px 0;
grid-template-columns:repeat(auto-fit,minmax(150px,1fr))}
.cards div{background:var(--card);border-radius:10px;padding:12px 14px}
.cards dt{font-size:.85rem}
.cards dd{margin:0;font-size:1.35rem;font-variant-numeric:tabular-nums}
.cards small{display:block;font-size:.85rem;line-height:1.35;
color:var(--soft)}
.plots{display:grid;gap:16px;
grid-template-columns:repeat(auto-fill,minmax(min(100%,340px),1fr))}
figure{margin:0;min-width:0}
figure svg{display:block;width:100%;height:auto;max-width:520px}
.wide{overflow-x:auto}
table{border-collapse:collapse;font-size:.9rem;
font-variant-numeric:tabular-nums}
th,td{text-align:left;padding:4px 14px 4px 0;border-bottom:1px solid
var(--line);vertical-align:top}
th{font-weight:600}
td.n,th.n{text-align:right;white-space:nowrap}
details{border-bottom:1px solid var(--line)}
summary{cursor:pointer;padding:10px 0;overflow-wrap:anywhere}
summary:focus-visible{outline:2px solid var(--accent);outline-offset:2px}
details>:last-child{margin-bottom:20px}
mark{background:var(--mark);color:inherit;border-radius:4px;padding:0 3px}
.p{margin-left:10px;color:var(--soft);font-size:.9rem;white-space:nowrap;
font-variant-numeric:tabular-nums}
.protocol{display:grid;grid-template-columns:minmax(90px,max-content) 1fr;
gap:4px 16px;font-size:.9rem;margin:0}
.protocol dd{margin:0;overflow-wrap:anywhere}
.protocol dt{color:var(--soft)}
ul{padding-left:20px;overflow-wrap:anywhere}
@media(max-width:500px){th,td{padding-right:10px}}
"""


def page(
    results: Mapping[str, Any],
    rows: Sequence[Mapping[str, Any]],
    drawn: Mapping[str, str],
) -> str:
  """Writes the page.

  Args:
    results: as in results.json.
    rows: as in facts.jsonl.
    drawn: name -> SVG of a plot, see `trace_plots.draw_all`; maybe none.

  Returns:
    The HTML document.
  """
  name = html.escape(str(results['protocol']['model']))
  body = [
      _head(results),
      _suggested(results, drawn),
      _averages(results, drawn),
      _severed(results, drawn),
      _facts(results, rows, drawn),
      _protocol(results),
  ]
  return (
      '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
      '<meta name="viewport" content="width=device-width,initial-scale=1">'
      f'<title>Causal trace of {name}</title><style>{_STYLE}</style></head>'
      f'<body><main>{"".join(body)}</main></body></html>\n'
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
  svg = svg.replace(trace_figures.INK, 'currentColor')
  svg = svg.replace(f'fill: {trace_figures.PAPER}', 'fill: none')
  svg = re.sub(r' id="([^"]*)"', rf' id="{name}-\1"', svg)
  svg = re.sub(r'(url\(|href=")#', rf'\1#{name}-', svg)
  label = html.escape(text, quote=True)
  size = r'<svg([^>]*?) width="[^"]*"([^>]*?)>'
  svg = re.sub(r'<svg height="[^"]*"', '<svg', svg, count=1)
  svg = re.sub(size, r'<svg\1\2>', svg, count=1)
  return svg.replace('<svg', f'<svg role="img" aria-label="{label}"', 1)


def _plot(drawn: Mapping[str, str], name: str, text: str) -> str:
  """A figure, or nothing where it was not drawn."""
  if name not in drawn:
    return ''
  return f'<figure>{inline(drawn[name], name, text)}</figure>'


def _head(results: Mapping[str, Any]) -> str:
  """Title and the few numbers that come first."""
  protocol, noise = results['protocol'], results['protocol']['noise']
  total = results['total_effect']
  cards = [
      ('facts traced', f'{results["facts"]["traced"]:,}', ''),
      ('p(answer), clean', f'{results["high"]:.3f}', ''),
      ('p(answer), corrupted', f'{results["low"]:.3f}', ''),
      ('total effect', *_split(total['mean'], total['half_width_95'])),
  ]
  for kind, roles in results['average_effects'].items():
    if kind not in trace_figures.MAPS:
      continue
    # The last state of all brings everything back, whatever was stored where.
    told = [n for n in roles if (kind, n) != ('hidden', 'last token')]
    role = max(told or roles, key=lambda name: roles[name]['peak']['mean'])
    top = roles[role]['peak']
    value, half = _split(top['mean'], top['half_width_95'])
    cards.append(
        (
            f'{kind}, largest effect',
            value,
            f'{half} {role}, layer {top["layer"]}'.strip(),
        )
    )
  made = ''.join(
      f'<div><dt>{html.escape(name)}</dt><dd>{value} <small>{html.escape(more)}'
      '</small></dd></div>'
      for name, value, more in cards
  )
  return (
      f'<h1>Causal trace of {html.escape(str(protocol["model"]))}</h1>'
      f'<p class="soft">{protocol["layers"]} layers, {protocol["dtype"]};'
      f' {noise["kind"]} noise of scale {noise["scale"]:.3g}'
      f' ({html.escape(noise["level"])}), {noise["draws"]} draws a fact.</p>'
      f'<dl class="cards">{made}</dl>'
  )


def _split(mean: float, half: float | None) -> tuple[str, str]:
  """A mean, and half of its interval where there is one."""
  text = trace_results.interval(mean, half)
  value, _, rest = text.partition(' ')
  return value, rest


def _suggested(results: Mapping[str, Any], drawn: Mapping[str, str]) -> str:
  """The layers to edit, where they were searched."""
  if 'suggested' not in results:
    return ''
  found = results['suggested']
  names = ('score', 'es', 'ps', 'ns')
  rows = ''
  for one in found['tries']:
    layers = ', '.join(map(str, one['layers']))
    cells = ''.join(f'<td class="n">{one[name]:.3f}</td>' for name in names)
    rows += f'<tr><td>{layers}</td>{cells}</tr>'
  heads = ''.join(f'<th class="n">{name.upper()}</th>' for name in names)
  told, judged = '', found['proposal']
  if judged:
    layers = ', '.join(map(str, judged['layers']))
    told = (
        f'<p>The proposed layers {layers} score {judged["score"]:.3f} on these'
        f' facts, {judged["difference"]:.3f} below the best (95% interval'
        f' {judged["low"]:.3f} to {judged["high"]:.3f}).</p>'
    )
  text = 'MEMIT score by the last edited layer, over the effects by layer.'
  return (
      '<h2>Layers to edit</h2><p>MEMIT on'
      f' {found["facts"]} facts in one batch, the best layers first; the score is'
      ' the harmonic mean of ES, PS and NS.</p>'
      f'{told}<div class="plots">{_plot(drawn, "suggest", text)}<div class="wide">'
      f'<table><thead><tr><th>layers</th>{heads}</tr></thead><tbody>{rows}'
      '</tbody></table></div></div>'
  )


def _averages(results: Mapping[str, Any], drawn: Mapping[str, str]) -> str:
  """Effects averaged over facts."""
  window, parts = results['protocol']['window'], []
  kinds = [k for k in results['average_effects'] if k in trace_figures.MAPS]
  for kind in kinds:
    roles = results['average_effects'][kind]
    told = '; '.join(
        f'{role}: {one["peak"]["mean"]:+.3f} at layer {one["peak"]["layer"]}'
        for role, one in roles.items()
    )
    title = trace_figures.title(kind, window)
    text = f'{title}. Largest average indirect effects: {told}.'
    plots = ''.join(
        _plot(drawn, f'{name}_{kind}', f'{what} {text}')
        for name, what in (
            ('average_map', 'Heat map by token role and layer.'),
            ('average', 'Lines by layer, one a token role.'),
        )
    )
    parts.append(
        f'<h3>{html.escape(title)}</h3><div class="plots">{plots}'
        f'{_peaks(roles)}</div>'
    )
  if not parts:
    return ''
  return (
      '<h2>Averages</h2><p>How much of p(answer) comes back when one clean'
      ' state is put into the corrupted run, averaged over the facts that have a'
      ' token of that role. Bands and &plusmn; are 95% intervals over facts.</p>'
      + ''.join(parts)
  )


def _peaks(roles: Mapping[str, Any], of: str = 'token') -> str:
  """A table of the largest effect of every role, or kind."""
  rows = ''
  for role, one in roles.items():
    top = one['peak']
    effect = trace_results.interval(top['mean'], top['half_width_95'])
    rows += (
        f'<tr><td>{html.escape(role)}</td><td class="n">{one["facts"]}</td>'
        f'<td class="n">{top["layer"]}</td><td class="n">{effect}</td></tr>'
    )
  return (
      f'<div class="wide"><table><thead><tr><th>{of}</th>'
      '<th class="n">facts</th>'
      '<th class="n">layer</th><th class="n">largest effect</th></tr></thead>'
      f'<tbody>{rows}</tbody></table></div>'
  )


def _severed(results: Mapping[str, Any], drawn: Mapping[str, str]) -> str:
  """Ordinary against severed effects."""
  effects = results['average_effects']
  role = 'last subject token'
  rows = {k: {k: effects[k][role]} for k in effects if k.startswith('severed')}
  if not rows:
    return ''
  shown = {'hidden': effects['hidden'][role]} if 'hidden' in effects else {}
  shown |= {kind: one[kind] for kind, one in rows.items()}
  told = '; '.join(
      f'{kind}: {one["peak"]["mean"]:+.3f} at layer {one["peak"]["layer"]}'
      for kind, one in shown.items()
  )
  return (
      '<h2>Severed paths</h2><p>The same at the last subject token, while MLPs'
      ' or attentions above the restored layer keep their corrupted output there.'
      ' What is lost went through them.</p><div class="plots">'
      + _plot(drawn, 'severed', f'Bars by layer. Largest effects: {told}.')
      + _peaks(shown, 'restored')
      + '</div>'
  )


def _facts(
    results: Mapping[str, Any],
    rows: Sequence[Mapping[str, Any]],
    drawn: Mapping[str, str],
) -> str:
  """Every fact as a section that opens."""
  window = results['protocol']['window']
  only = ' open' if len(rows) == 1 else ''
  parts = [_fact(row, window, drawn, only) for row in rows]
  return (
      f'<h2>{"Facts" if len(rows) > 1 else "Fact"}</h2><p class="soft">The'
      ' subject is marked; p(answer) clean, then corrupted.</p>'
      + ''.join(parts)
  )


def _fact(
    row: Mapping[str, Any], window: int, drawn: Mapping[str, str], state: str
) -> str:
  plots, cells = [], []
  for kind, best in row['best'].items():
    where = f'{best["token"].strip()!r} at layer {best["layer"]}'
    text = (
        f'{trace_figures.title(kind, window)}: heat map of p(answer) by token'
        f' and layer for "{row["prompt"]}". Largest {best["score"]:.3f}, {where}.'
    )
    plots.append(_plot(drawn, f'fact_{row["number"]:05}_{kind}', text))
    cells.append(
        f'<tr><td>{html.escape(kind)}</td><td>{html.escape(best["token"])}</td>'
        f'<td class="n">{best["layer"]}</td>'
        f'<td class="n">{best["score"]:.3f}</td>'
        f'<td class="n">{best["effect"]:+.3f}</td></tr>'
    )
  return (
      f'<details{state}><summary>{_prompt(row)} <span class="p">'
      f'{row["high"]:.3f} &rarr; {row["low"]:.3f}</span></summary>'
      f'<div class="plots">{"".join(plots)}</div>'
      '<div class="wide"><table><thead>'
      '<tr><th>restored</th><th>best token</th><th class="n">layer</th>'
      '<th class="n">p(answer)</th><th class="n">effect</th></tr></thead>'
      f'<tbody>{"".join(cells)}</tbody></table></div></details>'
  )


def _prompt(row: Mapping[str, Any]) -> str:
  """The prompt with its subject marked, and the answer."""
  before, _, after = row['cloze'].partition(locate.PLACEHOLDER)
  answer = html.escape(row['answer'].strip()) or '(white space)'
  missed = ''
  if row['completes'] == 'misses':
    missed = f' <span class="soft">(not {html.escape(row["attribute"])})</span>'
  return (
      f'{html.escape(before)}<mark>{html.escape(row["subject"])}</mark>'
      f'{html.escape(after)} <strong>{answer}</strong>{missed}'
  )


def _protocol(results: Mapping[str, Any]) -> str:
  """How the numbers were made, and what was left out."""
  work = results['work']
  entries = {
      **_flat(results['protocol']),
      'cells': f'{work["cells"]:,}',
      'FLOPs': f'{work["flops"]:.3g}; every cell from scratch'
      f' {work["naive_flops"]:.3g}, {work["ratio"]:.1f} times as many',
      'seconds': ', '.join(
          f'{stage} {value:.1f}' for stage, value in results['timing'].items()
      ),
      **results['versions'],
  }
  terms = ''.join(
      f'<dt>{html.escape(k)}</dt><dd>{html.escape(str(v))}</dd>'
      for k, v in entries.items()
  )
  out = f'<h2>Protocol</h2><dl class="protocol">{terms}</dl>'
  skipped = results['skipped']
  if not skipped:
    return out
  items = ''.join(
      f'<li>record {one["number"]} (id {html.escape(str(one["id"]))})'
      f' {html.escape(one["reason"])}</li>'
      for one in skipped[:_LISTED]
  )
  if len(skipped) > _LISTED:
    items += f'<li>and {len(skipped) - _LISTED} more, see results.json</li>'
  return (
      f'{out}<details><summary>{len(skipped)} facts left out</summary>'
      f'<ul>{items}</ul></details>'
  )


def _flat(nested: Mapping[str, Any], lead: str = '') -> dict[str, str]:
  """Nested entries as lines; what is unset is left out."""
  out: dict[str, str] = {}
  for key, value in nested.items():
    if isinstance(value, Mapping):
      out |= _flat(value, f'{lead}{key} ')
    elif value is not None:
      shown = ', '.join(map(str, value)) if isinstance(value, list) else value
      out[lead + key] = (
          json.dumps(shown) if isinstance(shown, bool) else str(shown)
      )
  return out
