"""What every editor is: two or three pure functions, no state of its own.

  state                  = editor.init(params, moments)
  edited, state, info    = editor.edit(params, state, batch)

`edit` never changes `params`: it returns a delta (`deltas.Edited`). What lasts
from one batch to the next is explicit in `state`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

from jaxedit.targets import Work
from jaxedit.types import Targets


class Info(NamedTuple):
  """What an edit reports, as numpy arrays over its E edits and their M states.

  Attributes:
    targets: the optimised states.
    edit: [M] int32 edit that a state belongs to; ascending.
    written: [E] bool, False for an edit whose loss, keys or residuals stopped
      being finite; from there on it is not part of the delta.
    distance: [n + 1, M] |z - z_now| / |z - z0| before each of the n edited
      layers was written and after the last.
    seconds: wall time of 'optimize' and 'insert'.
    work: what the optimisation ran.
  """

  targets: Targets
  edit: np.ndarray
  written: np.ndarray
  distance: np.ndarray
  seconds: dict[str, float]
  work: Work


class Editor(NamedTuple):
  """A method bound to a model's architecture.

  Attributes:
    init: (params, moments) -> state.
    edit: (params, state, edits) -> (edited, state, info): all edits of the
      batch together, as one change.
    edit_independent: same, every edit alone, or every group of edits where `owner`
      names one an edit: the change has a group axis [n, G, ...], and entry g is
      the model in which only that group was edited.

  Both take `memory`, a `values.Memory`: states that it recalls are not optimised.
  """

  init: Callable[..., Any]
  edit: Callable[..., Any]
  edit_independent: Callable[..., Any]
