"""Draws what becomes of sequences of edits, one line a run.

  python -m experiments.edit --method=grace --data=facts.jsonl --batch_size=10 \
    --judge_at=10,100,200 --output_dir=runs/grace     # and others alike
  python -m experiments.plot_sequences --runs=runs/grace,runs/memit --out=runs.svg
"""

from __future__ import annotations

from absl import flags

from jaxedit.runs import cli, curves


def define_flags() -> None:
  """Defines this program's flags."""
  flags.DEFINE_list(
      'runs', [], 'Output folders of sequences that ran with --judge_at.'
  )
  flags.DEFINE_list(
      'metrics', list(curves.METRICS), 'Metrics to draw, a picture each.'
  )
  flags.DEFINE_string('out', 'sequences.svg', 'File to write, .svg or .png.')


def main() -> None:
  given = flags.FLAGS
  curves.write(given.runs, given.out, given.metrics)
  print(given.out)


if __name__ == '__main__':
  define_flags()
  cli.run(main)
