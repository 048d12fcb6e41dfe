"""What a benchmark is told, beside model, edits and folder: a dataclass, which is
also the list of its flags.
"""

from __future__ import annotations

import dataclasses

from experiments.benchmark import torch_model
from experiments.benchmark.presets import PRESETS
from jaxedit.methods.memit import MemitConfig
from jaxedit.methods.settings import setting
from jaxedit.runs import cli
from jaxedit.runs import config as config_lib
from jaxedit.runs.config import RunConfig
from jaxedit.text import chunking, templates
from jaxedit.types import InputError

# Those of `RunConfig` that a benchmark has as well.
RUN_FIELDS = cli.MODEL_FIELDS + (
    'data', 'num_edits', 'max_answer_tokens', 'on_bad_record', 'slots',
    'memory_gib', 'context_templates', 'eval_batch_size', 'output_dir',
    'overwrite',
)  # fmt: skip


@dataclasses.dataclass(frozen=True)
class BenchmarkConfig:
  """Settings of a benchmark; help, units and choices stand with the fields."""

  # What is edited, and how.
  preset: str = setting(
      'smollm2',
      'shape and settings. smollm2 edits --model itself; the others have random'
      ' weights and take only the tokenizer from --model',
      choices=tuple(PRESETS),
  )
  scale_layers: float = setting(
      1.0,
      'factor on the number of layers of a random model, 1 at most; for trying'
      ' the program out',
      exclusive=True,
  )
  scale_width: float = setting(
      1.0, 'the same for its heads and widths', exclusive=True
  )
  moments: str | None = setting(
      None,
      'second moments: "self" (sampled from the model, kept for the next run),'
      ' "random", or a file of collect_moments. Default: "self" for smollm2, else'
      ' "random"',
  )
  layers: tuple[int, ...] | None = setting(
      None, "layers to edit; the preset's own unless given"
  )
  value_steps: int | None = setting(
      None, "most steps a target; the preset's own unless given", low=1
  )
  activations: str = setting(
      'float32',
      'dtype of activations while targets are optimised, where weights are'
      ' bfloat16',
      choices=('float32', 'bfloat16'),
  )
  window: int = setting(
      0,
      'tokens a chunk of a long answer (AnyEdit; published 40 for Llama-3); 0'
      ' edits facts',
      low=0,
  )
  overlap: int = setting(0, 'tokens that neighbouring chunks share', low=0)

  # What is timed.
  repeat: int = setting(3, 'warm calls of every stage', low=1)
  cold: bool = setting(
      False, 'compile everything anew: use an empty compilation cache'
  )
  moments_rows: int = setting(
      4,
      'sequences of 512 tokens a batch in the stage that times moments; more on'
      ' an accelerator',
      low=1,
  )
  moments_tokens: int | None = setting(
      None,
      'also time second moments from the first text to the averages, over so many'
      ' random tokens (10 to 20 a key dimension are of use)',
      low=1,
  )
  max_new_tokens: int = setting(
      64,
      'longest answer given in the stage "answer"; 0 leaves it out',
      unit='tokens',
      low=0,
  )
  baseline: str = setting(
      'none',
      'also run the published loop in PyTorch. On a GPU leave it memory:'
      ' XLA_PYTHON_CLIENT_PREALLOCATE=false',
      choices=('none', 'torch'),
  )
  baseline_edits: int = setting(
      8, 'edits that the baseline optimises and inserts', low=1
  )
  ceiling_size: int | None = setting(
      None,
      'size of the square matrices that measure the ceiling, and the rate beside'
      ' the calls of the editor (default: 2048 on CPU, 8192 elsewhere)',
      low=8,
  )
  append: str | None = setting(
      None, 'file to add the section to, e.g. BENCHMARKS.md'
  )

  @property
  def moments_file(self) -> str | None:
    """The file of second moments, if one is named."""
    return None if self.moments in ('self', 'random') else self.moments


def define_flags() -> None:
  """Defines the flags of a benchmark."""
  cli.define(RunConfig, names=RUN_FIELDS, num_edits=32)
  cli.define(BenchmarkConfig)


def errors(config: RunConfig, settings: BenchmarkConfig) -> list[str]:
  """Finds settings that cannot be used; messages."""
  problems = config_lib.errors(
      dataclasses.replace(config, moments=settings.moments_file)
  )
  method = MemitConfig(activations=settings.activations)
  problems += [f'--{problem}' for problem in method.errors(config.dtype)]
  scales = (settings.scale_layers, settings.scale_width)
  if max(scales) > 1:
    problems.append('--scale_layers and --scale_width: give 1 at most')
  if settings.preset == 'smollm2' and scales != (1, 1):
    problems.append(
        '--scale_layers and --scale_width shrink random models, and the weights'
        ' of --preset=smollm2 are real: choose another preset or leave them out'
    )
  if settings.window and config.context_templates:
    problems.append(
        '--context_templates are for facts, and --window edits long answers,'
        ' which have no contexts: leave one of them out'
    )
  alone = {
      'overlap': settings.overlap,
      'max_answer_tokens': config.max_answer_tokens,
  }
  problems += [
      f'--{name} is about long answers: give --window too, or leave it out'
      for name, given in alone.items()
      if given and not settings.window
  ]
  chunks = chunking.Chunking(settings.window, settings.overlap)
  checks = (
      lambda: settings.window and chunking.check_chunking(chunks),
      lambda: settings.baseline == 'torch' and torch_model.require(),
      lambda: config.context_templates
      and templates.load_templates(config.context_templates),
  )
  for check in checks:
    with InputError.collected(problems):
      check()
  return problems
