"""The product: edits as values, on disk, and the edited model as one interface."""

from jaxedit.edited.algebra import (
    add,
    apply,
    changed,
    compact,
    full,
    path,
    rank_limit,
    revert,
    select,
    stack,
)
from jaxedit.edited.export import Exported, write_adapter
from jaxedit.edited.files import load, save
from jaxedit.edited.ledger import edits_in, forget, roll_back
from jaxedit.edited.lm import LanguageModel, apply_model, open_model
from jaxedit.edited.scoring import Query, Scored, encode_queries

__all__ = [
    'Exported',
    'LanguageModel',
    'Query',
    'Scored',
    'add',
    'apply',
    'apply_model',
    'changed',
    'compact',
    'edits_in',
    'encode_queries',
    'forget',
    'full',
    'load',
    'open_model',
    'path',
    'rank_limit',
    'revert',
    'roll_back',
    'save',
    'select',
    'stack',
    'write_adapter',
]
