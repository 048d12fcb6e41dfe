"""A paper plan: what many edits of large models take on 1 to 256 devices.

  python -m experiments.benchmark.scaling                     the tables
  XLA_FLAGS=--xla_force_host_platform_device_count=8 JAX_PLATFORMS=cpu \
    python -m experiments.benchmark.scaling --mesh=fsdp:8     a check of bytes

Nothing is run. FLOPs and bytes are those of `jaxedit.planning` for MEMIT on the
demo facts, as often as there are edits; seconds follow from data sheets:

  max(FLOPs / (devices peak EFFICIENCY), bytes read / memory) + bytes sent / link

without overlap. Solves run on one device. With --mesh the optimiser step of a
shape, and the program that assigns an edit to it, are compiled for so many
devices, nothing allocated, and what they exchange is set beside the sum by hand;
weights are float32 there, as a CPU widens narrower ones before it gathers them.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any, NamedTuple

from absl import flags

from experiments.benchmark.presets import PRESETS
from jaxedit.batching import plan as plan_lib
from jaxedit.batching.plan import BatchPlan
from jaxedit.convert import hub
from jaxedit.methods.closed_form import planned
from jaxedit.methods.registry import METHODS
from jaxedit.models import assets, families, tokenizer
from jaxedit.models.loading import Model
from jaxedit.models.spec import ModelSpec
from jaxedit.placement import device_bytes, on_mesh, one_device
from jaxedit.planning import costs, fit, lengths, programs, targets
from jaxedit.planning.stages import EFFICIENCY, Stage
from jaxedit.runs import cli, dry_run, tasks
from jaxedit.runs.config import RunConfig
from jaxedit.runs.method_flags import Chosen
from jaxedit.targets import TargetConfig
from jaxedit.testing import facts
from jaxedit.text.encoding import EncodedEdit
from jaxedit.text.token_cache import TokenCache

_COUNTS = (1, 8, 64, 256)
_STEPS = 25
# Suffix tokens a device and step, the budget of an accelerator.
_TOKENS = 2048
_MOMENT_TOKENS = 20  # a key dimension
_TEXT = 512 * 16  # tokens of text a device and call
# Of a request on the host: its text, probes, ids and caches, about.
_REQUEST_BYTES = 10_000
_GIB = 2**30


class Hardware(NamedTuple):
  """A device by its data sheet.

  Attributes:
    bfloat16: FLOPs a second of products, dense.
    float64: of solves; those of a host where the device has none.
    memory: bytes a second.
    link: bytes a second that a device sends to others.
    size: bytes of memory.
  """

  bfloat16: float
  float64: float
  memory: float
  link: float
  size: float


HARDWARE = {
    'H100 SXM': Hardware(989e12, 67e12, 3.35e12, 450e9, 80e9),
    'TPU v5p': Hardware(459e12, 1e12, 2.765e12, 600e9, 95e9),
    'TPU v5e': Hardware(197e12, 1e12, 0.819e12, 200e9, 16e9),
}
_70B = dict(
    model_type='llama', num_hidden_layers=80, num_attention_heads=64,
    num_key_value_heads=8, hidden_size=8192, intermediate_size=28672,
    max_position_embeddings=8192, rope_theta=500000.0, rms_norm_eps=1e-5,
    vocab_size=128256, tie_word_embeddings=False,
)  # fmt: skip
# Shape and edited layers; nobody has published layers of the last.
SHAPES = {
    'gptj-6b': (PRESETS['gptj-6b'].config, PRESETS['gptj-6b'].layers),
    'llama3-8b': (PRESETS['llama3-8b'].config, PRESETS['llama3-8b'].layers),
    'llama-70b': (_70B, (4, 5, 6, 7, 8)),
}


def define_flags() -> None:
  """Defines this program's flags."""
  flags.DEFINE_integer('edits', 100_000, 'Edits.', lower_bound=1)
  flags.DEFINE_integer(
      'batch', 10_000, 'Edits solved for together.', lower_bound=1
  )
  flags.DEFINE_enum('shape', 'llama3-8b', list(SHAPES), 'Of --mesh.')
  flags.DEFINE_string('mesh', None, 'Compile a step on this mesh instead.')
  flags.adopt_module_key_flags(cli)


def _facts(spec: ModelSpec) -> list[EncodedEdit]:
  """The demo facts under six contexts, in the demo model's tokens."""
  folder = hub.resolve(assets.DEMO_MODEL, progress=cli.progress_bar)
  tokens = TokenCache(tokenizer.load_tokenizer(folder))
  config = RunConfig(max_new_tokens=0)
  method = METHODS['memit']
  task = tasks.TASKS['fact'](config, Chosen(method, method.config()))
  requests = task.load(tokens, spec, cli.progress_bar).requests
  return list(task.encode(spec, tokens, requests, dry_run.CONTEXTS))


class Work(NamedTuple):
  """A stage of all edits.

  Attributes:
    name: of the stage.
    flops: of all devices.
    calls: of its program, each of which reads and may gather the weights.
    read: bytes of weights a call.
    sent: (devices that divide a batch, weights gathered) -> bytes a device and
      call.
    serial: FLOPs in f64 on one device.
  """

  name: str
  flops: float
  calls: float
  read: float
  sent: Any
  serial: float = 0.0


def work(
    spec: ModelSpec, layers: Sequence[int], edits: Sequence[EncodedEdit],
    *, count: int, batch: int, devices: int,
) -> list[Work]:  # fmt: skip
  """Counts the stages of `count` edits like those given, bf16 weights.

  Args:
    spec: the architecture.
    layers: edited layers.
    edits: some edits.
    count: edits of the run.
    batch: edits solved for together.
    devices: that work and batches are divided over.
  """
  scale, last = count / len(edits), layers[-1]
  loads, sizes = lengths.loads(edits), lengths.lengths(edits)
  suffix = scale * float((loads.suffix + 1).sum())
  steps = [_STEPS] * len(edits)
  calls = max(_STEPS, suffix * _STEPS / (_TOKENS * devices))
  f, n = spec.mlp_width, len(layers)
  text = _MOMENT_TOKENS * f
  model, gram = costs.moment_flops(spec, layers, text)
  body = costs.model_bytes(spec, spec.layers, 2, head=True)
  below = costs.model_bytes(spec, last + 1, 2)
  batches = -(-count // batch)
  scored = scale * float(sizes.tokens.sum())

  def gather(size: float, activations: float = 0.0) -> Any:
    return lambda fsdp: activations * (devices > 1) + size * fsdp

  plan = plan_lib.plan_shapes(edits, token_budget=_TOKENS)
  sent = count * costs.assigned_bytes(spec, last, _assigned(plan))
  return [
      Work(
          'moments', model + 2 * gram, max(1, text / (_TEXT * devices)), below,
          gather(below, 4.0 * n * f * f),
      ),
      Work(
          'targets', scale * costs.ours_flops(spec, last, edits, steps), calls,
          costs.target_bytes(spec, last, 1, 2),
          gather(costs.gathered_bytes(spec, last, 2), sent / calls),
      ),
      Work(
          'insert', scale * costs.insert_flops(spec, layers, sizes),
          max(batches, scale * float(sizes.reach.sum()) / (_TOKENS * devices)),
          below, gather(below),
      ),
      Work(
          'solve', 0.0, 0.0, 0.0, gather(0.0),
          batches * costs.solve_flops(spec, n, [lengths.System(batch)])
          + costs.factor_flops(spec, n),
      ),
      Work(
          'evaluate', costs.score_flops(spec, scored, scored / 4),
          max(1, scored / (_TOKENS * devices)), body, gather(body),
      ),
  ]  # fmt: skip


def _assigned(plan: BatchPlan) -> tuple[int, int, int]:
  """(sequences, prefix tokens, suffix tokens) of an edit in the last shape."""
  shape = plan.shapes[-1]
  return plan.rows, plan.shared + shape.prefix_shape[1], shape.length


def seconds(one: Work, hardware: Hardware, devices: int, fsdp: bool) -> Any:
  """(seconds, what they are spent on most)."""
  parts = {
      'products': one.flops / (devices * hardware.bfloat16 * EFFICIENCY),
      'memory': one.calls * one.read / hardware.memory,
      'link': one.calls * one.sent(fsdp and devices > 1) / hardware.link,
      'one device': one.serial / (hardware.float64 * EFFICIENCY),
  }
  total = max(parts['products'], parts['memory'])
  total += parts['link'] + parts['one device']
  return total, max(parts, key=parts.get)


def tables(count: int, batch: int) -> list[str]:
  """The tables of docs/scaling.md, Markdown."""
  lines = []
  for name, (config, layers) in SHAPES.items():
    spec = families.spec_from_hf(config)
    edits = _facts(spec)
    weights = device_bytes(programs.abstract_params(spec, 'bfloat16'))
    plain = work(spec, layers, edits, count=count, batch=batch, devices=1)
    lines += [
        '', f'### {name}', '',
        f'Weights {weights / 1e9:.1f} GB in bf16; layers {layers[0]} to'
        f' {layers[-1]}; {count:,} edits in batches of {batch:,}.', '',
        '| stage | PFLOP | TB read on one device | GB sent a device, of 8, 64, 256 |',
        '|---|---|---|---|',
    ]  # fmt: skip
    every = {
        n: work(spec, layers, edits, count=count, batch=batch, devices=n)
        for n in _COUNTS
    }
    for i, one in enumerate(plain):
      sent = []
      for n in _COUNTS[1:]:
        other = every[n][i]
        sent.append(other.calls * other.sent(_divided(weights, 80e9)) / 1e9)
      lines.append(
          f'| {one.name} | {(one.flops + one.serial) / 1e15:,.3g} |'
          f' {one.calls * one.read / 1e12:,.3g} |'
          f' {", ".join(f"{x:,.3g}" for x in sent)} |'
      )
    lines += [
        '', '| device | mesh | 1 | 8 | 64 | 256 |', '|---|---|---|---|---|---|'
    ]  # fmt: skip
    for device, hardware in HARDWARE.items():
      lines.append(_row(device, hardware, weights, every))
    lines += ['', _host(spec, layers, edits, count, batch)]
  return lines


def _divided(weights: float, size: float) -> bool:
  """Whether weights are divided: a copy takes over half of a device."""
  return weights > size / 2


def _row(device: str, hardware: Hardware, weights: float, every: Any) -> str:
  """Hours, efficiency and limit on so many devices."""
  fsdp = _divided(weights, hardware.size)
  cells, first = [], None
  for n, stages in every.items():
    if weights / (n if fsdp else 1) > 0.8 * hardware.size:
      cells.append('does not fit')
      continue
    times = [seconds(one, hardware, n, fsdp) for one in stages]
    total = sum(time for time, _ in times)
    first = first or n * total
    worst = max(range(len(times)), key=lambda i: times[i][0])
    cells.append(
        f'{total / 3600:,.2f} h, {first / (n * total):.0%},'
        f' {stages[worst].name}: {times[worst][1]}'
    )
  mesh = 'fsdp' if fsdp else 'data'
  return f'| {device} | {mesh} | ' + ' | '.join(cells) + ' |'


def _host(
    spec: ModelSpec, layers: Sequence[int], edits: Sequence[EncodedEdit],
    count: int, batch: int,
) -> str:  # fmt: skip
  """The host's peak, by the stages of a run on accelerators."""
  some = [edits[i % len(edits)] for i in range(batch)]
  plan: BatchPlan = plan_lib.plan_shapes(some, token_budget=_TOKENS)
  plan = dataclasses.replace(plan, resident_bytes=2.0 * _GIB)
  params = programs.abstract_params(spec, 'bfloat16')
  model = Model(spec, params, None, '', {}, placement=one_device())
  config = METHODS['memit'].configure(layers=tuple(layers))
  moments = 8.0 * len(layers) * spec.mlp_width**2
  kept = 8.0 * count * spec.width
  stages = [
      Stage('requests', '', kept=float(_REQUEST_BYTES * count)),
      Stage('moments', '', host=moments, kept=moments),
      *planned.stages(
          spec, config.recipe(), model, some, plan, [range(batch)], False
      ),
      # Reports are joined at the end.
      Stage('targets', '', host=kept, kept=kept),
  ]
  # Targets are kept from the first batch on, before the last is inserted.
  stages[-2:] = stages[:-3:-1]
  host = fit.Plan(tuple(stages), 0.0, False).host
  worst = max(range(len(host)), key=host.__getitem__)
  parts = ', '.join(
      f'{one.name} {(one.host if one is stages[worst] else one.kept) / _GIB:.1f}'
      for one in stages[: worst + 1]
  )
  return f'Host peak {max(host) / _GIB:.1f} GiB ({parts}).'


def check(shape: str, text: str) -> list[str]:
  """Compiles a step on a mesh; compares what it exchanges with the sum."""
  config, layers = SHAPES[shape]
  spec, placement = families.spec_from_hf(config), on_mesh(text)
  params = programs.abstract_params(spec, 'float32', placement)
  shards = placement.batch_shards
  edits = facts.random_edits(
      4 * placement.mesh.size + 200, seed=0, contexts=6, vocab=spec.vocab
  )
  plan = plan_lib.plan_shapes(edits, token_budget=128, shards=shards)
  found = targets.programs(
      spec, params, edits, plan,
      number=0, layer=layers[-1], output='block', config=TargetConfig(),
  )  # fmt: skip
  sizes, tokens = placement.mesh.shape, plan.shapes[0].token_budget
  by_hand = {}
  if sizes.get('fsdp', 1) > 1:
    by_hand['weights gathered'] = costs.gathered_bytes(spec, layers[-1], 4)
  if sizes.get('tensor', 1) > 1:
    by_hand['sums of outputs'] = costs.summed_bytes(
        spec, layers[-1], tokens / shards
    )
  compiled, want = found.step.collectives, sum(by_hand.values())
  lines = [f'{shape} on {placement.label}, {tokens} tokens a step, f32']
  lines += [f'  by hand   {k}: {v / 1e9:.2f} GB' for k, v in by_hand.items()]
  lines += [f'  compiled  {k}: {v / 1e9:.2f} GB' for k, v in compiled.items()]
  if want:
    ratio = sum(compiled.values()) / want
    lines.append(f'  compiled over by hand: {ratio:.2f}')
  sent = costs.assigned_bytes(spec, layers[-1], _assigned(plan))
  return [
      *lines,
      f'  an edit assigned: {sent * (shards > 1) / 1e6:.1f} MB by hand,'
      f' {found.assigned / 1e6:.1f} MB compiled',
  ]


def main() -> None:
  given = flags.FLAGS
  cli.use_compilation_cache(True)
  if given.mesh:
    print('\n'.join(check(given.shape, given.mesh)))
    return
  print('\n'.join(tables(given.edits, given.batch)))


if __name__ == '__main__':
  define_flags()
  cli.run(main)
