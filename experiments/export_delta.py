"""Writes a saved edit as an adapter: for PEFT and vLLM, or for llama.cpp.

  python -m experiments.export_delta --model=smollm2-135m-instruct \
    --delta=runs/memit/delta.safetensors --out=adapters/memit
  python -m experiments.export_delta ... --format=gguf --out=memit.gguf

Only changes of linear maps travel; what else an edit is, is said and refused.
"""

from __future__ import annotations

from absl import flags

from jaxedit import edited as edited_lib
from jaxedit.convert import adapters, hub
from jaxedit.edited.export import FORMATS, TOLERANCE
from jaxedit.models import loading
from jaxedit.runs import cli
from jaxedit.types import InputError


def define_flags() -> None:
  """Defines this program's flags."""
  flags.DEFINE_string('model', None, 'The model that the edit was made for.')
  flags.DEFINE_string('revision', None, 'Branch, tag or commit of a hub id.')
  flags.DEFINE_string('delta', None, 'The edit: delta.safetensors of a run.')
  flags.DEFINE_string('out', None, 'A new folder (peft) or a file (gguf).')
  flags.DEFINE_enum(
      'format', 'peft', FORMATS, 'peft serves vLLM too, gguf llama.cpp.'
  )
  flags.DEFINE_integer(
      'edit', None, 'Of edits side by side, which one, from 0.', lower_bound=0
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
      'dtype', 'float32', tuple(adapters.DTYPES), 'Of the tensors.'
  )


def main() -> None:
  given = flags.FLAGS
  problems = [
      f'--{name} is missing; see --help'
      for name in ('model', 'delta', 'out')
      if not getattr(given, name)
  ]
  InputError.raise_for(problems)
  edited_lib.load(given.delta)  # before weights are read
  folder = hub.resolve(
      given.model, revision=given.revision, progress=cli.progress_bar
  )
  # Read for its hash: an adapter would fit another model of the same shapes.
  model = loading.load_model(folder, 'bfloat16', cli.progress_bar)
  edited, about = edited_lib.load(given.delta, model_hash=model.hash)
  if given.edit is not None:
    edited = edited_lib.select(edited, given.edit)
  maps, lines = edited_lib.write_adapter(
      given.out,
      model.spec,
      edited,
      format=given.format,
      base=given.base or given.model,
      rank=given.rank,
      tolerance=given.tolerance,
      dtype=given.dtype,
      about=about,
  )
  for one in maps:
    print(
        f'layer {one.layer} {one.site}: rank {one.rank},'
        f' {one.error:.1e} of the change left out'
    )
  print(given.out, *lines, sep='\n')


if __name__ == '__main__':
  define_flags()
  cli.run(main)
