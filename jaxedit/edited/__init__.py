"""The delta is the product: apply, add, stack, save and load it."""

from jaxedit.edited.algebra import (
    add,
    apply,
    compact,
    kernel,
    one,
    rank_limit,
    rows,
    stack,
)
from jaxedit.edited.files import (
    load,
    save,
)

__all__ = [
    'add',
    'apply',
    'compact',
    'kernel',
    'load',
    'one',
    'rank_limit',
    'rows',
    'save',
    'stack',
]
