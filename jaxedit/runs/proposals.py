"""Proposes a setting of a method from the data of a run, e.g. --suggest_radius.

The command is that of the run with the flag added; nothing is edited and nothing
written. What is proposed from is the edits' prompts, their paraphrases and their
neighbours (`methods.base.ProposalInputs`).
"""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence

from absl import flags

from jaxedit.methods.base import ProposalInputs
from jaxedit.methods.registry import METHODS
from jaxedit.runs import cli, inputs, tasks
from jaxedit.runs.clock import Clock
from jaxedit.runs.config import RunConfig
from jaxedit.runs.inputs import Session
from jaxedit.runs.method_flags import Chosen, written
from jaxedit.text import chat as chat_lib
from jaxedit.types import LOCALITY, REPHRASE, InputError, Progress, silent

_BEGIN = 'suggest_'


def define_flags() -> None:
  """Defines a flag for every setting that some method proposes."""
  for name in _known():
    who = [n for n, m in METHODS.items() if name in m.proposals]
    flags.DEFINE_bool(
        _BEGIN + name,
        False,
        f'Propose --{name} from the distances in --data, print it with the'
        f' command that uses it, and end ({", ".join(who)}).',
    )


def _known() -> list[str]:
  return sorted({name for m in METHODS.values() for name in m.proposals})


def asked(chosen: Chosen, kind: str) -> str | None:
  """The setting that flags ask for, if they do.

  Raises:
    InputError: several, one that is given, or one that the method or the kind of
      requests has no proposal for.
  """
  wanted = [name for name in _known() if flags.FLAGS[_BEGIN + name].value]
  if not wanted:
    return None
  name, problems = wanted[0], []
  method = chosen.method
  if len(wanted) > 1:
    both = ' and '.join(f'--{_BEGIN}{one}' for one in wanted)
    problems.append(f'{both}: ask for one at a time')
  if name not in method.proposals:
    who = [n for n, m in METHODS.items() if name in m.proposals]
    problems.append(
        f'--{_BEGIN}{name}: nothing is proposed for {method.name}, but for'
        f' {" and ".join(who)}; leave it out or change --method'
    )
  if kind != 'fact':
    problems.append(
        f'--{_BEGIN}{name}: is proposed from facts with paraphrases and'
        ' neighbours, and these are long answers; give such --data'
    )
  InputError.raise_for(problems)
  return name


def run(
    config: RunConfig,
    chosen: Chosen,
    kind: str,
    name: str,
    *,
    command: Mapping[str, str],
    program: str,
    progress: Progress = silent,
) -> list[str]:
  """Proposes a setting.

  Args:
    config: settings of the run.
    chosen: the method.
    kind: of the requests.
    name: of the setting.
    command: flag -> how it is written, of all that were given.
    program: module of the program that uses it.
    progress: progress display.

  Returns:
    Lines to print: what it was chosen among, the command.

  Raises:
    InputError: anything that cannot be used.
  """
  cli.use_compilation_cache(config.compilation_cache)
  session = inputs.load(config, chosen, kind, clock=Clock(), progress=progress)
  found = chosen.method.proposals[name](chosen.config, _inputs(session))
  left = (name, _BEGIN + name, 'v', 'verbosity')
  words = [word for flag, word in command.items() if flag not in left]
  words.append(f'--output_dir={config.output_dir}')
  words.append(f'--{name}={written(found.value)}')
  return [
      *found.lines,
      f'{words[-1]} is proposed:',
      f'python -m {program} {shlex.join(words)}',
  ]


def _inputs(session: Session) -> ProposalInputs:
  """The prompts of a session, as a method reads them."""
  chat = tasks.chat_of(session.config, session.tokenizer, chat_lib.NONE)

  def probes(kind: str) -> list[Sequence[Sequence[int]]]:
    texts = [
        [chat.wrap(probe.prompt) for probe in request.probes_of(kind)]
        for request in session.loaded.requests
    ]
    ids = iter(session.tokens.prompts([t for some in texts for t in some]))
    return [[next(ids).tolist() for _ in some] for some in texts]

  return ProposalInputs(
      session.model.spec,
      session.model.params,
      [edit.rows[0].tolist() for edit in session.encoded],
      probes(REPHRASE),
      probes(LOCALITY),
  )
