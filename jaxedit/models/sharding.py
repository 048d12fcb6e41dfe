"""How the parameters of a model lie on a mesh, by canonical name.

All families share the names (`spec.param_shapes`), so they share one table of
rules (`placement.RULES`). Heads of attention are never cut.
"""

from __future__ import annotations

import jax
from flax import traverse_util
from jax.sharding import NamedSharding

from jaxedit.models.spec import ModelSpec, param_shapes
from jaxedit.placement import Placement
from jaxedit.types import Params

_BY_HEAD = tuple(f'layers/attn/{name}/' for name in ('q', 'k', 'v', 'out'))


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
