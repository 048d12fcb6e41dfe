"""Settings, constants and loop state of target optimisation.

A target is one of these outputs of its layer:

  block      the residual stream after the layer; z0 is its unedited value
  mlp        the MLP's output; z0 is its unedited value
  attn+mlp   the attention's and the MLP's outputs, by one change each; where
             blocks are sequential, the MLP's input depends on the first change

The first two run the same forward pass, as a block adds its MLP's output to the
residual stream unchanged (in all families here; a norm after the MLP would
break this).

Axes as in `jaxedit.types`: E slots, C' sequences an edit, N token budget, S
suffix tokens, P prefix tokens, U layers above the edited one; half: the
attention's change, then the MLP's.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import flax

from jaxedit.types import Array, TokenLayout

# Values of `Objective.output`.
OUTPUTS = ('block', 'mlp', 'attn+mlp')


class TargetConfig(NamedTuple):
  """Settings of the optimisation; changing a number does not recompile.

  Only another solver does, and `argmax_stop` where it is switched on or off.

  Attributes:
    steps: losses evaluated at most, rejected trials of L-BFGS included; the
      last one makes no update.
    rate: learning rate of Adam.
    decay: weight of |d| / |z0|^2.
    clamp: largest |d| as a multiple of |z0|.
    kl: weight of the KL term.
    threshold: an edit stops when its loss is below, nats.
    nll: weight of the negative log-likelihood.
    argmax_stop: 0 for none. Otherwise, where every target token is the most
      probable one in all contexts, the likelihood weighs a tenth in the next
      step, and the edit stops if its weighted KL term is not above this, nats.
      An edit without KL prompt, or past its first chunk, has a KL term of 0.
      Published with PMET: 0.01, also for the weighted term; the published test
      compares two means of probabilities for equality, which is the same
      comparison of tokens.
    solver: a key of `solvers.SOLVERS`.
    first_step: length of L-BFGS's first trial as a multiple of |z0|.
    stagnation: 0 for none. Otherwise an edit stops when `stagnation_steps`
      losses, one after the other, were not lower than the lowest before by
      this share of it.
    stagnation_steps: see `stagnation`.
  """

  steps: int = 25
  rate: float = 0.5
  decay: float = 0.5
  clamp: float = 0.75
  kl: float = 0.0625
  threshold: float = 5e-2
  nll: float = 1.0
  argmax_stop: float = 0.0
  solver: str = 'adam'
  first_step: float = 0.5
  stagnation: float = 0.0
  stagnation_steps: int = 4


class HalfOutputs(NamedTuple):
  """Outputs of the two halves of the edited layer, unedited.

  Attributes:
    attn: [1, N, D], or [E, C', D] at anchors; None where it is not needed.
    mlp: same shape.
  """

  attn: Array | None
  mlp: Array


class SharedTokens(NamedTuple):
  """The shared prefixes, not yet run."""

  tokens: Array  # [C', P] int32
  layout: TokenLayout  # [C', P]


class Prefill(NamedTuple):
  """A packed batch of edits with all that stays constant."""

  h: Array  # [1, N, D] residual stream after the layer
  key: Array  # [U, E, C', G, P, H]
  value: Array
  parts: HalfOutputs | None  # [1, N, D]; None if the block's output is changed


class PrefixCache(NamedTuple):
  """What stays constant for the edits in slots."""

  base: Array  # [1, N, D] residual stream after the layer
  key: Array  # [U, E, C', G, P, H]
  value: Array
  parts: HalfOutputs | None  # [E, C', D] at the anchors


@flax.struct.dataclass
class OptState:
  """Loop state of all slots; of the last step, unless a line says otherwise."""

  delta: Array  # [E, D], or [E, half, D]; to evaluate next, until an edit ends
  solver: Any
  done: Array  # [E] bool
  loss: Array  # [E]
  likelihood: Array  # [E]
  steps: Array  # [E] int32, losses evaluated
  idle: Array  # [E] int32, losses evaluated since `mark`
  mark: Array  # [E] loss that stagnation is measured from
  finite: Array  # [E] bool
  lowered: Array  # [E] bool, the likelihood weighs a tenth
  base: Array  # [E, V] unedited log-probabilities at the KL prompt, or [E, 0]
  kv: tuple[Array, Array] | None  # [U, B, G, S, H]
  ran: Array  # [] int32 steps in this batch shape
