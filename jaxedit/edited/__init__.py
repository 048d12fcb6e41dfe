"""The product: edits as values, on disk, and the edited model as one interface."""

from jaxedit.edited.algebra import (
    add,
    apply,
    compact,
    full,
    path,
    rank_limit,
    revert,
    select,
    stack,
)
from jaxedit.edited.files import load, save
from jaxedit.edited.lm import LanguageModel, apply_model, open_model
from jaxedit.edited.scoring import Query, Scored, encode_queries

__all__ = [
    'LanguageModel',
    'Query',
    'Scored',
    'add',
    'apply',
    'apply_model',
    'compact',
    'encode_queries',
    'full',
    'load',
    'open_model',
    'path',
    'rank_limit',
    'revert',
    'save',
    'select',
    'stack',
]
