"""The matrix products of compiled functions, and the precision they ask for."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator
from typing import Any
from unittest import mock

import jax


def products(jaxpr: Any) -> Iterator[tuple[str, Any]]:
  """Yields (dtype of what is multiplied, precision) of all products in a jaxpr."""
  for equation in jaxpr.eqns:
    if equation.primitive.name == 'dot_general':
      dtypes = {str(x.aval.dtype) for x in equation.invars}
      yield '*'.join(sorted(dtypes)), equation.params['precision']
    for inner in jax.tree.leaves(
        list(equation.params.values()), is_leaf=lambda x: hasattr(x, 'eqns')
    ):
      inner = getattr(inner, 'jaxpr', inner)
      if hasattr(inner, 'eqns'):
        yield from products(inner)


@contextlib.contextmanager
def watched(module: Any, *names: str) -> Iterator[dict[str, set[Any]]]:
  """Collects the products of jitted functions that are called while open.

  Args:
    module: has the functions.
    *names: of the functions.

  Yields:
    name -> {(dtype, precision)}, filled as they are called.
  """
  found: dict[str, set[Any]] = {}

  def call(function: Any, name: str, *args: Any, **kwargs: Any) -> Any:
    jaxpr = function.trace(*args, **kwargs).jaxpr
    found.setdefault(name, set()).update(products(jaxpr.jaxpr))
    return function(*args, **kwargs)

  with contextlib.ExitStack() as stack:
    for name in names:
      wrapped = functools.partial(call, getattr(module, name), name)
      stack.enter_context(mock.patch.object(module, name, wrapped))
    yield found


def highest(found: dict[str, set[Any]]) -> bool:
  """Whether all are products of f32 at the highest precision, with no TF32."""
  top = (jax.lax.Precision.HIGHEST,) * 2
  every = [one for some in found.values() for one in some]
  return bool(every) and all(
      dtype == 'float32' and precision in (top, top[0])
      for dtype, precision in every
  )
