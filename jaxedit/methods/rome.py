"""ROME: one fact as a change of rank one.

  X = u (z - o) / (k_b . u),  u = C^-1 k*

k* is the key averaged over all contexts, k_b that of the bare prompt, o the MLP's
output there; after the edit that output has moved by exactly z - o. Several
facts at once are held exactly side by side (which published code does not do).

R-ROME uses one kind of key throughout, which removes the edits that ruin a model
when many are made in sequence.

Source: Meng et al. 2022, "Locating and Editing Factual Associations in GPT"
(arXiv 2202.05262), equation 2; Gupta et al. 2024, "Rebuilding ROME" (arXiv
2403.07175).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from jaxedit.methods.closed_form.recipe import Recipe
from jaxedit.solve.preconditioner import (
    covariance,
    identity,
)
from jaxedit.targets import TargetConfig
from jaxedit.types import InputError

R_ROME_KEYS = ('mean', 'plain')


def rome(
    layers: Sequence[int] = (5,),
    *,
    value: TargetConfig | None = None,
    moments: bool = True,
) -> Recipe:
  """The ROME row.

  Args:
    layers: the layer to edit.
    value: settings of the value optimisation; None for those of GPT-J.
    moments: weigh keys by their second moments; without them, as EasyEdit runs
      it, nothing speaks for the model's other keys.

  Returns:
    The recipe, for `closed_form`.

  Raises:
    InputError: more than one layer.
  """
  if len(layers) != 1:
    raise InputError(
        f'layers {list(layers)}: ROME edits one layer; name one, or use MEMIT'
    )
  preconditioner = (lambda gram: covariance(gram, 1.0)) if moments else identity
  return Recipe(
      name='rome',
      layers=tuple(layers),
      preconditioner=preconditioner,
      value=value or TargetConfig(steps=20, clamp=4.0),
      ridge=0.0,
      plain=None,
      constraint='plain',
      output='mlp',
  )


def r_rome(
    layers: Sequence[int] = (5,),
    *,
    value: TargetConfig | None = None,
    keys: str = 'mean',
) -> Recipe:
  """The R-ROME row.

  Args:
    layers: the layer to edit.
    value: as for `rome`.
    keys: which keys are used throughout, the 'mean' over contexts (whose
      average output then moves to z) or the 'bare' prompt's.

  Returns:
    The recipe, for `closed_form`.

  Raises:
    InputError: more than one layer, or unknown keys.
  """
  if keys not in R_ROME_KEYS:
    raise InputError(
        f'R-ROME keys {keys!r} are unknown; use {" or ".join(R_ROME_KEYS)}'
    )
  return dataclasses.replace(
      rome(layers, value=value),
      name='r-rome',
      plain=None if keys == 'mean' else 1.0,
      constraint='same',
      measured=keys,
  )
