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

from jaxedit.methods.closed_form import (
    ClosedFormConfig,
    Recipe,
    closed_form_method,
)
from jaxedit.methods.settings import setting
from jaxedit.solve.preconditioner import Covariance, Identity
from jaxedit.targets import TargetConfig
from jaxedit.types import InputError

R_ROME_KEYS = ('mean', 'plain')


@dataclasses.dataclass(frozen=True)
class RomeConfig(ClosedFormConfig):
  """Settings of ROME; the defaults are those published for GPT-J.

  Attributes:
    moments: weigh keys by their second moments; without them, as EasyEdit runs
      it, nothing speaks for the model's other keys.
  """

  layers: tuple[int, ...] = setting((5,), 'the layer to edit', source='GPT-J')
  target: TargetConfig = TargetConfig(steps=20, clamp=4.0)
  moments: bool = setting(
      True,
      'weigh keys by second moments (off in EasyEdit)',
      flag='rome_moments',
  )

  def recipe(self) -> Recipe:
    """Returns the method as data.

    Raises:
      InputError: more than one layer.
    """
    return _rome(self, 'rome', moments=self.moments)


@dataclasses.dataclass(frozen=True)
class RRomeConfig(ClosedFormConfig):
  """Settings of R-ROME.

  Attributes:
    keys: which keys are used throughout, the 'mean' over contexts (whose
      average output then moves to z) or the 'plain' prompt's.
  """

  layers: tuple[int, ...] = setting((5,), 'the layer to edit', source='GPT-J')
  target: TargetConfig = TargetConfig(steps=20, clamp=4.0)
  keys: str = setting(
      'mean',
      'keys averaged over contexts, or of the plain prompt',
      flag='rrome_keys',
      choices=R_ROME_KEYS,
  )

  def recipe(self) -> Recipe:
    """Returns the method as data.

    Raises:
      InputError: more than one layer, or unknown keys.
    """
    if self.keys not in R_ROME_KEYS:
      raise InputError(
          f'R-ROME keys {self.keys!r} are unknown; use'
          f' {" or ".join(R_ROME_KEYS)}'
      )
    return dataclasses.replace(
        _rome(self, 'r-rome', moments=True),
        plain_weight=None if self.keys == 'mean' else 1.0,
        constraint='same',
        measured=self.keys,
    )


def _rome(config: ClosedFormConfig, name: str, *, moments: bool) -> Recipe:
  """ROME's terms."""
  if len(config.layers) != 1:
    raise InputError(
        f'layers {list(config.layers)}: ROME edits one layer; name one, or use'
        ' MEMIT'
    )
  return config._recipe(
      name,
      preconditioner=Covariance(1.0) if moments else Identity(),
      ridge=0.0,
      plain_weight=None,
      constraint='plain',
      output='mlp',
  )


METHODS = (
    closed_form_method(
        'rome',
        'one fact as a change of rank one',
        RomeConfig,
        parity={'easyedit': {'moments': False}},
        source='arXiv 2202.05262',
    ),
    closed_form_method(
        'r-rome',
        'ROME with one kind of key throughout',
        RRomeConfig,
        source='arXiv 2403.07175',
    ),
)
