"""What a tracing run is told, beside model, folder and method: a dataclass, which
is also the list of its flags.
"""

from __future__ import annotations

import dataclasses

from jaxedit.methods.settings import setting
from jaxedit.trace import noise
from jaxedit.trace.facts import TraceConfig
from jaxedit.trace.plots import FORMATS
from jaxedit.trace.restoration import NAMES

# Those of `RunConfig` that a tracing run has as well.
RUN_FIELDS = (
    'on_bad_record',
    'output_dir',
    'overwrite',
    'dry_run',
    'context_templates',
    'moments',
    'moments_corpus',
    'moments_tokens',
)


@dataclasses.dataclass(frozen=True)
class TraceRunConfig(TraceConfig):
  """Settings of a tracing run."""

  # The facts.
  data: str = setting(
      'demo',
      'facts: "demo", or a file: the known facts of ROME (known_1000.json:'
      ' subject, attribute, prompt), or facts to edit, whose true object is what'
      ' the model should know (CounterFact, zsRE, jaxedit/eval/datasets.py)',
  )
  prompt: str | None = setting(
      None, 'trace this text alone, its subject filled in'
  )
  subject: str | None = setting(None, 'the subject of --prompt')
  num_facts: int | None = setting(
      None,
      'trace the first N facts that the model completes: its most probable next'
      ' token, decoded and without white space, is the attribute, or it is the'
      " attribute's first token. All of them unless given",
      low=1,
  )
  keep_wrong: bool = setting(
      False,
      'trace facts that the model does not complete, too. What is scored is its'
      ' own most probable next token in any case',
  )

  # The search for layers.
  suggest_layers: bool = setting(
      False,
      'also search the layers to edit with MEMIT: the traces say how far up to'
      ' look, MEMIT is tried on --probe_facts facts, and suggested.flags is a'
      ' flagfile for memit_batch. Value, moment and --moment_weight flags are'
      ' those of memit_batch',
  )
  probe_data: str | None = setting(
      None,
      'facts to try MEMIT on, as --data of memit_batch; --data unless given',
  )
  probe_facts: int = setting(50, 'how many of them', low=2)
  probe_skip: int = setting(0, 'how many good ones to pass over first', low=0)
  probe: str = setting(
      'search',
      'try anchors coarsely and then near the best, or all there are',
      choices=('search', 'all'),
  )
  probe_widths: tuple[str, ...] = setting(
      ('1', '5'), 'numbers of layers that are edited together'
  )
  proposal: str | None = setting(
      None,
      'suggest.json of an earlier search: its layers are compared with the best'
      ' that is found here (with --probe=all: the best there is). Facts that'
      ' the search tried or traced are passed over',
  )

  # The plots.
  plots: bool = setting(True, 'draw plots; --noplots needs no matplotlib')
  formats: tuple[str, ...] = setting(FORMATS, 'of plot files: png, svg')
  fact_plots: int = setting(30, 'facts with heat maps of their own', low=0)


def errors(config: TraceRunConfig) -> list[str]:
  """Finds settings that cannot be used; messages."""
  problems = []
  if (config.prompt is None) != (config.subject is None):
    problems.append('--prompt and --subject go together: give both or neither')
  for flag, known in (('kinds', NAMES), ('formats', FORMATS)):
    names = getattr(config, flag)
    given = f'--{flag}={",".join(names)}'
    if not names or not set(names) <= set(known):
      problems.append(f'{given}: give some of {", ".join(known)}')
    elif len(set(names)) < len(names):
      problems.append(f'{given}: names something twice')
  return problems + noise.errors(config.noise, '--noise')
