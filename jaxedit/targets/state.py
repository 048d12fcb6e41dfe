"""What an optimisation of states is set by, keeps constant and carries along.

A state is changed through one of these outputs of its layer:

  block      the residual leaving the layer; z0 is that residual
  mlp        the MLP's output; z0 is that output
  attn+mlp   the attention's and the MLP's outputs, by one change each; where
             blocks are sequential, the MLP reads what the first change does

The first two run the same forward, as a block adds its MLP's output to the
residual as it is (all families here; a norm after the MLP would break this).

Axes: E slots, R rows of an edit, N places, P columns before the suffixes, U
layers above the edited one; part: the attention's change, then the MLP's.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import flax

from jaxedit.types import Array

# What `optimize` and `autoregressive` take as `output`.
OUTPUTS = ('block', 'mlp', 'attn+mlp')


class TargetConfig(NamedTuple):
  """Settings of the optimisation; numbers, so changing one does not recompile.

  `argmax_stop` alone recompiles where it is switched on or off.

  Attributes:
    steps: losses evaluated at most; there is one update fewer.
    rate: learning rate of Adam.
    decay: weight of |d| / |z0|^2.
    clamp: largest |d| as a multiple of |z0|.
    kl: weight of the KL term.
    threshold: an edit stops when its loss is below, nats.
    nll: weight of the negative log-likelihood.
    argmax_stop: 0 for none, or: where every target token is the most probable one in
      all contexts, the likelihood weighs a tenth in the next step, and the edit
      stops if its KL term as it weighs (times `kl`) is not above this, nats. An
      edit without KL row, or past its first chunk, has a KL term of 0.
      Published with PMET: 0.01. There the weight is part of the term too; the
      test, of two means of probabilities for equality, comes to the same
      comparison of tokens.
  """

  steps: int = 25
  rate: float = 0.5
  decay: float = 0.5
  clamp: float = 0.75
  kl: float = 0.0625
  threshold: float = 5e-2
  nll: float = 1.0
  argmax_stop: float = 0.0


# What a setting means, by field; the flags keep the names that papers use.
SETTINGS = {
    'steps': dict(
        flag='value_steps',
        help='losses evaluated a target at most (v_num_grad_steps)',
        source='MEMIT, appendix B',
        low=1,
    ),
    'rate': dict(
        flag='value_rate',
        help='learning rate of Adam (v_lr), for width 4096: the first step has'
        ' length rate * sqrt(width)',
        source='MEMIT, appendix B',
        low=0,
    ),
    'decay': dict(
        flag='value_decay',
        help='weight of |d| / |z0|^2 (v_weight_decay)',
        source='MEMIT, appendix B',
        low=0,
    ),
    'clamp': dict(
        flag='clamp',
        help='largest |d| / |z0| (clamp_norm_factor)',
        source='MEMIT, appendix B',
        low=0,
    ),
    'kl': dict(
        flag='kl_weight',
        help='weight of the KL term (kl_factor)',
        source='MEMIT, appendix B',
        low=0,
    ),
    'threshold': dict(
        flag='stop_loss',
        help='a target stops below this loss',
        unit='nats',
        source='MEMIT, published code',
        low=0,
    ),
}


class HalfOutputs(NamedTuple):
  """Outputs of the two halves of the edited layer, unedited.

  Attributes:
    attn: [1, N, D], or [E, R, D] at anchors; None where it is not needed.
    mlp: same shape.
  """

  attn: Array | None
  mlp: Array


class Prefill(NamedTuple):
  """A tile of edits with all that stays constant."""

  h: Array  # [1, N, D] residual leaving the layer
  key: Array  # [U, E, R, G, P, H]
  value: Array
  parts: HalfOutputs | None  # [1, N, D]; None if the block's output is changed


class PrefixCache(NamedTuple):
  """What the seated edits keep constant."""

  base: Array  # [1, N, D] residual leaving the layer
  key: Array  # [U, E, R, G, P, H]
  value: Array
  parts: HalfOutputs | None  # [E, R, D] at the anchors


@flax.struct.dataclass
class OptState:
  """Loop state of the slots of a room."""

  delta: Array  # [E, D], or [E, part, D]
  adam: Any
  done: Array  # [E] bool
  loss: Array  # [E]
  likelihood: Array  # [E]
  steps: Array  # [E] int32
  finite: Array  # [E] bool
  lowered: Array  # [E] bool, the likelihood weighs a tenth
  base: Array  # [E, V] unedited log-probabilities of the KL row, or [E, 0]
  kv: tuple[Array, Array] | None  # [U, rows, G, W, H] of the last step
  ran: Array  # [] int32 steps of the room
