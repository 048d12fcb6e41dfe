"""What can be done with a saved edit, without making it again.

  python -m experiments.delta --delta=runs/memit/delta.safetensors   # what it is
  python -m experiments.delta --delta=... --do=export --out=adapters/memit \
    --model=smollm2-135m-instruct                # for PEFT and vLLM
  python -m experiments.delta --delta=... --do=export --format=gguf ...  # llama.cpp
  python -m experiments.delta --delta=... --do=merge --model=... --out=edited_model
  python -m experiments.delta --delta=... --do=select --edit=3 --out=one.safetensors
  python -m experiments.delta --delta=... --do=add --other=... --out=both.safetensors
  python -m experiments.delta --delta=... --do=forget --id=17 --out=less.safetensors
  python -m experiments.delta --delta=... --do=roll_back --count=2 --out=...

`show`, `select`, `add`, `forget` and `roll_back` need no model. An edit that is a
sum of changes cannot forget one of its parts; memories and codebooks can.
"""

from __future__ import annotations

from typing import Any

from absl import flags

from jaxedit.convert import adapters
from jaxedit.edited.export import FORMATS, TOLERANCE
from jaxedit.runs import cli, products
from jaxedit.types import InputError


def define_flags() -> None:
  """Defines this program's flags."""
  flags.DEFINE_string('delta', None, 'The edit: delta.safetensors of a run.')
  flags.DEFINE_enum(
      'do', 'show', tuple(products.ACTIONS), 'What to do with it; see above.'
  )
  flags.DEFINE_string('model', None, 'The model that the edit was made for.')
  flags.DEFINE_string('revision', None, 'Branch, tag or commit of a hub id.')
  flags.DEFINE_string('out', None, 'Where to write: a new folder, or a file.')
  flags.DEFINE_integer(
      'edit', None, 'Of edits side by side, which one, from 0.', lower_bound=0
  )
  flags.DEFINE_string(
      'other',
      None,
      'With add: another edit of the same unedited model; changes are summed.',
  )
  flags.DEFINE_string('id', None, 'With forget: the id of a request.')
  flags.DEFINE_integer(
      'count', None, 'With roll_back: how many edits.', lower_bound=1
  )
  flags.DEFINE_enum(
      'format', 'peft', FORMATS, 'peft serves vLLM too, gguf llama.cpp.'
  )
  flags.DEFINE_string(
      'base', None, 'Name by which servers find the unedited model; --model.'
  )
  flags.DEFINE_integer(
      'rank', None, 'Rank of a map at most; all unless given.', lower_bound=1
  )
  flags.DEFINE_float(
      'tolerance',
      TOLERANCE,
      'Leave out singular values below this share of the largest.',
      lower_bound=0,
  )
  flags.DEFINE_enum(
      'dtype', 'float32', tuple(adapters.DTYPES), 'Of an adapter.'
  )


def main() -> None:
  given: Any = flags.FLAGS
  needed = products.ACTIONS[given.do]
  InputError.raise_for(
      [
          f'--{name} is missing: --do={given.do} needs it'
          for name in ('delta', *needed)
          if getattr(given, name) is None
      ]
  )
  print(*products.run(given, progress=cli.progress_bar), sep='\n')


if __name__ == '__main__':
  define_flags()
  cli.run(main)
