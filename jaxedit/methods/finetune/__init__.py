"""Fine-tuning: the settings and the editor that its methods share.

examples   texts and what they shall say, packed
loop       the optimisation of many independent edits side by side
editor     groups of edits, in and out of that loop
"""

from jaxedit.methods.finetune.editor import FinetuneConfig as FinetuneConfig
from jaxedit.methods.finetune.editor import Parts as Parts
from jaxedit.methods.finetune.editor import State as State
from jaxedit.methods.finetune.editor import finetune_editor as finetune_editor
