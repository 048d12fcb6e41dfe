"""The stages of a run: what each computes, moves and holds.

A stage counts the work of all of its calls and the memory of the largest. Where
the compiler knows the memory of a program it is asked (`programs`); FLOPs are
counted by hand (`costs`).

Axis letters as in `jaxedit.types`; W weights a layer.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from jaxedit.batching import packer
from jaxedit.edited import scoring
from jaxedit.edited.scoring import Query
from jaxedit.models import decode
from jaxedit.models.decode import GREEDY, Decoding
from jaxedit.models.loading import Model
from jaxedit.models.spec import ModelSpec, param_shapes
from jaxedit.placement import device_bytes
from jaxedit.planning import costs
from jaxedit.planning.programs import compiled
from jaxedit.stats import moments as moments_lib

# Share of the ceiling that a stage reaches, about: 33% to 50% were measured
# (BENCHMARKS.md, "Stages of T1").
EFFICIENCY = 0.4


@dataclasses.dataclass(frozen=True)
class Stage:
  """One stage of a run.

  Attributes:
    name: as in the seconds of results.json.
    what: its shapes, in a few words.
    flops: dtype of the products -> FLOPs of all calls.
    moved: bytes of weights and factors that all calls read, at least.
    device: bytes that a device holds beside the weights, at most.
    host: bytes that the host holds for this stage alone, at most.
    kept: bytes that it leaves on the host for later stages.
    collective: bytes that a device exchanges with others.
    checked: FLOPs that the compiler counts for one trip over those that are
      counted by hand; None where nothing was compared.
  """

  name: str
  what: str
  flops: Mapping[str, float] = dataclasses.field(default_factory=dict)
  moved: float = 0.0
  device: float = 0.0
  host: float = 0.0
  kept: float = 0.0
  collective: float = 0.0
  checked: float | None = None

  def seconds(self, rates: Mapping[str, float]) -> float:
    """Time that it takes, about.

    Args:
      rates: FLOPs a second by dtype, and bytes a second of 'memory'.

    Returns:
      The longer of arithmetic, at `EFFICIENCY` of its ceiling, and memory.
    """
    arithmetic = sum(
        count / rates[dtype] for dtype, count in self.flops.items()
    )
    return max(arithmetic / EFFICIENCY, self.moved / rates['memory'])


def itemsize(model: Model) -> int:
  """Bytes a weight."""
  return jnp.dtype(dtype_of(model)).itemsize


def dtype_of(model: Model) -> str:
  """Dtype of the weights."""
  return jnp.dtype(model.params['embed']['embedding'].dtype).name


def products(model: Model, spec: ModelSpec | None = None) -> str:
  """Dtype of the ceiling of products with weights.

  Args:
    model: with weights or shapes.
    spec: the architecture with the activations of a stage.

  Returns:
    The weights' dtype; 'float32' where a CPU multiplies by activations in
    float32, as it widens the weights.
  """
  wide = (spec or model.spec).activations == 'float32'
  if wide and not model.placement.accelerated:
    return 'float32'
  return dtype_of(model)


def load(model: Model, tensor_bytes: int) -> Stage:
  """Weights from files.

  Args:
    model: as shapes.
    tensor_bytes: the largest tensor of the files.

  Returns:
    The stage; a tensor is on the host and on the device at one time.
  """
  size = device_bytes(model.params)
  count = sum(1 for _ in param_shapes(model.spec))
  return Stage(
      'load',
      f'{count} leaves',
      moved=2.0 * size,
      device=tensor_bytes,
      host=tensor_bytes,
  )


def moments(
    model: Model, layers: Sequence[int], site: str, *, tokens: int,
    width: int, batch_rows: int,
) -> Stage:  # fmt: skip
  """Second moments of keys, collected.

  Args:
    model: as shapes.
    layers: layers to collect.
    site: linear map whose input is the key.
    tokens: of the text.
    width: tokens of a packed sequence.
    batch_rows: sequences computed at once.

  Returns:
    The stage. The sums are on the host in f64, twice when they are read back.
  """
  spec, layers = model.spec, tuple(sorted(layers))
  size = moments_lib.key_width(spec, site)
  row = jax.ShapeDtypeStruct((batch_rows, width), jnp.int32)
  total = jax.ShapeDtypeStruct((len(layers), size, size), jnp.float32)
  lowered = moments_lib.add_batch.lower(
      total, spec, model.params, packer.Row(*(row,) * 3),
      layers=layers, site=site,
  )  # fmt: skip
  program = compiled(lowered)
  model_flops, gram = costs.moment_flops(spec, layers, tokens)
  calls = -(-tokens // (batch_rows * width))
  read = costs.model_bytes(spec, layers[-1] + 1, itemsize(model))
  sums = 8.0 * len(layers) * size**2
  return Stage(
      'moments',
      f'{tokens:,} tokens, {len(layers)} x [{size}, {size}]',
      flops=added((products(model), model_flops), ('float32', gram)),
      moved=calls * (read + 2.0 * device_bytes(total)),
      device=device_bytes(total) + program.peak,
      host=2 * sums,
      kept=sums,
  )


def added(*parts: tuple[str, float]) -> dict[str, float]:
  """Adds FLOPs up by dtype."""
  found: dict[str, float] = {}
  for dtype, count in parts:
    found[dtype] = found.get(dtype, 0.0) + count
  return found


def score(
    model: Model,
    queries: Sequence[Query],
    *,
    batch_size: int,
    name: str = 'score',
    edited: float = 0.0,
) -> Stage:
  """Answers scored under teacher forcing.

  Args:
    model: as shapes.
    queries: all of them.
    batch_size: queries a batch at most.
    name: of the stage.
    edited: bytes of merged weights beside those of the model.

  Returns:
    The stage; memory is that of the batch of most tokens.
  """
  if not queries:
    return Stage(name, 'nothing scored')
  spec = model.spec
  batches, lowered = scoring.lower(
      spec, model.params, queries, batch_size=batch_size
  )
  program = compiled(lowered)
  tokens, scored = np.sum(batches, axis=0)
  read = costs.model_bytes(spec, spec.layers, itemsize(model), head=True)
  return Stage(
      name,
      f'{len(queries):,} prompts, {len(batches)} batches to {max(batches)[0]:,} tokens',
      flops={products(model): costs.score_flops(spec, tokens, scored)},
      moved=len(batches) * read,
      device=program.peak + edited,
  )


def generate(
    model: Model,
    prompts: Sequence[Sequence[int]],
    *,
    new_tokens: int,
    batch_size: int,
    name: str = 'generate',
    edited: float = 0.0,
    decoding: Decoding = GREEDY,
) -> Stage:
  """Continuations of prompts, all of them as long as they may be.

  Args:
    model: as shapes.
    prompts: token ids.
    new_tokens: tokens to add at most.
    batch_size: sequences a batch at most.
    name: of the stage.
    edited: bytes of merged weights beside those of the model.
    decoding: how tokens are chosen.

  Returns:
    The stage.
  """
  if not prompts or not new_tokens:
    return Stage(name, 'nothing generated')
  spec = model.spec
  state, lowered = decode.lower(
      spec, model.params, prompts,
      max_new_tokens=new_tokens, decoding=decoding, batch_size=batch_size,
  )  # fmt: skip
  program, (rows, _) = compiled(lowered), state.shape
  tokens = sum(map(len, prompts)) + len(prompts) * new_tokens
  count = len(prompts) * new_tokens
  steps = -(-len(prompts) // rows) * new_tokens
  read = costs.model_bytes(spec, spec.layers, itemsize(model), head=True)
  return Stage(
      name,
      f'{len(prompts):,} texts of {new_tokens} tokens, {rows} side by side',
      flops={products(model): costs.score_flops(spec, tokens, count)},
      moved=steps * read,
      # A resized cache stands beside the old one.
      device=edited + program.peak + 2.0 * device_bytes(state),
  )
