"""What every editor must do, for each method of the registry.

A method is held by being registered, with its `small` settings; what it needs
comes from `editors.resources`.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import pathlib
import tempfile
from collections.abc import Sequence
from typing import Any, NamedTuple

import cases
import editors
import jax
import jax.numpy as jnp
import numpy as np
from absl.testing import absltest, parameterized

from jaxedit import edited as edited_lib
from jaxedit.batching import plan as plan_lib
from jaxedit.deltas import UNEDITED, Codebook, Edited
from jaxedit.methods import base
from jaxedit.methods.anyedit import anyedit
from jaxedit.methods.base import EditBatch, Editor, Info, Run
from jaxedit.methods.config import TargetedConfig
from jaxedit.methods.registry import METHODS
from jaxedit.models import decoder, loading
from jaxedit.testing import facts, models
from jaxedit.text import chunking
from jaxedit.text.encoding import EncodedEdit
from jaxedit.types import InputError, TokenLayout

# Methods that edit texts are held by `methods_in_context_test`.
BY_IDS = tuple(n for n, m in METHODS.items() if not m.by_text)
# Methods that are tested on chunked targets too, one a kind of editor; MEMIT of
# the closed forms.
CHUNKED = {
    METHODS[name].editor.__module__: name
    for name in (*METHODS, 'memit')
    if METHODS[name].chunkable
}.values()
CASES = (*BY_IDS, *(f'{name}+anyedit' for name in CHUNKED))
# One a kind of editor.
KINDS = tuple(
    {METHODS[n].editor.__module__: n for n in (*BY_IDS, 'memit')}.values()
)
# In f64, as a share of the effect that an edit has on logits.
CLOSE = 1e-6

SPEC = models.tiny_spec('llama')
EDITS, SEEDS = 4, (1, 5, 6)
POISON = SPEC.vocab - 1
every_case = parameterized.named_parameters((name, name) for name in CASES)
# The rest of a kind runs the same code, and LoRA that of FT: behind the marker
# `long`.
_SHARED = set(BY_IDS) - {*KINDS, 'memit_blue'} | {'lora'}
a_case_a_kind = cases.first(
    len(CASES) - len(_SHARED),
    parameterized.named_parameters(
        (name, name) for name in sorted(CASES, key=_SHARED.__contains__)
    ),
)
_run = jax.jit(edited_lib.apply_model, static_argnums=0)


def _config(case: str) -> Any:
  """A method's published settings, as a small model takes them."""
  name, _, chunks = case.partition('+')
  method = METHODS[name]
  config = method.configure(**method.small)
  if isinstance(config, TargetedConfig):
    several = len(config.layers) > 1
    target = config.target._replace(
        steps=4, rate=0.1, decay=0.5, clamp=5.0, threshold=0.0
    )
    config = dataclasses.replace(
        config, layers=(0, 1) if several else (1,), target=target
    )
  return anyedit(config, window=3) if chunks else config


@functools.cache
def edits(seed: int, kind: str) -> tuple[EncodedEdit, ...]:
  """Random edits: 'fact', 'text', 'chunks' of a text, or 'last', of prompts."""
  if kind == 'fact':
    # Targets of one length: an edit alone has the shape of its batch.
    some = facts.random_edits(EDITS, seed=seed, contexts=2, targets=(3,))
  else:
    some = facts.random_edits(
        EDITS, seed=seed, contexts=1, targets=(5, 8, 6), kl=False
    )
  if kind == 'last':
    last = lambda edit: (len(edit.rows[0]) - 1,)
    some = [dataclasses.replace(edit, anchors=last(edit)) for edit in some]
  if kind == 'chunks':
    cut = lambda edit: chunking.spans(len(edit.target), 3, 0)
    some = [dataclasses.replace(edit, chunks=cut(edit)) for edit in some]
  return tuple(some)


@functools.cache
def _plan(kind: str) -> plan_lib.BatchPlan:
  """One plan for all batches of a kind."""
  some = [edit for seed in SEEDS for edit in edits(seed, kind)]
  return plan_lib.plan_shapes(some, slots=EDITS, batch=EDITS)


@functools.cache
def _texts() -> tuple[np.ndarray, TokenLayout]:
  """Random texts and the plain prompts of the common edits, padded."""
  texts = [*np.random.default_rng(0).integers(2, 90, (4, 9))]
  texts += [e.rows[0] for kind in ('fact', 'text') for e in edits(1, kind)]
  tokens = np.zeros((len(texts), max(map(len, texts))), np.int32)
  valid = np.zeros(tokens.shape, bool)
  for row, ids in enumerate(texts):
    tokens[row, : len(ids)], valid[row, : len(ids)] = ids, True
  return tokens, decoder.token_layout(valid)


def _dtype_of(model: loading.Model) -> Any:
  """A context in which arrays are as wide as a model's."""
  return jax.enable_x64(model.params['final_norm']['scale'].dtype == np.float64)


def _logits(params: Any, edited: Edited = UNEDITED) -> jax.Array:
  tokens, layout = _texts()
  found = _run(SPEC, params, edited, tokens, layout)
  return jnp.where(layout.segment_ids[..., None] > 0, found, 0)


class Done(NamedTuple):
  """What an editor returned, and the model it edited."""

  edited: Edited
  state: Any
  info: Info
  model: loading.Model

  def effect(self, index: int | None = None) -> np.ndarray:
    """By how much logits move, [B, T, V]; of one of the edits side by side."""
    edited = self.edited
    if index is not None:
      edited = edited_lib.select(edited, index)
    with _dtype_of(self.model):
      return np.asarray(
          _logits(self.model.params, edited) - _logits(self.model.params)
      )


def _is_codebook(done: Done) -> bool:
  return isinstance(done.edited.deltas[0], Codebook)


class Bench(NamedTuple):
  """A method bound to a small model."""

  kind: str
  config: Any
  editor: Editor
  model: loading.Model
  state: Any

  def edits(self, seed: int = 1) -> list[EncodedEdit]:
    return list(edits(seed, self.kind))

  def edit(
      self,
      some: Sequence[EncodedEdit],
      group: Sequence[int] | None = None,
      *,
      model: loading.Model | None = None,
      state: Any = None,
  ) -> Done:
    """Edits in the dtype of the model."""
    model = model or self.model
    state = self.state if state is None else state
    batch = EditBatch(some, _plan(self.kind), group)
    with _dtype_of(model):
      return Done(*self.editor.edit(model, state, batch, Run()), model)

  def both(
      self, some: Sequence[EncodedEdit], **options: Any
  ) -> tuple[Done, Done]:
    """(one joint edit, independent ones)."""
    return (
        self.edit(some, **options),
        self.edit(some, range(len(some)), **options),
    )

  def poisoned(
      self, bad: Sequence[int]
  ) -> tuple[loading.Model, list[EncodedEdit]]:
    """A model with one token that is not finite, and edits that use it."""
    table = np.array(self.model.params['embed']['embedding'])
    table[POISON] = np.nan
    with jax.enable_x64(True):
      table = jnp.asarray(table)
    params = {**self.model.params, 'embed': {'embedding': table}}
    some = self.edits()
    for i in bad:
      rows = tuple(row.copy() for row in some[i].rows)
      for row, anchor in zip(rows, some[i].anchors):
        row[anchor] = POISON
      some[i] = dataclasses.replace(some[i], rows=rows)
    return dataclasses.replace(self.model, params=params), some


@functools.cache
def bench(case: str, dtype: str = 'float64') -> Bench:
  """The bench of a case."""
  name, _, chunks = case.partition('+')
  kind = 'fact' if 'fact' in METHODS[name].accepts else 'text'
  if not METHODS[name].contexts:
    kind = 'last'
  config = _config(case)
  with jax.enable_x64(dtype == 'float64'):
    params = models.random_params(SPEC, 0, jnp.dtype(dtype))
    model = loading.Model(SPEC, params, pathlib.Path(), 'ab' * 32, {})
    editor = METHODS[name].editor(SPEC, config)
    state = editor.init(model, editors.resources(editor, SPEC))
  return Bench('chunks' if chunks else kind, config, editor, model, state)


@functools.cache
def done(case: str) -> tuple[Done, Done]:
  """The common batch, joint and independent."""
  return bench(case).both(bench(case).edits())


class CommonTest(parameterized.TestCase):

  def assert_close(self, got: np.ndarray, want: np.ndarray) -> None:
    self.assertLess(editors.gap(got, want), CLOSE)

  def assert_same_reports(
      self, got: Info, want: Info, pairs: Sequence[tuple[int, int]]
  ) -> None:
    """Compares edit i of `got` with edit j of `want`, for pairs (i, j)."""
    self.assertSameElements(got.per_edit, want.per_edit)
    for name, values in want.per_edit.items():
      found = [np.array(got.per_edit[name][i], float) for i, _ in pairs]
      wanted = [np.array(values[j], float) for _, j in pairs]
      np.testing.assert_allclose(
          found, wanted, rtol=CLOSE, atol=CLOSE, err_msg=name
      )

  @every_case
  def test_params_are_untouched(self, case):
    b = bench(case)
    leaves = jax.tree.leaves(b.model.params)
    before = [np.array(x) for x in leaves]
    b.both(b.edits(5))
    for leaf, now, old in zip(leaves, jax.tree.leaves(b.model.params), before):
      self.assertIs(now, leaf)
      np.testing.assert_array_equal(now, old)

  @every_case
  def test_same_batch_same_bits(self, case):
    again = bench(case).both(bench(case).edits())
    for one, other in zip(again, done(case)):
      jax.tree.map(np.testing.assert_array_equal, one[:2], other[:2])

  @every_case
  def test_second_batch_does_not_compile(self, case):
    done(case)
    some = bench(case).edits(6)
    if bench(case).kind == 'chunks':
      # Another number of preserved keys may be of another bucket.
      some = [
          dataclasses.replace(edit, target=edit.target[::-1].copy())
          for edit in bench(case).edits()
      ]
    with editors.compiles() as found:
      bench(case).both(some)
      self.assertEqual(found.count, 0)
      jax.jit(lambda x: x + len(case))(jnp.ones(3))
      self.assertGreater(found.count, 0, 'the counter counts nothing')

  @every_case
  def test_order_of_edits_does_not_matter(self, case):
    if bench(case).editor.ordered:
      self.skipTest('edits are made one after the other')
    b, order = bench(case), [3, 1, 0, 2]
    some, want = b.edits(), done(case)[0]
    got = b.edit([some[i] for i in order])
    self.assert_close(got.effect(), want.effect())
    self.assert_same_reports(got.info, want.info, list(enumerate(order)))

  @every_case
  def test_empty_batch_is_identity(self, case):
    b = bench(case)
    for group, full in zip((None, ()), done(case)):
      got = b.edit([], group)
      self.assertIs(got.state, b.state)
      self.assertEqual(got.edited.deltas, ())
      self.assertIs(
          edited_lib.apply(b.model.params, got.edited), b.model.params
      )
      self.assertEmpty(got.info.written)
      self.assertSameElements(got.info.per_edit, full.info.per_edit)
      self.assertFalse(any(got.info.per_edit.values()))

  @a_case_a_kind
  def test_dtype_is_kept(self, case):
    b = bench(case, 'bfloat16')
    for got in b.both(b.edits()):
      self.assertTrue(got.info.written.all())
      for leaf in jax.tree.leaves(got.edited):
        if jnp.issubdtype(leaf.dtype, jnp.floating):
          self.assertEqual(leaf.dtype, jnp.float32)
      self.assertTrue(np.isfinite(got.effect(got.edited.size and 0)).all())
    if not got.edited.deltas[0].mergeable:
      return
    merged = edited_lib.apply(b.model.params, b.edit(b.edits()).edited)
    for old, new in zip(*map(jax.tree.leaves, (b.model.params, merged))):
      self.assertEqual((new.dtype, new.shape), (old.dtype, old.shape))

  @every_case
  def test_independent_edits_are_edits_alone(self, case):
    b, (joint, apart) = bench(case), done(case)
    self.assertEqual(apart.edited.size, EDITS)
    self.assertIs(apart.state, b.state)
    some, total = b.edits(), 0
    for i, edit in enumerate(some):
      alone = b.edit([edit])
      self.assert_close(apart.effect(i), alone.effect())
      self.assert_same_reports(apart.info, alone.info, [(i, 0)])
      total = total + apart.effect(i)
    if _is_codebook(joint):  # entries do not see each other
      self.assert_close(total, joint.effect())
      return
    # Edits of one batch see each other, so together they differ.
    self.assertGreater(editors.gap(total, joint.effect()), 1e-3)

  @a_case_a_kind
  def test_groups_are_joint_edits_alone(self, case):
    b, group = bench(case), (2, 0, 2, 2)
    got = b.edit(b.edits(), group)
    self.assertEqual(got.edited.size, 3)
    for number in (0, 2):
      mine = [e for e, g in zip(b.edits(), group) if g == number]
      self.assert_close(got.effect(number), b.edit(mine).effect())
    np.testing.assert_array_equal(got.effect(1), 0)  # nobody's

  @every_case
  def test_saved_loaded_applied_and_reverted(self, case):
    params = bench(case).model.params
    for got in done(case):
      with tempfile.TemporaryDirectory() as folder:
        path = pathlib.Path(folder) / 'delta.safetensors'
        edited_lib.save(path, got.edited, {'model_hash': 'ab' * 32})
        with jax.enable_x64(True):
          loaded, _ = edited_lib.load(path, model_hash='ab' * 32)
      self.assertEqual(loaded.size, got.edited.size)
      one = lambda x: x if x.size is None else edited_lib.select(x, 2)
      if not one(loaded).mergeable:
        jax.tree.map(np.testing.assert_array_equal, loaded, got.edited)
        with self.assertRaisesRegex(InputError, 'keep it beside the model'):
          edited_lib.apply(params, one(loaded))
        continue
      with jax.enable_x64(True):
        want, merged = (
            edited_lib.apply(params, one(x)) for x in (got.edited, loaded)
        )
      jax.tree.map(np.testing.assert_array_equal, merged, want)
      reverted = edited_lib.revert(merged, params, one(loaded))
      jax.tree.map(self.assertIs, reverted, params)
      with self.assertRaises(AssertionError):  # the edit had changed some
        jax.tree.map(self.assertIs, merged, params)

  @a_case_a_kind
  def test_an_edit_that_is_not_finite_is_left_out(self, case):
    b, bad = bench(case), 1
    model, some = b.poisoned([bad])
    good = [i for i in range(EDITS) if i != bad]
    written = [i != bad for i in range(EDITS)]
    joint, apart = b.both(some, model=model)
    self.assertEqual(joint.info.written.tolist(), written)
    self.assertEqual(apart.info.written.tolist(), written)
    want = b.edit([b.edits()[i] for i in good])
    self.assert_close(joint.effect(), want.effect())
    pairs = [(i, j) for j, i in enumerate(good)]
    self.assert_same_reports(joint.info, want.info, pairs)
    for i in good:
      self.assert_close(apart.effect(i), done(case)[1].effect(i))
    np.testing.assert_array_equal(apart.effect(bad), 0)

  @every_case
  def test_no_finite_edit_changes_nothing(self, case):
    model, some = bench(case).poisoned(range(EDITS))
    got = bench(case).edit(some, model=model)
    self.assertFalse(got.info.written.any())
    self.assertTrue(got.info.reason)
    np.testing.assert_array_equal(got.effect(), 0)

  @every_case
  def test_lazy_equals_merged(self, case):
    got, _ = done(case)
    if not got.edited.mergeable:
      self.skipTest('no change of weights')
    params = got.model.params
    with jax.enable_x64(True):
      merged = _logits(edited_lib.apply(params, got.edited))
      want = np.asarray(merged - _logits(params))
    self.assert_close(got.effect(), want)

  @every_case
  def test_targets_come_nearer(self, case):
    if done(case)[0].info.targets is None:
      self.skipTest('optimises no hidden states')
    for got in done(case):
      self.assertTrue(got.info.written.all())
      if got.info.targets is None:
        continue
      distance = np.array(got.info.per_edit['distance'])
      self.assertLess(distance[:, -1].mean(), 0.95)

  @a_case_a_kind
  def test_a_second_batch_on_the_model_that_the_first_gave(self, case):
    b, (first, _) = bench(case), done(case)
    shape = lambda state: jax.tree.map(lambda x: (x.shape, x.dtype), state)
    if b.editor.cumulative:
      both = b.edit(b.edits(6), state=first.state)
      self.assertTrue(both.info.written.all())
      self.assertEqual(shape(both.state), shape(first.state))
      if _is_codebook(first):
        self.assert_close(both.effect(), first.effect())
      return
    with jax.enable_x64(True):
      params = edited_lib.apply(b.model.params, first.edited)
    model = dataclasses.replace(b.model, params=params)
    second = b.edit(b.edits(6), model=model, state=first.state)
    self.assertTrue(second.info.written.all())
    # What is remembered is bounded.
    self.assertEqual(shape(second.state), shape(first.state))
    with jax.enable_x64(True):
      total = edited_lib.add(first.edited, second.edited)
      both = edited_lib.apply(b.model.params, total)
      want = edited_lib.apply(params, second.edited)
    same = functools.partial(np.testing.assert_allclose, rtol=1e-9, atol=1e-9)
    jax.tree.map(same, both, want)

  @every_case
  def test_reports_survive_a_checkpoint(self, case):
    infos = [got.info for got in done(case)]
    written = json.dumps(base.info_record(base.join_infos(infos)))
    again = base.info_of(json.loads(written))
    self.assertEqual(again.written.tolist(), [True] * 2 * EDITS)
    for name, values in infos[0].per_edit.items():
      self.assertEqual(again.per_edit[name][:EDITS], list(values))
    if infos[0].work is not None:
      self.assertEqual(again.work.steps, sum(i.work.steps for i in infos))

  @parameterized.product(case=CASES, layers=[(), (0, 3), (-1,), (1, 0), (1, 1)])
  def test_layers_that_cannot_be_edited_are_refused(self, case, layers):
    if not hasattr(bench(case).config, 'layers'):
      self.skipTest('has no layers')
    config = dataclasses.replace(bench(case).config, layers=layers)
    with self.assertRaisesRegex(InputError, '^layers'):
      METHODS[case.partition('+')[0]].editor(SPEC, config)


if __name__ == '__main__':
  absltest.main()
