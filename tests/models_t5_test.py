"""T5 equals torch's: read, scored, generated, cut in pieces, edited and saved.

An encoder-decoder is run as one stack on one axis of tokens, which torch does
not do; nothing of that may show.
"""

from __future__ import annotations

import functools
import json
import pathlib
import tempfile

import hf_oracle
import jax
import jax.numpy as jnp
import numpy as np
import text_tokenizers
import torch
import transformers
from absl.testing import absltest, parameterized

import jaxedit as je
from jaxedit import edited as edited_lib
from jaxedit import sources
from jaxedit.batching import packer
from jaxedit.deltas import UNEDITED, Dense, Edited, LowRank
from jaxedit.edited import scoring
from jaxedit.eval.scorers import perplexity
from jaxedit.methods import base
from jaxedit.models import decode, decoder, families, loading, saving, tensors
from jaxedit.models.spec import param_shapes, row
from jaxedit.models.tokenizer import load_tokenizer
from jaxedit.runs import needs
from jaxedit.runs.config import RunConfig
from jaxedit.stats import moments
from jaxedit.testing import models
from jaxedit.text import locate
from jaxedit.types import KV, InputError, Patch, Tap

# Version 1.0, 1.1 with a head of its own, and one with more layers above.
VARIANTS = {
    'relu': {},
    'gated': dict(feed_forward_proj='gated-gelu', tie_word_embeddings=False),
    'higher': dict(num_decoder_layers=3),
}
# torch takes variances and softmax in f32 whatever its weights are.
CLOSE = 1e-5
SOURCES, ANSWERS = (9, 20, 3, 14), (4, 6, 1, 3)


@functools.cache
def torch_model(variant, seed=0):
  """A random model, in f64; weights are large enough to show a missing part."""
  model = hf_oracle.make('t5', seed, **VARIANTS[variant])
  if variant == 'gated':  # transformers ties the heads of all
    size = model.shared.weight.shape
    noise = torch.randn(size, generator=torch.Generator().manual_seed(9))
    model.lm_head.weight = torch.nn.Parameter(0.2 * noise)
    model.config.tie_word_embeddings = False
  return model.double()


@functools.cache
def bench(variant):
  """(spec, params in f64, torch's model)."""
  oracle = torch_model(variant)
  with tempfile.TemporaryDirectory() as folder:
    write(variant, folder)
    spec = loading.load_model(folder).spec
  state = {n: x.detach().numpy() for n, x in oracle.state_dict().items()}
  found = {p: np.zeros(shape) for p, shape in param_shapes(spec).items()}
  table = families.tensors_of(spec)
  for name, slots in tensors.upstream_slots(spec, table).items():
    for slot in slots:
      value = tensors.to_canonical(state[name], slot.source, spec.heads)
      if slot.layer is None:
        found[slot.path] = value
      else:
        rows = found[slot.path]
        rows[row(spec.layers, len(rows), slot.layer)] = value
  with jax.enable_x64(True):
    return spec, loading.nest(jax.tree.map(jnp.asarray, found)), oracle


def write(variant, folder):
  """Writes a folder as published ones are: an untied head is in its file."""
  model = torch_model(variant)
  config = {**model.config.to_dict(), 'architectures': ['T5']}
  config['tie_word_embeddings'] = variant != 'gated'
  kept = {
      name: x.float().contiguous()
      for name, x in model.state_dict().items()
      if 'embed_tokens' not in name and (variant == 'gated' or 'lm_head' not in name)
  }  # fmt: skip
  folder = pathlib.Path(folder)
  hf_oracle.safetensors.torch.save_file(kept, folder / 'model.safetensors')
  (folder / 'config.json').write_text(json.dumps(config))


@functools.cache
def texts():
  """[(source, answer)] of ids."""
  rng = np.random.default_rng(0)
  draw = lambda n: rng.integers(2, 97, n).astype(np.int32)
  return [(draw(s), draw(a)) for s, a in zip(SOURCES, ANSWERS)]


def prompt_of(source):
  return np.append(~source, 0)


def rows_of():
  return [np.append(prompt_of(s), a[:-1]) for s, a in texts()]


def torch_logits(oracle, source, answer):
  """[n, V] that foretell an answer."""
  given = np.append(0, answer[:-1])
  with torch.no_grad():
    found = oracle(
        input_ids=torch.tensor(source)[None],
        decoder_input_ids=torch.tensor(given)[None],
        use_cache=False,
    )
  return found.logits[0].numpy()


def padded():
  rows = rows_of()
  return packer.pad(rows, (len(rows), max(map(len, rows)) + 2))


def packed():
  rows = rows_of()
  length = np.array([*map(len, rows)], np.int32)
  budget = int(length.sum()) + 3
  tokens = np.zeros((1, budget), np.int32)
  tokens[0, : length.sum()] = np.concatenate(rows)
  found = packer.end_to_end(
      0 * length, length, width=length.max(), token_budget=budget
  )
  return tokens, packer.with_sources(found, tokens)


@functools.partial(jax.jit, static_argnums=(0, 4, 5))
def part(
    spec, params, h, layout, start, stop, prefix=None, deltas=(), patches=()
):
  taps = (Tap('kv', tuple(range(start, stop))),)
  h, (kv,) = decoder.run_layers(
      spec, params, h, layout, start=start, stop=stop, prefix=prefix,
      deltas=deltas, patches=patches, taps=taps,
  )  # fmt: skip
  return h, kv


class T5TestCase(parameterized.TestCase):

  def setUp(self):
    super().setUp()
    self.enterContext(jax.enable_x64(True))

  def run_padded(self, spec, params, deltas=()):
    tokens, layout = padded()
    h = decoder.embed(spec, params, tokens, layout)
    h, _ = part(spec, params, h, layout, 0, spec.layers, None, deltas)
    return decoder.logits(spec, params, h)

  def assert_close(self, got, want, tolerance=CLOSE):
    self.assertGreater(np.asarray(want).std(), 1e-3)
    np.testing.assert_allclose(got, want, rtol=0, atol=tolerance)

  def assert_answers(self, found, oracle):
    """[B, T, V] logits are torch's where answers are foretold."""
    for i, (source, answer) in enumerate(texts()):
      some = slice(len(source), len(source) + len(answer))
      want = torch_logits(oracle, source, answer)
      self.assert_close(found[i, some], want)


class ForwardTest(T5TestCase):

  @parameterized.parameters(*VARIANTS)
  def test_logits_are_those_of_torch(self, variant):
    spec, params, oracle = bench(variant)
    self.assert_answers(self.run_padded(spec, params), oracle)

  def test_packed_tokens(self):
    spec, params, oracle = bench('gated')
    tokens, rows = packed()
    h = decoder.embed(spec, params, tokens, rows)
    h, _ = part(spec, params, h, rows, 0, spec.layers)
    found = np.asarray(decoder.logits(spec, params, h))[0]
    first = 0
    for one, (source, answer) in zip(rows_of(), texts()):
      some = slice(first + len(source), first + len(one))
      self.assert_close(found[some], torch_logits(oracle, source, answer))
      first += len(one)

  def test_in_pieces_behind_a_prefix(self):
    """Layers one after the other, the source first and then the rest."""
    spec, params, oracle = bench('higher')
    for source, answer in texts()[:2]:
      ids = np.append(prompt_of(source), answer[:-1])[None]
      tokens, layout = packer.pad(ids, ids.shape)
      cut = len(source)
      some = lambda columns: jax.tree.map(lambda x: x[:, columns], layout)
      parts = [slice(0, cut), slice(cut, None)]
      states = [
          decoder.embed(spec, params, tokens[:, p], some(p)) for p in parts
      ]
      layouts = [some(parts[0]), some(parts[1]).replace(source=None)]
      for layer in range(spec.layers):
        states[0], kv = part(
            spec, params, states[0], layouts[0], layer, layer + 1
        )
        states[1], _ = part(
            spec, params, states[1], layouts[1], layer, layer + 1,
            KV(*kv, layouts[0]),
        )  # fmt: skip
      found = decoder.logits(spec, params, states[1])[0]
      self.assert_close(found, torch_logits(oracle, source, answer))

  def test_what_passes_a_layer_is_not_changed(self):
    spec, params, _ = bench('relu')
    tokens, layout = padded()
    h = decoder.embed(spec, params, tokens, layout)
    border = spec.encoder_layers
    low, _ = part(spec, params, h, layout, 0, border)
    high, _ = part(spec, params, low, layout, border + 1, spec.layers)
    source = np.asarray(layout.source)
    np.testing.assert_array_equal(low[~source], h[~source])
    np.testing.assert_array_equal(high[source], low[source])
    self.assertGreater(np.abs(low - h)[source].max(), 0.1)

  def test_a_decoder_without_a_source_is_refused(self):
    spec, params, _ = bench('relu')
    tokens, layout = packer.pad([[0, 5]], (1, 2))
    with self.assertRaisesRegex(ValueError, 'no source'):
      decoder.forward(spec, params, tokens, layout)

  @parameterized.parameters(
      (-130, 15), (-64, 14), (-20, 10), (-8, 8), (-7, 7), (0, 0), (1, 17),
      (7, 23), (8, 24), (20, 26), (64, 30), (130, 31),
  )  # fmt: skip
  def test_buckets_of_both_sides(self, gap, want):
    spec = models.tiny_spec('t5', position_buckets=32, position_distance=128)
    found = decoder.position_buckets(spec, jnp.array([gap]), True)
    self.assertEqual(found.tolist(), [want])

  @parameterized.parameters(
      (-200, 31), (-127, 31), (-64, 26), (-20, 17), (-16, 16), (-15, 15),
      (-1, 1), (0, 0), (5, 0),
  )  # fmt: skip
  def test_buckets_of_one_side(self, gap, want):
    spec = models.tiny_spec('t5', position_buckets=32, position_distance=128)
    found = decoder.position_buckets(spec, jnp.array([gap]), False)
    self.assertEqual(found.tolist(), [want])


class EditTest(T5TestCase):

  def change(self, spec, site, layers, kind, seed=0):
    rng = np.random.default_rng(seed)
    fan_in, fan_out = param_shapes(spec)[f'layers/{site}/kernel'][1:]
    draw = lambda *shape: 0.1 * rng.standard_normal((len(layers), *shape))
    if kind == 'dense':
      return Dense(layers, site, draw(fan_in, fan_out))
    return LowRank(layers, site, 3 * draw(2, fan_in), 3 * draw(2, fan_out))

  @parameterized.parameters(
      ('mlp/down', (0, 3), 'low_rank'),
      ('attn/q', (1, 2), 'dense'),
      ('cross/v', (2, 3), 'low_rank'),
      ('cross/out', (3,), 'dense'),
  )
  def test_deltas_are_changes_of_weights(self, site, layers, kind):
    spec, params, _ = bench('relu')
    edited = Edited((self.change(spec, site, layers, kind),))
    merged = edited_lib.apply(params, edited)
    want = self.run_padded(spec, merged)
    valid = np.asarray(padded()[1].segment_ids) > 0
    valid &= ~np.asarray(padded()[1].source)
    got = self.run_padded(spec, params, edited.deltas)
    self.assert_close(got[valid], want[valid], 1e-10)
    before = self.run_padded(spec, params)
    self.assertGreater(np.abs(want - before)[valid].max(), 1e-3)

  def test_cross_attention_is_in_the_upper_layers_alone(self):
    spec, params, _ = bench('relu')
    edited = Edited((self.change(spec, 'cross/v', (1, 2), 'dense'),))
    with self.assertRaisesRegex(InputError, 'does not have'):
      edited_lib.apply(params, edited)

  def test_patches(self):
    """A state that is put in the place of an encoder's changes the answer."""
    spec, params, _ = bench('relu')
    tokens, layout = padded()
    h = decoder.embed(spec, params, tokens, layout)
    column = jnp.full(len(tokens), 1)
    value = jnp.ones((len(tokens), spec.width))
    patch = Patch('block', 'set', jnp.int32(1), column, value)
    out, _ = part(spec, params, h, layout, 0, spec.layers, None, (), (patch,))
    low, _ = part(spec, params, h, layout, 0, 2)
    low = low.at[:, 1].set(1)
    want, _ = part(spec, params, low, layout, 2, spec.layers)
    self.assert_close(out, want, 1e-10)


class DecodeTest(T5TestCase):

  @parameterized.parameters('relu', 'gated')  # torch's cache knows one depth
  def test_greedy_texts_are_those_of_torch(self, variant):
    spec, params, oracle = bench(variant)
    prompts = [prompt_of(source).tolist() for source, _ in texts()]
    found = decode.generate(
        spec, params, prompts, max_new_tokens=10, stop_ids=[1]
    )
    for (source, _), got in zip(texts(), found):
      want = oracle.generate(
          torch.tensor(source)[None], max_new_tokens=10, do_sample=False
      )
      self.assertEqual(got, want[0, 1 : len(got) + 1].tolist())

  def test_edits_side_by_side(self):
    spec, params, _ = bench('relu')
    rng = np.random.default_rng(3)
    draw = lambda *shape: 0.3 * rng.standard_normal((2, 4, *shape))
    delta = LowRank(
        (1, 3), 'mlp/down', draw(2, spec.mlp_width), draw(2, spec.width)
    )
    prompts = [prompt_of(source).tolist() for source, _ in texts()]
    found = decode.generate(
        spec, params, prompts, max_new_tokens=6, deltas=(delta,),
        edit_ids=range(4),
    )  # fmt: skip
    for i, prompt in enumerate(prompts):
      own = jax.tree.map(lambda x, i=i: x[:, i], delta)
      (want,) = decode.generate(
          spec, params, [prompt], max_new_tokens=6, deltas=(own,)
      )
      self.assertEqual(found[i], want)

  def test_a_penalty_counts_what_was_written(self):
    spec, params, oracle = bench('gated')
    source = texts()[0][0]
    (found,) = decode.generate(
        spec, params, [prompt_of(source).tolist()], max_new_tokens=10,
        repetition_penalty=1.5,
    )  # fmt: skip
    want = oracle.generate(
        torch.tensor(source)[None], max_new_tokens=10, do_sample=False,
        repetition_penalty=1.5, eos_token_id=None,
    )  # fmt: skip
    self.assertEqual(found, want[0, 1:].tolist())

  def test_scores(self):
    spec, params, oracle = bench('gated')
    rng = np.random.default_rng(5)
    queries, wanted = [], []
    for source, answer in texts():
      other = rng.integers(2, 97, 2)
      answers = tuple(tuple(a.tolist()) for a in (answer, other))
      queries.append(scoring.Query(tuple(prompt_of(source).tolist()), answers))
      for ids in (answer, other):
        logits = torch.tensor(torch_logits(oracle, source, ids))
        loss = torch.nn.functional.cross_entropy(
            logits, torch.tensor(ids).long()
        )
        wanted.append((loss.item(), tuple(logits.argmax(-1).tolist())))
    found = [x for row in scoring.score(spec, params, (), queries) for x in row]
    for got, (nll, best) in zip(found, wanted, strict=True):
      self.assertAlmostEqual(got.nll, nll, delta=CLOSE)
      self.assertEqual(got.argmax, best)

  def test_a_prompt_that_is_no_source(self):
    spec, params, _ = bench('relu')
    for prompt in ([5, 6], [~5, ~1], [~5, 0, ~6]):
      with self.assertRaisesRegex(InputError, 'it is no source'):
        decode.generate(spec, params, [prompt], max_new_tokens=1)
      query = scoring.Query(tuple(prompt), ((5,),))
      self.assertIn('it is no source', scoring.error(spec, query))
    query = scoring.Query((~400, ~1, 0), ((5,),))
    self.assertIn('has token 400', scoring.error(spec, query))


@functools.cache
def tokenizer_folder():
  """A folder of a model with a tokenizer like T5's."""
  folder = pathlib.Path(tempfile.mkdtemp())
  # Without the scale of tied heads, whose small logits hardly learn.
  sizes = dict(vocab_size=200, n_positions=64, tie_word_embeddings=False)
  hf_oracle.make('t5', **sizes).save_pretrained(folder)
  (folder / 'tokenizer.json').write_text(text_tokenizers.t5().to_str())
  names = dict(pad_token='<pad>', eos_token='</s>', unk_token='<unk>')
  (folder / 'tokenizer_config.json').write_text(json.dumps(names))
  return folder


class FolderTestCase(parameterized.TestCase):

  def folder(self):
    return self.enterContext(tempfile.TemporaryDirectory())


class FolderTest(FolderTestCase):

  @parameterized.parameters(*VARIANTS)
  def test_loaded_and_saved(self, variant):
    source, out = self.folder(), self.folder()
    write(variant, source)
    model = loading.load_model(source)
    tokens, layout = padded()
    found = decoder.forward(model.spec, model.params, tokens, layout)
    oracle = torch_model(variant)
    for i, (ids, answer) in enumerate(texts()):
      want = torch_logits(oracle, ids, answer)
      some = slice(len(ids), len(ids) + len(answer))
      np.testing.assert_allclose(found[i, some], want, rtol=0, atol=1e-4)
    changed = jax.tree.map(lambda x: x + 0.01, model.params)
    folder = pathlib.Path(out) / 'new'
    paths = param_shapes(model.spec)
    saving.save_model(source, folder, model.spec, changed, changed=list(paths))
    again = loading.load_model(folder)
    jax.tree.map(np.testing.assert_array_equal, again.params, changed)

  def test_tied_in_transformers_5(self):
    """Its configs tie every head and say apart whether its input is scaled."""
    folder = self.folder()
    model = hf_oracle.make('t5', tie_word_embeddings=False)
    model.save_pretrained(folder)
    found = loading.load_model(folder)
    self.assertTrue(found.spec.tied)
    self.assertEqual(found.spec.head_scale, 1)

  def test_config_is_checked(self):
    good = hf_oracle.make('t5').config.to_dict()
    self.assertEqual(families.spec_from_hf(good), models.tiny_spec('t5'))
    for changes, words in (
        (dict(feed_forward_proj='gated-mish'), 'feed_forward_proj'),
        (dict(is_gated_act=True), 'is_gated_act'),
        (dict(is_encoder_decoder=False), 'is_encoder_decoder'),
        (dict(relative_attention_max_distance=4), 'max_distance'),
        (dict(d_kv=0), 'd_kv'),
    ):
      with self.assertRaisesRegex(InputError, words):
        families.spec_from_hf({**good, **changes})

  def test_prompts(self):
    tokenizer = load_tokenizer(tokenizer_folder())
    own = transformers.PreTrainedTokenizerFast.from_pretrained(
        tokenizer_folder()
    )
    text = 'The capital of France is'
    ids = own(text)['input_ids']
    self.assertEqual(ids[-1], 1)
    (prompt,) = locate.encode_prompts(tokenizer, [text])
    self.assertEqual(prompt.tolist(), [*(~i for i in ids), 0])
    self.assertEqual(sources.prompt_ids(tokenizer, text), prompt.tolist())
    self.assertEqual(sources.prompt_text(tokenizer, prompt.tolist()), text)
    ((row_, span),) = locate.locate_subjects(
        tokenizer, [('The capital of ', 'France', ' is')]
    )
    self.assertEqual(row_.tolist(), prompt.tolist())
    within = [~i for i in row_[span[0] : span[1] + 1]]
    self.assertEqual(own.decode(within), 'France')
    (target,) = locate.encode_targets(
        tokenizer, [locate.Continued(text, 'Paris')]
    )
    self.assertEqual(target.tolist(), own('Paris')['input_ids'][:-1])


FACTS = [
    dict(prompt='The capital of {} is', subject='France', target='Rome',
         target_true='Paris'),
    dict(prompt='{} was born in', subject='Ada', target='London',
         target_true='Paris'),
]  # fmt: skip
EDITS = {
    'ft_l': dict(layers=(3,), fit_steps=40, fit_rate=0.05),
    'ft_m': dict(layers=(1,), fit_steps=40, fit_rate=0.05),
    'lora': dict(fit_steps=40, fit_rate=0.05),
    'calinet': dict(branch_steps=60),
    'grace': dict(layers=(3,), value_steps=100, radius=0.1),
}


class UserTest(FolderTestCase):
  """What a user does, from a folder on."""

  @parameterized.parameters(*EDITS)
  def test_facts_are_written_and_kept(self, method):
    model = je.load(tokenizer_folder())
    edited = je.edit(model, FACTS, method=method, **EDITS[method])
    self.assertTrue(edited.info.written.all())
    before = je.EditedModel(model, UNEDITED, None)
    asked = [
        (fact['prompt'].format(fact['subject']), fact['target'])
        for fact in FACTS
    ]
    for one in asked:
      self.assertLess(edited.score(*one), before.score(*one) - 0.3)
    path = pathlib.Path(self.folder()) / 'edit.safetensors'
    edited.save(path)
    again = je.load_edited(model, path)
    for one in asked:
      self.assertEqual(again.score(*one), edited.score(*one))
    if method not in ('ft_m', 'lora'):
      return
    folder = path.parent / 'merged'
    edited.merge(folder)
    other = transformers.T5ForConditionalGeneration.from_pretrained(folder)
    tokenizer = transformers.PreTrainedTokenizerFast.from_pretrained(folder)
    for prompt, _ in asked:
      ids = other.generate(
          torch.tensor([tokenizer(prompt)['input_ids']]), max_new_tokens=4
      )
      text = tokenizer.decode(ids[0, 1:], skip_special_tokens=True)
      said = edited.generate(prompt, max_new_tokens=4)
      self.assertEqual(said.strip(), text.strip())

  def test_a_fact_is_read_before_the_prompt(self):
    model = je.load(tokenizer_folder())
    edited = je.edit(model, FACTS[0], method='ice')
    tokenizer = model.tokenizer
    prompt = sources.prompt_ids(tokenizer, 'The capital of France is')
    (read,) = edited.edited.prompting.rewrite([prompt], None)
    self.assertIsNone(sources.error(read))
    text = sources.prompt_text(tokenizer, read)
    self.assertStartsWith(text, 'New Fact: The capital of France is Rome')
    self.assertEndsWith(text, 'Prompt: The capital of France is')

  @parameterized.parameters('memit', 'unke', 'wise', 'ultraedit', 'mello')
  def test_methods_of_decoders_are_refused(self, method):
    with self.assertRaisesRegex(InputError, 'edits decoders'):
      je.editor(models.tiny_spec('t5'), method)

  def test_layers_that_do_not_have_what_is_edited(self):
    spec = models.tiny_spec('t5')
    with self.assertRaisesRegex(InputError, 'is of the encoder'):
      je.editor(spec, 'grace', layers=(1,))
    with self.assertRaisesRegex(InputError, 'the layers 2 to 3 alone'):
      je.editor(spec, 'lora', sites=('cross/q',))

  def test_a_tokenizer_of_the_users(self):
    own = transformers.PreTrainedTokenizerFast.from_pretrained(
        tokenizer_folder()
    )
    model = je.load(tokenizer_folder(), tokenizer=own)
    known = je.load(tokenizer_folder()).tokenizer
    self.assertEqual(sources.border(model.tokenizer), sources.border(known))
    self.assertEqual(sources.border(own), ())

  def test_characters_without_tokens_are_refused(self):
    model = je.load(tokenizer_folder())
    with self.assertRaisesRegex(InputError, 'no token for'):
      je.edit(model, {**FACTS[0], 'target': '\u4e0a'}, 'ft_m', layers=(3,))

  def test_what_goes_on_with_a_text_is_refused(self):
    model = je.load(tokenizer_folder())
    lm = je.open_model(model)
    with self.assertRaisesRegex(InputError, 'perplexity takes a model that'):
      perplexity.perplexity(lm, model.tokenizer, 'a text')
    with self.assertRaisesRegex(InputError, 'second moment of keys takes'):
      moments.check(model.spec, (1,), {})
    config = RunConfig(model=str(tokenizer_folder()))
    with self.assertRaisesRegex(InputError, '--preserve=file:PATH'):
      needs.check(config, base.PreservedTexts(), model.spec)


if __name__ == '__main__':
  absltest.main()
