"""How the parameters and the activations of a model lie on a mesh.

All families share the names (`spec.param_shapes`), so they share one table of
rules by name (`placement.RULES`). Heads of attention are never cut. Activations
are divided by sequences or tokens.
"""

from __future__ import annotations

from typing import Any

import jax
from flax import traverse_util
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from jaxedit.models.spec import ModelSpec, param_shapes
from jaxedit.placement import BATCH_AXES, Placement
from jaxedit.types import Array, Params

_BY_HEAD = tuple(
    f'layers/{part}/{name}/'
    for part in ('attn', 'cross')
    for name in ('q', 'k', 'v', 'out')
)


def shardings(
    spec: ModelSpec, placement: Placement
) -> dict[str, NamedSharding]:
  """Lists the sharding of every parameter.

  Args:
    spec: the architecture.
    placement: the mesh and its rules.

  Returns:
    '/'-joined path -> sharding, in the order of `param_shapes`.
  """
  return {
      path: placement.sharding(
          path, shape, spec.head_size if path.startswith(_BY_HEAD) else 1
      )
      for path, shape in param_shapes(spec).items()
  }


def place(spec: ModelSpec, params: Params, placement: Placement) -> Params:
  """Moves parameters to where a placement has them.

  Args:
    spec: the architecture.
    params: canonical parameters, anywhere.
    placement: the mesh and its rules.

  Returns:
    The parameters; the same arrays for a placement on one device.
  """
  if not placement.several:
    return params
  flat = traverse_util.flatten_dict(params, sep='/')
  where = shardings(spec, placement)
  placed = {path: jax.device_put(x, where[path]) for path, x in flat.items()}
  return traverse_util.unflatten_dict(placed, sep='/')


def mesh_of(params: Params) -> Any:
  """The mesh on which parameters lie, in traced code too; None for no mesh."""
  leaf = next(iter(jax.tree.leaves(params)), None)
  if isinstance(leaf, jax.Array) and not isinstance(leaf, jax.core.Tracer):
    return getattr(leaf.sharding, 'mesh', None)
  sharding = (
      getattr(jax.typeof(leaf), 'sharding', None) if leaf is not None else None
  )
  mesh = getattr(sharding, 'mesh', None)
  return None if mesh is None or mesh.empty else mesh


def over_batch(
    params: Params, x: Array, axis: int = 0, *, rest: Any = None
) -> Array:
  """Divides activations over the devices that hold parameters.

  Args:
    params: what the activations are computed with; they say on which mesh.
    x: activations.
    axis: of sequences, or of packed tokens.
    rest: partition of all other axes; whole unless given, or what the compiler
      chooses (`PartitionSpec.UNCONSTRAINED`).

  Returns:
    The same values: along `axis` divided over as many of the batch axes as
    divide it. `x` itself without a mesh, and where a
    caller's axes are not automatic.
  """
  mesh = mesh_of(params)
  if mesh is None or mesh.size == 1:
    return x
  if any(kind != AxisType.Auto for kind in mesh.axis_types):
    return x
  taken, shards = [], 1
  for name in BATCH_AXES:
    size = mesh.shape.get(name, 1)
    if size > 1 and not x.shape[axis] % (shards * size):
      taken.append(name)
      shards *= size
  spec = [rest] * x.ndim
  spec[axis] = tuple(taken) or None
  return jax.lax.with_sharding_constraint(
      x, NamedSharding(mesh, PartitionSpec(*spec))
  )
