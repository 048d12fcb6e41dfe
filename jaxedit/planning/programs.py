"""Memory and FLOPs of a compiled program, without its arrays.

Arguments are shapes (`jax.ShapeDtypeStruct`), so nothing is allocated and a
model larger than the machine can be planned. XLA's cost analysis counts the body
of a loop once, whatever its trips: FLOPs of a whole run are counted by hand
(`costs`) and compared with the compiler's for one trip.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxedit.models import loading, sharding
from jaxedit.models.spec import ModelSpec, param_shapes
from jaxedit.placement import Placement
from jaxedit.types import Params

# Of HLO text: the head of a computation, a collective with its result, the
# shapes of one, the trips of a loop, and the computations that a line calls.
_HEAD = re.compile(r'^(ENTRY )?%?([\w.\-]+) (?:\([^)]*|\().*\{$')
_COLLECTIVE = re.compile(
    r'= (.*?) (all-gather|all-reduce|reduce-scatter|all-to-all'
    r'|collective-permute)(?:-start)?\('
)
_SHAPE = re.compile(r'(\w+)\[([\d,]*)\]')
_TRIPS = re.compile(r'known_trip_count[^\d]*(\d+)')
_CALLED = re.compile(
    r'(?:body|calls|to_apply|true_computation|false_computation)=%?([\w.\-]+)'
)


class Program(NamedTuple):
  """What the compiler says of a program, a device.

  Attributes:
    flops: with the body of every loop counted once.
    arguments: bytes of its arguments.
    output: bytes of its results.
    alias: bytes of results that take the place of donated arguments.
    temporary: bytes of its temporaries.
    collectives: kind -> bytes of its results, those of a loop over layers times
      its trips; a loop of unknown trips is counted once.
  """

  flops: float
  arguments: int
  output: int
  alias: int
  temporary: int
  collectives: Mapping[str, float]

  @property
  def peak(self) -> int:
    """Bytes that it needs beside its arguments."""
    return self.temporary + self.output - self.alias


def compiled(lowered: jax.stages.Lowered) -> Program:
  """Compiles a program.

  Args:
    lowered: what `lower` of a jitted function returned, of arrays or shapes.

  Returns:
    What the compiler says; zeros where a platform says nothing.
  """
  return read(lowered.compile())


def read(program: jax.stages.Compiled) -> Program:
  """Reads what the compiler says of a program; see `compiled`."""
  cost, memory = program.cost_analysis(), program.memory_analysis()
  if isinstance(cost, list):  # one entry a computation, before jax 0.5
    cost = cost[0]
  size = lambda name: int(getattr(memory, f'{name}_size_in_bytes', 0) or 0)
  return Program(
      collectives=collectives(program.as_text() or ''),
      flops=float((cost or {}).get('flops', 0.0)),
      arguments=size('argument'),
      output=size('output'),
      alias=size('alias'),
      temporary=size('temp'),
  )


def output(lowered: jax.stages.Lowered) -> tuple[Program, Any]:
  """Compiles a program; returns its results as shapes that know their shards.

  Args:
    lowered: as for `compiled`.

  Returns:
    (what the compiler says, the results).
  """
  program = lowered.compile()

  def place(x: Any, where: Any) -> jax.ShapeDtypeStruct:
    # What one device holds is not bound to it.
    where = where if len(where.device_set) > 1 else None
    return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=where)

  found = jax.tree.map(place, lowered.out_info, program.output_shardings)
  return read(program), found


def collectives(text: str) -> dict[str, float]:
  """Counts what the devices of a program exchange.

  Args:
    text: of a compiled program, HLO.

  Returns:
    Kind -> bytes of the results on a device, see `Program.collectives`.
  """
  bodies: dict[str, list[str]] = {}
  name = entry = ''
  for line in text.splitlines():
    if head := _HEAD.match(line):
      name = head[2]
      entry = name if head[1] else entry
      bodies[name] = []
    elif name:
      bodies[name].append(line)
  found: dict[str, float] = {}

  def add(name: str, times: int) -> None:
    for line in bodies.get(name, ()):
      if match := _COLLECTIVE.search(line):
        size = times * sum(map(_size, _SHAPE.findall(match[1])))
        found[match[2]] = found.get(match[2], 0.0) + size
      trips = _TRIPS.search(line)
      for called in _CALLED.findall(line):
        add(called, times * (int(trips[1]) if trips else 1))

  add(entry, 1)
  return found


def _size(shape: tuple[str, str]) -> int:
  """Bytes of an HLO shape, (dtype, dimensions)."""
  bits = re.search(r'\d+', shape[0])
  width = int(bits[0]) // 8 if bits else 1
  return max(width, 1) * math.prod(int(n) for n in shape[1].split(',') if n)


def abstract_params(
    spec: ModelSpec, dtype: str, placement: Placement | None = None
) -> Params:
  """The canonical parameters of a model as shapes.

  Args:
    spec: the architecture.
    dtype: 'float32' or 'bfloat16'.
    placement: where they are to lie; None for one device.
  """
  where = {}
  if placement is not None and placement.several:
    where = sharding.shardings(spec, placement)
  return loading.nest(
      {
          path: jax.ShapeDtypeStruct(
              shape, jnp.dtype(dtype), sharding=where.get(path)
          )
          for path, shape in param_shapes(spec).items()
      }
  )
