"""Locate-and-edit methods with a closed form: recipe, insertion, editor."""

from jaxedit.methods.closed_form.editor import closed_form
from jaxedit.methods.closed_form.insertion import insert
from jaxedit.methods.closed_form.recipe import Recipe, State, check_layers

__all__ = ['Recipe', 'State', 'check_layers', 'closed_form', 'insert']
