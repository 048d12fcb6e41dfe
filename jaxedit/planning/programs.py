"""Memory and FLOPs of a compiled program, without its arrays.

Arguments are shapes (`jax.ShapeDtypeStruct`), so nothing is allocated and a
model larger than the machine can be planned. XLA's cost analysis counts the body
of a loop once, whatever its trips: FLOPs of a whole run are counted by hand
(`costs`) and compared with the compiler's for one trip.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxedit.models import loading
from jaxedit.models.spec import ModelSpec, param_shapes
from jaxedit.types import Params


class Program(NamedTuple):
  """What the compiler says of a program, a device.

  Attributes:
    flops: with the body of every loop counted once.
    arguments: bytes of its arguments.
    output: bytes of its results.
    alias: bytes of results that take the place of donated arguments.
    temporary: bytes of its temporaries.
  """

  flops: float
  arguments: int
  output: int
  alias: int
  temporary: int

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
  program = lowered.compile()
  cost, memory = program.cost_analysis(), program.memory_analysis()
  if isinstance(cost, list):  # one entry a computation, before jax 0.5
    cost = cost[0]
  size = lambda name: int(getattr(memory, f'{name}_size_in_bytes', 0) or 0)
  return Program(
      flops=float((cost or {}).get('flops', 0.0)),
      arguments=size('argument'),
      output=size('output'),
      alias=size('alias'),
      temporary=size('temp'),
  )


def abstract_params(spec: ModelSpec, dtype: str) -> Params:
  """The canonical parameters of a model as shapes.

  Args:
    spec: the architecture.
    dtype: 'float32' or 'bfloat16'.
  """
  return loading.nest(
      {
          path: jax.ShapeDtypeStruct(shape, jnp.dtype(dtype))
          for path, shape in param_shapes(spec).items()
      }
  )


def nbytes(tree: Any) -> int:
  """Bytes of a tree of arrays or shapes on one device."""
  return sum(map(_leaf_bytes, jax.tree.leaves(tree)))


def _leaf_bytes(leaf: Any) -> int:
  sharding = getattr(leaf, 'sharding', None)
  shape = leaf.shape if sharding is None else sharding.shard_shape(leaf.shape)
  return math.prod(shape) * jnp.dtype(leaf.dtype).itemsize
