"""Turns records into arrays of a few static shapes for value optimisation.

A row is one context with one edit's prompt, followed by all target tokens but
the last. Left padding puts the anchor (the edited position) of every row into
one column, right padding evens out the rest:

              prefix P            suffix S
  . . t t t t t t t t | A t t t t y y y . . .
                        0 1 2 3 4 5 6           score columns count from A
                                ^ ^ ^ ^         score columns of labels y_0..y_3

Everything left of the anchor is constant while its value is optimised, so a
long P costs once and only S costs at every step: edits are bucketed by S, and
all tiles of a batch share one P. Lengths are rounded up on a short ladder, so
that a data set compiles a handful of shapes.

The KL row is the subject in a neutral cloze; only its columns up to its anchor
matter, because the distribution compared is the one at the anchor.

Axis letters: E edits, C contexts, P prefix columns, S suffix columns, N labels.

Source: the rows and labels of MEMIT (Meng et al. 2023, arXiv 2210.07229);
published code turns the target back into text and tokenises the whole again,
here ids are kept.

It holds numpy arrays only and knows nothing of models; it does not sample
templates or read files.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import flax
import numpy as np

from jaxedit import types
from jaxedit.text import locate
from jaxedit.text.templates import template_faults

Ladder = tuple[int, ...]

# Every suffix column is paid for in every step of the optimisation, a further
# shape once: steps of one while lengths are small, of a quarter at most beyond.
LADDER: Ladder = (
    2, 3, 4, 5, 6, 7, 8, 10, 12, 14, 16, 20, 24, 28, 32, 40, 48, 56, 64, 80, 96,
    112, 128, 160, 192, 224, 256, 320, 384, 448, 512, 640, 768, 896, 1024,
)  # fmt: skip
LABEL_LADDER: Ladder = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64, 128, 256, 512)
ANCHORS = ('subject_last', 'prompt_last')
# Records tokenised at once: bounds the memory that character offsets take.
_CHUNK = 512


@dataclasses.dataclass(frozen=True)
class EncodedEdit:
  """One edit as ids.

  Attributes:
    number: the record's number in its file.
    rows: C arrays [T] int32, the prompt in each context, without the target.
    anchors: C columns, the edited position of each row.
    target: [n] int32 ids of the new object.
    kl: [T] int32 ids of the KL row up to and including its anchor; empty if
      there is none.
  """

  number: int
  rows: tuple[np.ndarray, ...]
  anchors: tuple[int, ...]
  target: np.ndarray
  kl: np.ndarray

  @property
  def suffix(self) -> int:
    """Columns that the longest row needs from its anchor on."""
    extra = len(self.target) - 1
    return max(
        len(row) + extra - anchor
        for row, anchor in zip(self.rows, self.anchors)
    )


@flax.struct.dataclass
class Tile:
  """Edits in one static shape; the anchor is column `prefix` of every row.

  Empty slots have edit -1, segment 0 in every column and label mask 0.

  Attributes:
    prefix: P, columns before the anchor, static.
    edit: [E] int32 index into the encoded edits, or -1.
    tokens: [E, C, P + S] int32, 0 where padded.
    position: [E, C, P + S] int32, 0 at the row's first token and where padded.
    segment: [E, C, P + S] int32, `types.PADDING` or `types.TRUNK`.
    score_column: [E, C, N] int32 in 0..S-1, columns from the anchor on whose
      next-token distribution is scored.
    label: [E, C, N] int32 token that should follow that column.
    label_mask: [E, C, N] float32, 1 for a label and 0 for padding.
    kl_tokens: [E, P_kl + 1] int32, the anchor in the last column; no columns
      where the edits have no KL row.
    kl_position: [E, P_kl + 1] int32.
    kl_segment: [E, P_kl + 1] int32.
  """

  prefix: int = flax.struct.field(pytree_node=False)
  edit: np.ndarray
  tokens: np.ndarray
  position: np.ndarray
  segment: np.ndarray
  score_column: np.ndarray
  label: np.ndarray
  label_mask: np.ndarray
  kl_tokens: np.ndarray
  kl_position: np.ndarray
  kl_segment: np.ndarray

  @property
  def suffix(self) -> int:
    """S, columns from the anchor on."""
    return self.tokens.shape[-1] - self.prefix


class Waste(NamedTuple):
  """Fractions of suffix columns that carry no token.

  Attributes:
    rows: over the rows of real edits.
    slots: over all rows, those of empty slots included.
  """

  rows: float
  slots: float


def round_up(n: int, ladder: Ladder = LADDER) -> int:
  """Returns the lowest rung not below n; past the top, multiples of the top.

  Args:
    n: a length.
    ladder: ascending lengths.

  Returns:
    The rounded length.
  """
  for rung in ladder:
    if n <= rung:
      return rung
  return -(-n // ladder[-1]) * ladder[-1]


def encode_edit(
    tokenizer: Any, record: types.Record, templates: Sequence[str], **options
) -> EncodedEdit:
  """Encodes one record; see `encode_edits` for the arguments."""
  return encode_edits(tokenizer, [record], templates, **options)[0]


def encode_edits(
    tokenizer: Any,
    records: Sequence[types.Record],
    templates: Sequence[str],
    *,
    max_tokens: int,
    anchor: str = 'subject_last',
    kl_template: str | None = '{} is a',
) -> list[EncodedEdit]:
  """Encodes records for value optimisation.

  Args:
    tokenizer: a fast transformers tokenizer.
    records: the edits.
    templates: contexts with one '{}' each, where the prompt goes.
    max_tokens: longest row in tokens, target included (less its last token,
      which is never an input); the model's context length.
    anchor: edited position, 'subject_last' (ROME, MEMIT) or 'prompt_last'.
    kl_template: cloze of the KL row (MEMIT's '{} is a'), or None for no row.

  Returns:
    One `EncodedEdit` a record, in order.

  Raises:
    types.InputError: a subject or target without tokens, an over-long row, a
      faulty template or an unknown anchor; all faults at once, by record.
  """
  _check_options(templates, anchor, kl_template)
  encoded, problems = [], []
  for begin in range(0, len(records), _CHUNK):
    chunk = records[begin : begin + _CHUNK]
    drafts = _draft(tokenizer, chunk, templates, (anchor, kl_template))
    for record, (edit, faults) in zip(chunk, drafts):
      faults = faults or _length_faults(edit, max_tokens)
      if faults:
        name = f'record {record.number} (id {record.id})'
        problems.extend(f'{name}: {fault}' for fault in faults)
      else:
        encoded.append(edit)
  if problems:
    raise types.InputError(*problems)
  return encoded


def edit_check(
    tokenizer: Any,
    templates: Sequence[str],
    *,
    max_tokens: int,
    anchor: str = 'subject_last',
    kl_template: str | None = '{} is a',
) -> Callable[[types.Record], list[str]]:
  """Makes the check that finds what `encode_edits` would refuse in a record.

  Args:
    tokenizer: see `encode_edits`, as for the other arguments.
    templates: contexts.
    max_tokens: longest row in tokens.
    anchor: edited position.
    kl_template: cloze of the KL row, or None.

  Returns:
    record -> sentences that do not name the record, for the `check` argument
    of a loader.

  Raises:
    types.InputError: a faulty template or an unknown anchor.
  """
  _check_options(templates, anchor, kl_template)

  def check(record: types.Record) -> list[str]:
    drafts = _draft(tokenizer, [record], templates, (anchor, kl_template))
    edit, faults = drafts[0]
    return faults or _length_faults(edit, max_tokens)

  return check


def _check_options(
    templates: Sequence[str], anchor: str, kl_template: str | None
) -> None:
  problems = template_faults(templates)
  if not templates:
    problems.append("no context templates were given; give at least '{}'.")
  if anchor not in ANCHORS:
    problems.append(
        f'anchor {anchor!r} is unknown; use {" or ".join(ANCHORS)}.'
    )
  if kl_template is not None:
    problems.extend(f'KL {fault}' for fault in template_faults([kl_template]))
  if problems:
    raise types.InputError(*problems)


def _draft(
    tokenizer: Any,
    records: Sequence[types.Record],
    templates: Sequence[str],
    options: tuple[str, str | None],
) -> list[tuple[EncodedEdit, list[str]]]:
  """Tokenises records in one go, leaving faults beside the edits."""
  anchor, kl_template = options
  cases = []
  for record in records:
    before, _, after = record.prompt.partition(locate.PLACEHOLDER)
    for template in templates:
      head, _, tail = template.partition(locate.PLACEHOLDER)
      cases.append((head + before, record.subject, after + tail))
    if kl_template is not None:
      head, _, tail = kl_template.partition(locate.PLACEHOLDER)
      cases.append((head, record.subject, tail))
  found = locate.locate_subjects(tokenizer, cases)
  targets = locate.encode_targets(tokenizer, [r.target_new for r in records])
  width = len(cases) // max(len(records), 1)
  drafts = []
  for i, (record, target) in enumerate(zip(records, targets)):
    mine = found[i * width : (i + 1) * width]
    faults = [] if len(target) else [locate.no_target(record.target_new)]
    if anchor == 'subject_last' and any(span is None for _, span in mine):
      faults.append(locate.no_subject(record.subject))
    anchors = tuple(
        span[1] if anchor == 'subject_last' and span else len(ids) - 1
        for ids, span in mine
    )
    rows = tuple(ids for ids, _ in mine)
    kl = np.zeros([0], np.int32)
    if kl_template is not None:
      kl = rows[-1][: anchors[-1] + 1]
      rows, anchors = rows[:-1], anchors[:-1]
    edit = EncodedEdit(record.number, rows, anchors, target, kl)
    drafts.append((edit, faults))
  return drafts


def _length_faults(edit: EncodedEdit, max_tokens: int) -> list[str]:
  longest = max(map(len, edit.rows))
  total = longest + len(edit.target) - 1
  faults = []
  if total > max_tokens:
    faults.append(
        f'its longest row takes {total} tokens ({longest} of context and'
        f' prompt, {len(edit.target)} of target less one), the limit is'
        f' {max_tokens}; shorten the prompt or the target.'
    )
  if len(edit.kl) > max_tokens:
    faults.append(
        f'its KL row takes {len(edit.kl)} tokens, the limit is {max_tokens};'
        ' shorten the subject.'
    )
  return faults


def make_tiles(
    encoded: Sequence[EncodedEdit],
    *,
    slots: int,
    ladder: Ladder = LADDER,
    prefix: int = 0,
    kl: int = 0,
) -> tuple[Tile, ...]:
  """Packs edits into tiles of static shape.

  Shapes depend on the set of edits alone; their order decides only which slot
  an edit takes among those of its suffix length.

  Args:
    encoded: edits with one number of contexts; none gives no tiles.
    slots: edits a tile (E), at least 1.
    ladder: ascending lengths for P and S.
    prefix: the least P, tokens, so that several batches share their shapes.
    kl: the least length of KL rows, tokens, likewise.

  Returns:
    Tiles by ascending S; only the last one has empty slots.

  Raises:
    ValueError: no slots, or edits with differing numbers of contexts.
  """
  if slots < 1:
    raise ValueError(f'a tile needs at least one slot, got {slots}')
  if not encoded:
    return ()
  if len({(len(edit.rows), not len(edit.kl)) for edit in encoded}) > 1:
    raise ValueError('edits differ in their contexts; encode them together')
  longest = max(max(edit.anchors) for edit in encoded)
  prefix = round_up(max(longest, prefix), ladder)
  kl = max(kl, *(len(edit.kl) for edit in encoded))
  kl = round_up(kl - 1, ladder) + 1 if kl else 0
  tiles = []
  for suffix, chosen in _groups(encoded, slots, ladder):
    index = np.full([slots], -1, np.int32)
    index[: len(chosen)] = chosen
    labels = max(len(encoded[i].target) for i in chosen)
    labels = round_up(labels, LABEL_LADDER)
    tiles.append(_tile(encoded, index, (prefix, suffix, labels, kl)))
  return tuple(tiles)


def _groups(
    encoded: Sequence[EncodedEdit], slots: int, ladder: Ladder
) -> list[tuple[int, list[int]]]:
  """Chooses the edits of every tile, and its S.

  Edits go by suffix length and, within one, by the number of their labels, as
  the head is computed for the longest target of a tile. What does not fill a
  tile moves up to the next suffix length: a slot that stays empty costs as much
  as an edit, a longer suffix costs less.
  """
  size = lambda i: (round_up(encoded[i].suffix, ladder), len(encoded[i].target))
  order = sorted(range(len(encoded)), key=size)
  groups = []
  waiting: list[int] = []
  for suffix, members in itertools.groupby(order, key=lambda i: size(i)[0]):
    waiting += members
    waiting.sort(key=lambda i: len(encoded[i].target))
    while len(waiting) >= slots:
      groups.append((suffix, waiting[:slots]))
      waiting = waiting[slots:]
  if waiting:
    longest = max(round_up(encoded[i].suffix, ladder) for i in waiting)
    groups.append((longest, waiting))
  return groups


def _tile(
    encoded: Sequence[EncodedEdit],
    index: np.ndarray,
    shape: tuple[int, int, int, int],
) -> Tile:
  """Fills one tile; `shape` is (P, S, N, P_kl + 1)."""
  prefix, suffix, labels, kl = shape
  lead = (len(index), len(encoded[0].rows))
  tokens = np.zeros([*lead, prefix + suffix], np.int32)
  span = np.zeros([*lead, 2], np.int32)
  score_column = np.zeros([*lead, labels], np.int32)
  label = np.zeros([*lead, labels], np.int32)
  label_mask = np.zeros([*lead, labels], np.float32)
  kl_tokens = np.zeros([len(index), kl], np.int32)
  kl_span = np.zeros([len(index), 2], np.int32)
  for e, i in enumerate(index[index >= 0]):
    edit = encoded[i]
    n = len(edit.target)
    for c, (row, anchor) in enumerate(zip(edit.rows, edit.anchors)):
      start = prefix - anchor
      end = start + len(row)
      tokens[e, c, start:end] = row
      tokens[e, c, end : end + n - 1] = edit.target[:-1]
      span[e, c] = start, end + n - 1
      first = end - 1 - prefix  # the last prompt token foretells label 0
      score_column[e, c, :n] = np.arange(first, first + n)
    label[e, :, :n] = edit.target
    label_mask[e, :, :n] = 1
    kl_tokens[e, kl - len(edit.kl) :] = edit.kl
    kl_span[e] = kl - len(edit.kl), kl
  position, segment = _columns(span, prefix + suffix)
  kl_position, kl_segment = _columns(kl_span, kl)
  return Tile(
      prefix=prefix,
      edit=index,
      tokens=tokens,
      position=position,
      segment=segment,
      score_column=score_column,
      label=label,
      label_mask=label_mask,
      kl_tokens=kl_tokens,
      kl_position=kl_position,
      kl_segment=kl_segment,
  )


def _columns(span: np.ndarray, width: int) -> tuple[np.ndarray, np.ndarray]:
  """Returns position and segment [..., width] of spans [..., (start, stop)]."""
  column = np.arange(width, dtype=np.int32)
  start, stop = span[..., :1], span[..., 1:]
  real = (column >= start) & (column < stop)
  position = np.where(real, column - start, 0).astype(np.int32)
  segment = np.where(real, types.TRUNK, types.PADDING).astype(np.int32)
  return position, segment


def padding_waste(tiles: Sequence[Tile]) -> Waste:
  """Measures how much of the optimiser's work falls on padding.

  Args:
    tiles: any number of tiles.

  Returns:
    Fractions of suffix columns without a token, 0 for no tiles.
  """
  used = rows = slots = 0
  for tile in tiles:
    segment = tile.segment[..., tile.prefix :]
    used += int((segment != types.PADDING).sum())
    slots += segment.size
    rows += segment[tile.edit >= 0].size
  if not rows:
    return Waste(0.0, float(slots > 0))
  return Waste(1 - used / rows, 1 - used / slots)
