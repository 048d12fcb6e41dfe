"""Writes what a benchmark measured: a section of Markdown, and a plot.

The section names its command, commit, hardware, date and versions, as every
figure in BENCHMARKS.md does. Nothing here measures.
"""

from __future__ import annotations

import contextlib
import datetime
import os
import pathlib
import platform
import re
import shlex
import statistics
import subprocess
from collections.abc import Mapping, Sequence
from typing import Any

from jaxedit import io
from jaxedit.placement import device_names, one_device
from jaxedit.runs import provenance

_GIGA = 1e9
NO_PLOT = (
    'no plot: matplotlib is not installed; run `pip install "jaxedit[plot]"`'
)
_ARTICLES = {'edit': 'an edit', 'token': 'a token', 'layer': 'a layer'}
# Stages that every edit pays for, in the order in which they run.
_PER_EDIT = ('prefill', 'optimize', 'insert', 'merge', 'evaluate', 'answer')


def hardware() -> str:
  """Names the machine in one line."""
  memory = os.sysconf('SC_PAGE_SIZE') * os.sysconf('SC_PHYS_PAGES') / 2**30
  host = f'{os.cpu_count()} cores of {_processor()}, {memory:.0f} GiB'
  placement = one_device()
  if not placement.accelerated:
    return host
  size = placement.memory.get('bytes_limit', 0) / 2**30
  return (
      f'{device_names()} ({size:.0f} GiB of one for JAX), of which one is used;'
      f' host {host}'
  )


def _processor() -> str:
  """The processor's name."""
  with contextlib.suppress(OSError):
    about = pathlib.Path('/proc/cpuinfo').read_text()
    if found := re.search(r'^model name\s*:\s*(.+)', about, re.MULTILINE):
      return found[1].strip()
  return platform.processor() or platform.machine()


def commit() -> str | None:
  """The short commit of this source tree, '+' where files are changed."""
  root = pathlib.Path(__file__).resolve().parents[2]

  def git(*arguments: str) -> str:
    return subprocess.run(
        ['git', '-C', str(root), *arguments],
        capture_output=True,
        text=True,
        check=True,
    ).stdout.strip()

  try:
    changed = git('status', '--porcelain', '--untracked-files=no')
    return git('rev-parse', '--short', 'HEAD') + ('+' if changed else '')
  except (OSError, subprocess.CalledProcessError):
    return None


def origin(arguments: Sequence[str]) -> dict[str, Any]:
  """Where figures come from.

  Args:
    arguments: the flags as they were given.
  """
  command = ['python', '-m', 'experiments.benchmark', *arguments]
  return {
      'command': shlex.join(command),
      'commit': commit(),
      'hardware': hardware(),
      'load': os.getloadavg()[0],
      'date': datetime.date.today().isoformat(),
      'versions': provenance.versions(),
  }


def section(results: Mapping[str, Any]) -> str:
  """Writes a section of Markdown.

  Args:
    results: as in results.json.

  Returns:
    The section, from its heading to a line break.
  """
  where, work = results['origin'], results['workload']
  versions = where['versions']
  what = 'long answers' if 'chunks' in work else 'edits'
  title = f'## Benchmark: {work["preset"]}, {work["edits"]} {what}'
  lines = [
      f'{title} ({where["commit"] or "no commit"}, {where["date"]})',
      '',
      f'`{where["command"]}`',
      '',
      f'{where["hardware"]}; load average {where["load"]:.1f} at the start;'
      f' Python {versions["python"]}, jax {versions["jax"]}. {_workload(work)}',
      '',
      _ceiling_line(results['ceilings']),
      '',
      *_table(results),
      '',
      *_whole_lines(results['stages']),
      _optimize_line(results),
      *_answer_lines(results),
  ]
  if results.get('baseline'):
    lines += ['', *_baseline_lines(results['baseline'], 'chunks' in work)]
  return '\n'.join(lines) + '\n'


def _workload(work: Mapping[str, Any]) -> str:
  """Describes what was run."""
  weights = 'random' if work['random'] else 'real'
  kind = work['dtype']
  if kind != 'float32':
    kind += f', activations in {work["activations"]} while states are optimised'
  return (
      f'{work["parameters"] / _GIGA:.3g}B {weights} weights in {kind},'
      f' edited layers {work["layers"]} of {work["model_layers"]}'
      f' ({work["source"]}); {_rows(work)}; compilation cache'
      f' {"empty" if work["cold"] else "as found"}.'
  )


def _rows(work: Mapping[str, Any]) -> str:
  """Describes the rows of an edit."""
  if 'chunks' not in work:
    return (
        f'{work["contexts"]} contexts an edit, {work["tokens"]:.1f} tokens and'
        f' {work["suffix"]:.1f} suffix tokens a row,'
        f' {work["labels"]:.1f} labels'
    )
  least, most = work['answer']
  chunks, settings = work['chunks'], work['settings']
  shared = f', {chunks["overlap"]} shared' if chunks['overlap'] else ''
  return (
      f'AnyEdit on passages, each edited alone: {work["question"]:.1f} tokens a'
      f' question with the chat template, {least} to {most} an answer with its'
      f' end, in {work["states"]:.1f} chunks of {chunks["window"]}{shared};'
      f' {settings["steps"]} steps a chunk at most, at a rate of'
      f' {settings["rate"]:g}, down to {settings["threshold"]:g} nats'
  )


def _ceiling_line(ceilings: Mapping[str, float]) -> str:
  """The ceilings in one sentence."""
  names = {
      'bfloat16': 'bf16',
      'float32': "f32 'highest'",
      'tf32': 'TF32 (not used here: f32 runs at highest precision)',
      'float64': 'f64',
  }
  parts = [
      f'{names[dtype]} {rate / _GIGA:,.0f}' for dtype, rate in ceilings.items()
  ]
  return f'Large matmuls in the same process, GFLOP/s: {", ".join(parts)}.'


def _table(results: Mapping[str, Any]) -> list[str]:
  """One row a stage."""
  lines = [
      '| stage | seconds | spread | compile, s | GFLOP | GB read'
      ' | of the ceiling | peak memory so far, GiB |',
      '|---|---|---|---|---|---|---|---|',
  ]
  for stage in results['stages']:
    # No answer may have a token, where weights are random.
    count = max(stage['count'], 1)
    warm = stage['seconds'][1:] or stage['seconds']
    flops = sum(stage['flops'].values()) / count
    cells = (
        f'{stage["name"]}, {_ARTICLES[stage["unit"]]}',
        _seconds(stage['median_seconds'] / count),
        f'{_seconds(min(warm) / count)} to {_seconds(max(warm) / count)}',
        f'{stage["compile_seconds"]:.1f}',
        f'{flops / _GIGA:,.3g}',
        f'{stage["bytes"] / count / _GIGA:.3g}',
        f'{stage["ceiling_share"]:.1%}',
        f'{stage["peak"] / 2**30:.1f}',
    )
    lines.append(f'| {" | ".join(cells)} |')
  return lines


def _seconds(value: float) -> str:
  """Three digits, in a unit that suits."""
  for scale, unit in ((1, 's'), (1e-3, 'ms'), (1e-6, 'µs')):
    if value >= scale:
      return f'{value / scale:.3g} {unit}'
  return f'{value * 1e9:.3g} ns'


def _optimize_line(results: Mapping[str, Any]) -> str:
  """What lies behind the row of value optimisation."""
  stage = next(s for s in results['stages'] if s['name'] == 'optimize')
  more, floor = stage['more'], sum(stage['flops'].values())
  share = stage['ceiling_share']
  strict = share * more['strict_flops'] / floor
  run = share * more['computed_flops'] / floor
  beside = floor / more['pace'] / stage['median_seconds']
  work = results['workload']
  what = 'a chunk' if 'chunks' in work else 'an edit'
  text = (
      'Of the ceiling: the FLOPs that a stage cannot do without, over what the'
      ' matmul rate gives in its seconds. For optimisation these are 4 FLOPs a'
      ' weight for every suffix token in the layers above and for every scored'
      f' position in the head, at each step: {share:.1%}. Without a backward'
      f' pass in the last step of {what}: {strict:.1%}. Counting the KL row'
      f' and unused places as they were run: {run:.1%}. Large matmuls right'
      f' before and after the calls of the editor, {more["pace"] / _GIGA:,.0f}'
      f' GFLOP/s at the median, make it {beside:.1%} of theirs.'
      f' {more["steps_a_state"]:.1f} steps {what} in {more["pool_steps"]:.0f}'
      ' steps of the pool.'
  )
  if work['dtype'] != 'float32' and work['activations'] == 'float32':
    text += (
        ' Activations in float32 take two products of bfloat16 where one is'
        ' counted, or on a CPU products of float32.'
    )
  return text


def _answer_lines(results: Mapping[str, Any]) -> list[str]:
  """What lies behind the row of answers, if there is one."""
  found = []
  for stage in results['stages']:
    if stage['name'] == 'answer' and stage['count']:
      texts, count = stage['more']['texts'], stage['count']
      rate = count / stage['median_seconds']
      found += [
          '',
          f'Answers of {count / texts:.1f} tokens on average to {texts:.0f}'
          f' questions, each under its own change: {rate:.1f} tokens a second.',
      ]
  return found


def _whole_lines(stages: Sequence[Mapping[str, Any]]) -> list[str]:
  """From records to the merged change, where there is one change."""
  for stage in stages:
    if whole := stage.get('whole'):
      warm = statistics.median(whole[1:] or whole)
      return [
          f'All {stage["count"]} edits, from ids to the weights with their change,'
          f' by the clock: {_seconds(warm)}, and {_seconds(max(whole[0] - warm, 0))}'
          ' more the first time.',
          '',
      ]
  return []


def _baseline_lines(baseline: Mapping[str, Any], chunked: bool) -> list[str]:
  """The comparison with torch."""
  rounded = {None: '', False: ', TF32 off', True: ', TF32 on'}
  lines = [
      f'Against the published loop in PyTorch {baseline["torch"]} (one edit at'
      ' a time, full forwards, dense solves'
      f'{rounded[baseline.get("torch_tf32")]}), same edits, same process;'
      f' {baseline["edits"]} edits on its side, ours at their share of the'
      ' FLOPs:',
      '',
      '| stage | ours, an edit | torch, an edit | ratio | with compilation'
      ' | ratio of FLOPs |',
      '|---|---|---|---|---|---|',
  ]
  for name in ('optimize', 'insert', 'both'):
    part = baseline[name]
    lines.append(
        f'| {name} | {_seconds(part["seconds"])}'
        f' | {_seconds(part["torch_seconds"])} | {part["ratio"]:.1f}'
        f' | {part["ratio_with_compile"]:.1f} | {part["flop_ratio"]:.1f} |'
    )
  agree, what = baseline['agreement'], 'chunks' if chunked else 'edits'
  rate = baseline['optimize']['torch_flops_a_second'] / _GIGA
  lines += [
      '',
      f'While optimising torch ran at {rate:,.0f} GFLOP/s by its own count; on'
      ' CPU, far below the ceiling means that its threads waited for a core.',
      '',
      f'Agreement: equal step counts for {agree["equal_steps"]} of'
      f' {agree["states"]} {what}{_cosines(agree)}; changes of the kernels'
      f' differ by {agree["change_difference"]:.1e} relative (largest layer),'
      f' from the same wanted states by'
      f' {agree["change_difference_same_states"]:.1e}.',
  ]
  return lines


def _cosines(agree: Mapping[str, Any]) -> str:
  """How close wanted states are, where step counts agree."""
  if not agree['equal_steps']:
    return ''
  off = lambda name: (
      f'{1 - agree[f"{name}_cosine_median"]:.1e} at the median and'
      f' {1 - agree[f"{name}_cosine_min"]:.1e} at most'
  )
  return (
      f', whose z have a cosine short of 1 by {off("z")} (z - z0: {off("d")})'
  )


def append(path: pathlib.Path, text: str) -> None:
  """Appends a section to a file, which is replaced in one step.

  Args:
    path: the file; it may not exist.
    text: the section.

  Raises:
    InputError: it cannot be written.
  """
  before = path.read_text('utf-8') if path.exists() else '# Benchmarks\n'
  io.write_text(path, before.rstrip('\n') + '\n\n' + text)


def plot(results: Mapping[str, Any], folder: pathlib.Path) -> list[str]:
  """Draws where the time of an edit goes, as time.png and time.svg.

  Args:
    results: as in results.json.
    folder: where to write.

  Returns:
    What to tell the user.
  """
  try:
    import matplotlib
  except ImportError:
    return [NO_PLOT]
  matplotlib.use('Agg')
  from matplotlib import pyplot

  bars = _bars(results)
  figure, axes = pyplot.subplots(figsize=(8, 1.2 + 0.7 * len(bars)))
  names = list(dict.fromkeys(n for _, parts in bars for n in parts))
  for row, (_, parts) in enumerate(bars):
    left = 0.0
    for name, value in parts.items():
      color = f'C{names.index(name)}'
      axes.barh(row, value, left=left, color=color, label=name)
      left += value
  handles, labels = axes.get_legend_handles_labels()
  unique = dict(zip(labels, handles))
  axes.legend(unique.values(), unique.keys(), ncols=len(unique), fontsize=8)
  axes.set_yticks(range(len(bars)), [label for label, _ in bars])
  axes.invert_yaxis()
  axes.set_xlabel('seconds an edit')
  work = results['workload']
  axes.set_title(f'{work["preset"]}, {work["edits"]} edits, {work["dtype"]}')
  figure.tight_layout()
  paths = [folder / f'time.{ending}' for ending in ('png', 'svg')]
  for path in paths:
    figure.savefig(path)
  pyplot.close(figure)
  return [f'plot: {path}' for path in paths]


def _bars(results: Mapping[str, Any]) -> list[tuple[str, dict[str, float]]]:
  """(label, stage -> seconds an edit) of every bar."""
  stages = {s['name']: s for s in results['stages'] if s['name'] in _PER_EDIT}
  # Answers are counted by the token, a text an edit.
  edits = {n: s['more'].get('texts', s['count']) for n, s in stages.items()}
  shown = [name for name in _PER_EDIT if name in stages]
  an_edit = lambda key: {
      name: stages[name][key] / edits[name] for name in shown
  }
  bars = [
      ('jaxedit', an_edit('median_seconds')),
      ('compilation, once', an_edit('compile_seconds')),
  ]
  if results.get('baseline'):
    theirs = {
        name: results['baseline'][name]['torch_seconds']
        for name in ('optimize', 'insert')
    }
    bars.append(('torch loop', theirs))
  return bars
