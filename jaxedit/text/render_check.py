"""Renders a chat template in a process of its own, with bounds.

A template is a program: its loops may not end, its texts may double with each
line, and nothing in a process can stop that. So a template that is more than a
plain loop over the messages is first rendered by a child with a limit on time,
memory and output; only if it ends well is it rendered here.

Run as a program, this file is that child. It imports nothing of ours.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Mapping, Sequence
from typing import Any

SECONDS = 30
_MEMORY = 1 << 28  # bytes beyond what the imports take
_MOST_CHARACTERS = 1 << 20
# Nodes of a template whose output grows with its own length and the messages',
# and no faster: there is nothing to assign, to call or to repeat.
_PLAIN = frozenset("""
    Add And Compare Concat Cond Const Getattr Getitem If Keyword Name Not Operand
    Or Output Template TemplateData Test
    """.split())


def is_plain(template: str) -> bool:
  """Whether a template is one loop over the messages, or none."""
  import jinja2  # of use to chat models only

  try:
    tree = jinja2.Environment().parse(template)
  except jinja2.TemplateError:
    return False
  loops = 0
  waiting: list[Any] = [tree]
  while waiting:
    node = waiting.pop()
    if isinstance(node, jinja2.nodes.For):
      loops += 1
      over = node.iter
      if loops > 1 or node.recursive or not isinstance(over, jinja2.nodes.Name):
        return False
      if over.name != 'messages' or node.test is not None:
        return False
    elif type(node).__name__ not in _PLAIN:
      return False
    waiting += node.iter_child_nodes()
  return True


def error(
    template: str,
    conversations: Sequence[tuple[Sequence[Mapping[str, str]], bool]],
    special: Mapping[str, str],
    seconds: float = SECONDS,
) -> str:
  """Says what keeps a template from being rendered, '' if nothing does.

  Args:
    template: a Jinja template.
    conversations: messages, and whether to ask for an answer.
    special: special tokens that a template may name.
    seconds: limit on time, of which importing takes about one.
  """
  if len(template) <= _MOST_CHARACTERS and is_plain(template):
    return ''
  given = dict(
      template=template, conversations=conversations, special=dict(special)
  )
  try:
    done = subprocess.run(
        [sys.executable, '-P', __file__],
        input=json.dumps(given).encode(),
        capture_output=True,
        timeout=seconds,
        check=False,
    )
  except subprocess.TimeoutExpired:
    return f'it does not end within {seconds:g} s'
  said = done.stdout.decode('utf-8', 'replace').strip()
  if done.returncode == 0:
    return said
  return 'it takes too much memory, or kills the process that renders it'


def _limit_memory() -> None:
  """Bounds what the process may take from here on, where that can be done."""
  try:
    import resource

    with open('/proc/self/statm') as statm:
      size = int(statm.read().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (size + _MEMORY,) * 2)
  except (ImportError, OSError, ValueError):
    pass


def _render(given: Mapping[str, Any]) -> str:
  """Renders; returns what went wrong."""
  from transformers.utils import chat_template_utils

  _limit_memory()
  try:
    compiled = chat_template_utils._compile_jinja_template(given['template'])
    for messages, prompt in given['conversations']:
      written = compiled.generate(
          messages=messages, tools=None, documents=None,
          add_generation_prompt=prompt, **given['special'],
      )  # fmt: skip
      length = sum(map(len, written))
      if length > _MOST_CHARACTERS:
        return f'it writes {length} characters'
  except MemoryError:
    return 'it takes too much memory'
  except Exception as e:  # a template is a program and may raise anything
    return ' '.join(str(e).split())[:300] or type(e).__name__
  return ''


if __name__ == '__main__':
  print(_render(json.load(sys.stdin)))
