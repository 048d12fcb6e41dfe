"""Pytrees and plain records that cross module borders, and the axis letters.

Axis letters, one meaning each, used in every docstring of the library:

  E edits (or slots)        C contexts an edit     K chunks an edit
  B sequences of a batch    T tokens of a sequence
  N packed tokens (all sequences end to end)
  P prefix tokens           S suffix tokens        O output tokens (scored)
  L layers                  U layers above the edited one
  n edited layers           D width                F MLP inner (key) width
  Q query heads             G key/value heads      H head size
  V vocabulary              M pairs (key and residual) of one solve
  J preserved keys

A prime marks another number of the same kind, e.g. T' keys beside T queries.
Other axes are named by a word, e.g. `groups` or `half`.

Nothing here computes: functions over these types live in the packages that use
them.
"""

from __future__ import annotations

import contextlib
import dataclasses
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Protocol

import flax
import jax

Array = jax.Array
Params = Mapping[str, Any]

# Segment ids of `TokenLayout`. No token attends to padding; every later token
# of a sequence attends to its shared prefix; any other segment is visible to
# its own tokens only.
PADDING = 0
SHARED = 1

# '{}' in a cloze, where the subject goes, and '{{}}', which stands for '{}'.
_BRACES = re.compile(r'\{\{\}\}|(\{\})')


_LISTED = 20  # lines of a message
_LONGEST = 1000  # characters of a line
_CONTROL = re.compile(r'[\x00-\x1f\x7f-\x9f]+')


class InputError(ValueError):
  """Input that cannot be used, with messages that say what to do.

  Attributes:
    problems: one message an error, each of 1,000 characters at most: the middle
      of a longer one is left out. Several errors are collected and raised once;
      programs print the first of them and exit with code 2.
  """

  def __init__(self, *problems: str):
    self.problems = tuple(map(_cut, problems))
    super().__init__('\n'.join(self.lines()))

  @classmethod
  def raise_for(cls, problems: Sequence[str]) -> None:
    """Raises all of these problems at once, if there are any."""
    if problems:
      raise cls(*problems)

  @classmethod
  @contextlib.contextmanager
  def collected(cls, problems: list[str]) -> Iterator[None]:
    """Adds the messages of an error inside to a list instead."""
    try:
      yield
    except cls as error:
      problems += error.problems

  def lines(self) -> list[str]:
    """Lists the messages, one a line and 20 at most; the last counts others."""
    lines = [_CONTROL.sub(' ', problem) for problem in self.problems[:_LISTED]]
    if len(self.problems) > _LISTED:
      left = len(self.problems) - _LISTED + 1
      lines[-1] = f'and {left} more errors, {len(self.problems)} in all'
    return lines


def _cut(text: str) -> str:
  """Leaves out the middle of a long message, whose end says what to do."""
  if len(text) <= _LONGEST:
    return text
  return f'{text[: _LONGEST - 305]} ... {text[-300:]}'


class Stopped(Exception):
  """The end of a run that was asked to stop; the same call resumes it.

  What a `Progress` yields raises it, between two units of work. Loops that hold
  what is not saved save it, add the place to `saved` and raise it again.

  Attributes:
    saved: where what was found so far lies.
  """

  def __init__(self, message: str):
    super().__init__(message)
    self.saved: list[str] = []


class Progress(Protocol):
  """Opens a progress display; the library itself never prints."""

  def __call__(
      self, stage: str, total: int, unit: str
  ) -> contextlib.AbstractContextManager[Callable[[int], None]]:
    """Returns a context whose value is called with the units just done.

    Opening it, or a call, may raise `Stopped`.
    """


@contextlib.contextmanager
def silent(
    stage: str, total: int, unit: str
) -> Iterator[Callable[[int], None]]:
  """The `Progress` that shows nothing, the default everywhere."""
  del stage, total, unit
  yield lambda done: None


@flax.struct.dataclass
class TokenLayout:
  """Positions and segments of tokens; attention follows from them alone.

  A token attends to a token of its sequence whose position is not after its own
  and whose segment is `SHARED` or its own. So left padding, right padding,
  packed texts (segments 2, 3, ...) and answers that branch from one shared
  prefix (segments 2, 3, ...) are the same computation. In an encoder a token
  attends to later ones too.

  An encoder-decoder's sequence is a source, which its encoder reads, and behind
  it what the decoder writes, on one axis of positions (see `models.decoder`).

  Attributes:
    positions: [B, T] int32, rotary or learned position of the token.
    segment_ids: [B, T] int32, `PADDING`, `SHARED` or an id from 2 up.
    source: [B, T] bool, the tokens of a source; None where there are none.
    causal: whether positions matter as above, static; of an encoder, False.
  """

  positions: Array
  segment_ids: Array
  source: Array | None = None
  causal: bool = flax.struct.field(pytree_node=False, default=True)


@flax.struct.dataclass
class PackedSequences:
  """Sequences of different lengths, end to end on one axis of N tokens.

  Linear maps and norms run on the packed axis, so short sequences are not
  padded to long ones; only attention sees sequences. Takes the place of a
  `TokenLayout` for activations of shape [1, N, ...].

  Sequences may be kept in shards: the first B / shards sequences have their
  tokens among the first N / shards, and so on. Devices that hold a shard each
  then exchange no tokens.

  Attributes:
    layout: [B, T] layout of the sequences, padded.
    index: [B, T] int32 index into the packed axis; N at padding.
    row: [N] int32 sequence of a packed token; B where there is no token.
    column: [N] int32 index of a packed token in its sequence.
    shards: equal parts of both axes, static; they divide B and N.
  """

  layout: TokenLayout
  index: Array
  row: Array
  column: Array
  shards: int = flax.struct.field(pytree_node=False, default=1)


@flax.struct.dataclass
class OutputTokens:
  """Tokens at which the last layer's output is needed.

  That layer computes keys and values for all tokens, everything else for these.

  Attributes:
    index: [O] int32 index into the packed axis; N where there is none.
    rows: the output tokens as packed sequences, O tokens of the same B
      sequences, in as many shards.
  """

  index: Array
  rows: PackedSequences


@flax.struct.dataclass
class KV:
  """Keys and values of prefix tokens in consecutive layers.

  Attributes:
    key: [L', B, G, P, H] rotated keys of L' consecutive layers.
    value: [L', B, G, P, H].
    layout: [B, P] layout of the prefix tokens.
  """

  key: Array
  value: Array
  layout: TokenLayout


@flax.struct.dataclass
class Patch:
  """One intervention on activations: one token of each sequence, in one layer.

  Attributes:
    site: 'block', 'attn' or 'mlp' (the output of that part), static.
    mode: 'add' or 'set', static.
    layer: [] int32; traced, so that a sweep over layers compiles once.
    column: [B] int32 index of the token among those of the run.
    value: [B, D].
  """

  site: str = flax.struct.field(pytree_node=False)
  mode: str = flax.struct.field(pytree_node=False)
  layer: Array
  column: Array
  value: Array


@dataclasses.dataclass(frozen=True)
class Tap:
  """One observation: an activation to return from a run.

  Attributes:
    site: 'block', 'attn', 'mlp' (outputs, [B, T, D]), 'kv' (keys and values,
      a pair of [B, G, T, H]), or the path of a linear map, e.g. 'mlp/down' (its
      input, [B, T, F]).
    layers: layers to observe.
    read: reduces the activation before it is stacked over layers, e.g. selects
      the anchor token or forms a Gram matrix.
  """

  site: str
  layers: tuple[int, ...]
  read: Callable[[Any], Any] = lambda activation: activation


@flax.struct.dataclass
class Targets:
  """Optimised hidden states.

  Attributes:
    z: [E, D] target at the anchor, f32 or wider.
    z0: [E, D] hidden state of the unedited model there.
    loss: [E] loss at z, in nats (likelihood, KL and decay terms together).
    likelihood: [E] mean negative log-likelihood a target token at z, in nats.
    steps: [E] int32 losses evaluated.
    finite: [E] bool, False where the loss stopped being finite.
  """

  z: Array
  z0: Array
  loss: Array
  likelihood: Array
  steps: Array
  finite: Array


# Kinds of probes. Others are accepted and reported under their own name.
REPHRASE = 'rephrase'  # asks for the target in other words
LOCALITY = 'locality'  # asks for something else, which should stay as it is
ALIAS = 'alias'  # names the subject in another way
REVERSED = 'reversed'  # asks for the subject, given the target
ONE_HOP = 'one_hop'  # asks for what follows from the target
ATTRIBUTE = 'attribute'  # asks for another attribute of the subject
DISTRACT = 'distract'  # asks for something else after the edit was stated
SUB_QUESTION = 'sub_question'  # asks for a part of a long target


@dataclasses.dataclass(frozen=True)
class Probe:
  """A prompt that an edit is judged by.

  Attributes:
    kind: what it shows, one of the kinds above or any other word.
    prompt: the prompt, subject filled in.
    answers: those that count as right; scores are of the first.
    space: whether a blank joins an answer to the prompt; as the text asks for
      (see `text.joining`) where it is None.
  """

  kind: str
  prompt: str
  answers: tuple[str, ...]
  space: bool | None = None


def cloze_parts(prompt: str) -> list[str]:
  """Splits a cloze at each '{}'.

  Args:
    prompt: the cloze; '{{}}' in it stands for a pair of braces.

  Returns:
    The literal texts around the placeholders, one more than there are.
  """
  parts, begin = [''], 0
  for found in _BRACES.finditer(prompt):
    parts[-1] += prompt[begin : found.start()]
    begin = found.end()
    if found[1]:
      parts.append('')
    else:
      parts[-1] += '{}'
  parts[-1] += prompt[begin:]
  return parts


@dataclasses.dataclass(frozen=True)
class EditRequest:
  """One edit, a fact or a long answer, with what it is judged by.

  Attributes:
    number: position in its file, counted from 1; error messages use it.
    id: the data set's own identifier.
    prompt: of a fact, a cloze with exactly one '{}' where the subject goes,
      and '{{}}' for braces of the text; of a long answer, the question as it is
      edited, without any chat template.
    subject: the subject's text; None for a long answer.
    target: the text to write; of a fact without leading space, of a long answer
      without end-of-turn token.
    target_true: the object that the model should hold now, if known.
    probes: what the edit is judged by beside its own prompt.
    case: requests of one case are one edit, e.g. the rewrites of a multi-hop
      question; '' if the request stands alone.
    category: kind of text, e.g. 'code'; '' if the set has none.
    space: whether a blank joins the target to the prompt; as the text asks for
      (see `text.joining`) where it is None.
  """

  number: int
  id: str
  prompt: str
  subject: str | None
  target: str
  target_true: str | None = None
  probes: tuple[Probe, ...] = ()
  case: str = ''
  category: str = ''
  space: bool | None = None

  @property
  def parts(self) -> tuple[str, str, str]:
    """The text before the subject, the subject, the text after it."""
    if self.subject is None:
      return self.prompt, '', ''
    before, *after = cloze_parts(self.prompt)
    return before, self.subject, '{}'.join(after)

  @property
  def question(self) -> str:
    """The prompt with its subject."""
    return ''.join(self.parts)

  def probes_of(self, kind: str) -> tuple[Probe, ...]:
    """Returns the probes of one kind, in order."""
    return tuple(probe for probe in self.probes if probe.kind == kind)
