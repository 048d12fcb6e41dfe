"""Optimises targets: hidden states that make a model produce a wanted text.

Adam, or L-BFGS, optimises a change d of the residual stream after layer l at the anchor
(e.g. the last token of the subject), or of the outputs of the layer's halves
(`state`), on

  mean over contexts of [ mean over target tokens of -log P(y_j) ]
  + kl * KL(P_d || P_0) of the next token after the subject of "{subject} is a"
  + decay * |d| / |z0|^2          with |d| <= clamp * |z0|,

and the target is z = z0 + d. Lower layers, tokens before the anchor and shared
prefixes are run once (`partial_forward`); this is exact. Continuous batching: a
finished edit frees its slot for the next (`scheduler`, `engine`,
`batching.slots`), without recompiling and without effect on other edits.

Source: Meng et al. 2022a (ROME, arXiv 2202.05262), equation 4; Meng et al.
2022b (MEMIT), equation 16; Li et al. 2023 (PMET, arXiv 2308.08742), section 3.
"""

from jaxedit.targets.objective import norm
from jaxedit.targets.partial_forward import (
    broadcast_prefix,
    lower,
    prefix_kv,
    shared_prefix_kv,
    upper,
)
from jaxedit.targets.run import TargetCache, optimize
from jaxedit.targets.scheduler import Objective, Work
from jaxedit.targets.state import TargetConfig

__all__ = [
    'Objective',
    'TargetCache',
    'TargetConfig',
    'Work',
    'broadcast_prefix',
    'lower',
    'norm',
    'optimize',
    'prefix_kv',
    'shared_prefix_kv',
    'upper',
]
