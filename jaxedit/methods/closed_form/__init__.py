"""Locate-and-edit methods with a closed form: recipe, insertion, editor."""

from jaxedit.methods.closed_form.boundary import boundary, closed_form_method
from jaxedit.methods.closed_form.editor import closed_form
from jaxedit.methods.closed_form.insertion import insert
from jaxedit.methods.closed_form.recipe import ClosedFormConfig, Recipe, State

__all__ = [
    'ClosedFormConfig',
    'Recipe',
    'State',
    'boundary',
    'closed_form',
    'closed_form_method',
    'insert',
]
