"""Configs of real models give the right spec, and strange ones are refused."""

from __future__ import annotations

import dataclasses
from typing import Any

from absl.testing import absltest, parameterized

from jaxedit.models import families, tensors
from jaxedit.models.spec import ModelSpec, RopeScaling, param_shapes
from jaxedit.testing import models as tiny
from jaxedit.types import InputError

_GENERATION = dict(
    initializer_range=0.02, use_cache=True, torch_dtype='float16',
    transformers_version='4.41.2', bos_token_id=1, eos_token_id=2,
)  # fmt: skip
_LLAMA = dict(
    _GENERATION, architectures=['LlamaForCausalLM'], model_type='llama',
    hidden_act='silu', tie_word_embeddings=False, pretraining_tp=1,
)  # fmt: skip
_GPT_TASKS = dict(
    summary_activation=None, summary_first_dropout=0.1,
    summary_proj_to_labels=True, summary_type='cls_index',
    summary_use_proj=True, attn_pdrop=0.1, embd_pdrop=0.1, resid_pdrop=0.1,
    task_specific_params={
        'text-generation': {'do_sample': True, 'max_length': 50}
    },
)  # fmt: skip

LLAMA3_SCALING = dict(
    factor=32.0, high_freq_factor=4.0, low_freq_factor=1.0,
    original_max_position_embeddings=8192, rope_type='llama3',
)  # fmt: skip

REAL: dict[str, dict[str, Any]] = {
    'llama-2-7b': dict(
        _LLAMA, hidden_size=4096, intermediate_size=11008,
        max_position_embeddings=4096, num_attention_heads=32,
        num_hidden_layers=32, num_key_value_heads=32, rms_norm_eps=1e-05,
        rope_scaling=None, vocab_size=32000, _name_or_path='x',
    ),
    'llama-3-8b': dict(
        _LLAMA, hidden_size=4096, intermediate_size=14336,
        attention_bias=False, attention_dropout=0.0,
        max_position_embeddings=8192, num_attention_heads=32,
        num_hidden_layers=32, num_key_value_heads=8, rms_norm_eps=1e-05,
        rope_scaling=None, rope_theta=500000.0, vocab_size=128256,
    ),
    'llama-3.2-1b': dict(
        _LLAMA | dict(tie_word_embeddings=True), hidden_size=2048,
        intermediate_size=8192, attention_bias=False, attention_dropout=0.0,
        head_dim=64, max_position_embeddings=131072, mlp_bias=False,
        num_attention_heads=32, num_hidden_layers=16, num_key_value_heads=8,
        rms_norm_eps=1e-05, rope_scaling=LLAMA3_SCALING, rope_theta=500000.0,
        vocab_size=128256,
    ),
    'smollm2-135m': dict(
        _LLAMA | dict(tie_word_embeddings=True), hidden_size=576,
        intermediate_size=1536, attention_bias=False, attention_dropout=0.0,
        is_llama_config=True, max_position_embeddings=8192, mlp_bias=False,
        num_attention_heads=9, num_hidden_layers=30, num_key_value_heads=3,
        rms_norm_eps=1e-05, rope_interleaved=False, rope_scaling=None,
        rope_theta=100000, vocab_size=49152, pad_token_id=2,
        **{'transformers.js_config': {'kv_cache_dtype': {'q4f16': 'float16'}}},
    ),
    'qwen2.5-7b-instruct': dict(
        _GENERATION, architectures=['Qwen2ForCausalLM'], model_type='qwen2',
        attention_dropout=0.0, hidden_act='silu', hidden_size=3584,
        intermediate_size=18944, max_position_embeddings=32768,
        max_window_layers=28, num_attention_heads=28, num_hidden_layers=28,
        num_key_value_heads=4, rms_norm_eps=1e-06, rope_theta=1000000.0,
        sliding_window=131072, tie_word_embeddings=False,
        use_sliding_window=False, vocab_size=152064,
    ),
    'qwen3-8b': dict(
        _GENERATION, architectures=['Qwen3ForCausalLM'], model_type='qwen3',
        attention_bias=False, attention_dropout=0.0, head_dim=128,
        hidden_act='silu', hidden_size=4096, intermediate_size=12288,
        max_position_embeddings=40960, max_window_layers=36,
        num_attention_heads=32, num_hidden_layers=36, num_key_value_heads=8,
        rms_norm_eps=1e-06, rope_scaling=None, rope_theta=1000000,
        sliding_window=None, tie_word_embeddings=False,
        use_sliding_window=False, vocab_size=151936,
    ),
    'mistral-7b-v0.1': dict(
        _GENERATION, architectures=['MistralForCausalLM'],
        model_type='mistral', hidden_act='silu', hidden_size=4096,
        intermediate_size=14336, max_position_embeddings=32768,
        num_attention_heads=32, num_hidden_layers=32, num_key_value_heads=8,
        rms_norm_eps=1e-05, rope_theta=10000.0, sliding_window=4096,
        tie_word_embeddings=False, vocab_size=32000,
    ),
    'mistral-7b-v0.3': dict(
        _GENERATION, architectures=['MistralForCausalLM'],
        model_type='mistral', attention_dropout=0.0, hidden_act='silu',
        hidden_size=4096, intermediate_size=14336,
        max_position_embeddings=32768, num_attention_heads=32,
        num_hidden_layers=32, num_key_value_heads=8, rms_norm_eps=1e-05,
        rope_theta=1000000.0, sliding_window=None, tie_word_embeddings=False,
        vocab_size=32768,
    ),
    'gpt-j-6b': dict(
        _GPT_TASKS, activation_function='gelu_new',
        architectures=['GPTJForCausalLM'], bos_token_id=50256,
        eos_token_id=50256, gradient_checkpointing=False,
        initializer_range=0.02, layer_norm_epsilon=1e-05, model_type='gptj',
        n_embd=4096, n_head=16, n_inner=None, n_layer=28, n_positions=2048,
        rotary=True, rotary_dim=64, scale_attn_weights=True,
        tie_word_embeddings=False, tokenizer_class='GPT2Tokenizer',
        transformers_version='4.18.0.dev0', use_cache=True, vocab_size=50400,
    ),
    'gpt-neox-20b': dict(
        architectures=['GPTNeoXForCausalLM'], attention_probs_dropout_prob=0,
        bos_token_id=0, eos_token_id=0, hidden_act='gelu_fast',
        hidden_dropout_prob=0, hidden_size=6144, initializer_range=0.02,
        intermediate_size=24576, layer_norm_eps=1e-05,
        max_position_embeddings=2048, model_type='gpt_neox',
        num_attention_heads=64, num_hidden_layers=44, rotary_emb_base=10000,
        rotary_pct=0.25, tie_word_embeddings=False, torch_dtype='float16',
        transformers_version='4.19.0.dev0', use_cache=True, vocab_size=50432,
    ),
    'gpt2-xl': dict(
        _GPT_TASKS, activation_function='gelu_new',
        architectures=['GPT2LMHeadModel'], bos_token_id=50256,
        eos_token_id=50256, initializer_range=0.02, layer_norm_epsilon=1e-05,
        model_type='gpt2', n_ctx=1024, n_embd=1600, n_head=25, n_layer=48,
        n_positions=1024, output_past=True, vocab_size=50257,
    ),
}  # fmt: skip

_LARGE = dict(width=4096, heads=32, head_size=128, rotary_size=128, layers=32)
EXPECTED = {
    'llama-2-7b': ModelSpec(
        'llama', mlp_width=11008, kv_heads=32, vocab=32000,
        max_positions=4096, **_LARGE,
    ),
    'llama-3-8b': ModelSpec(
        'llama', mlp_width=14336, kv_heads=8, vocab=128256,
        max_positions=8192, rope_theta=500000.0, **_LARGE,
    ),
    'llama-3.2-1b': ModelSpec(
        'llama', width=2048, heads=32, head_size=64, rotary_size=64,
        layers=16, mlp_width=8192, kv_heads=8, vocab=128256,
        max_positions=131072, rope_theta=500000.0, tied=True,
        rope_scaling=RopeScaling('llama3', 32.0, 1.0, 4.0, 8192),
    ),
    'smollm2-135m': ModelSpec(
        'llama', width=576, heads=9, head_size=64, rotary_size=64, layers=30,
        mlp_width=1536, kv_heads=3, vocab=49152, max_positions=8192,
        rope_theta=100000.0, tied=True,
    ),
    'qwen2.5-7b-instruct': ModelSpec(
        'qwen2', width=3584, heads=28, head_size=128, rotary_size=128,
        layers=28, mlp_width=18944, kv_heads=4, vocab=152064,
        max_positions=32768, norm_eps=1e-6, rope_theta=1e6, qkv_bias=True,
    ),
    'qwen3-8b': ModelSpec(
        'qwen3', width=4096, heads=32, head_size=128, rotary_size=128,
        layers=36, mlp_width=12288, kv_heads=8, vocab=151936,
        max_positions=40960, norm_eps=1e-6, rope_theta=1e6, qk_norm=True,
    ),
    'mistral-7b-v0.1': ModelSpec(
        'mistral', mlp_width=14336, kv_heads=8, vocab=32000,
        max_positions=32768, window=4096, **_LARGE,
    ),
    'mistral-7b-v0.3': ModelSpec(
        'mistral', mlp_width=14336, kv_heads=8, vocab=32768,
        max_positions=32768, rope_theta=1e6, **_LARGE,
    ),
    'gpt-j-6b': ModelSpec(
        'gptj', width=4096, heads=16, kv_heads=16, head_size=256, layers=28,
        mlp_width=16384, vocab=50400, max_positions=2048, norm='layer',
        residual='parallel_shared', activation='gelu_tanh', gated=False,
        rotary='interleaved', rotary_size=64, mlp_bias=True, head_bias=True,
    ),
    'gpt-neox-20b': ModelSpec(
        'gpt_neox', width=6144, heads=64, kv_heads=64, head_size=96,
        layers=44, mlp_width=24576, vocab=50432, max_positions=2048,
        norm='layer', residual='parallel', activation='gelu_tanh',
        gated=False, rotary_size=24, qkv_bias=True, out_bias=True,
        mlp_bias=True,
    ),
    'gpt2-xl': ModelSpec(
        'gpt2', width=1600, heads=25, kv_heads=25, head_size=64, layers=48,
        mlp_width=6400, vocab=50257, max_positions=1024, norm='layer',
        activation='gelu_tanh', gated=False, rotary='none',
        learned_positions=True, qkv_bias=True, out_bias=True, mlp_bias=True,
        tied=True,
    ),
}  # fmt: skip


class FamiliesTest(parameterized.TestCase):

  @parameterized.parameters(*REAL)
  def test_real_config_gives_its_spec(self, name):
    self.assertEqual(families.spec_from_hf(REAL[name]), EXPECTED[name])

  @parameterized.parameters(*families.NAMES)
  def test_table_covers_every_leaf(self, name):
    table = families.get(name).TENSORS
    for changes in ({}, {'tied': False}):
      spec = tiny.tiny_spec(name, **changes)
      self.assertContainsSubset(param_shapes(spec), table)
      slots = tensors.upstream_slots(spec, table)
      for places in slots.values():
        self.assertLen(places, places[0].source.parts)

  def test_newer_rotary_form_is_the_older_one(self):
    old = REAL['llama-3.2-1b']
    new = {
        key: value
        for key, value in old.items()
        if key not in ('rope_scaling', 'rope_theta')
    }
    new['rope_parameters'] = dict(LLAMA3_SCALING, rope_theta=500000.0)
    self.assertEqual(families.spec_from_hf(new), EXPECTED['llama-3.2-1b'])
    both = dict(old, rope_parameters=new['rope_parameters'])
    self.assertEqual(families.spec_from_hf(both), EXPECTED['llama-3.2-1b'])
    both['rope_parameters'] = dict(LLAMA3_SCALING, rope_theta=10000.0)
    with self.assertRaisesRegex(InputError, 'keep one'):
      families.spec_from_hf(both)

  def test_rotary_kinds(self):
    base = REAL['llama-2-7b']

    def scaling(**fields):
      return families.spec_from_hf(dict(base, rope_scaling=fields)).rope_scaling

    self.assertIsNone(scaling(rope_type='default'))
    self.assertEqual(
        scaling(type='linear', factor=2.0), RopeScaling('linear', 2.0)
    )
    for fields, words in (
        (dict(type='dynamic', factor=2.0), "'dynamic' is not supported"),
        (dict(type='linear'), "needs the field 'factor'"),
        (dict(type='linear', factor=-1), 'must be a positive number'),
        (dict(type='linear', factor=2.0, beta=1), "'beta' is unknown"),
        (dict(partial_rotary_factor=0.5), 'rotates whole heads'),
    ):
      with self.assertRaisesRegex(InputError, words):
        scaling(**fields)

  def test_neox_variants(self):
    base = REAL['gpt-neox-20b']
    spec = families.spec_from_hf(dict(base, use_parallel_residual=False))
    self.assertEqual(spec.residual, 'sequential')
    spec = families.spec_from_hf(dict(base, attention_bias=False))
    self.assertFalse(spec.qkv_bias or spec.out_bias)
    new = {k: v for k, v in base.items() if not k.startswith('rotary')}
    new['rope_parameters'] = dict(
        rope_theta=10000, partial_rotary_factor=0.5, rope_type='default'
    )
    self.assertEqual(families.spec_from_hf(new).rotary_size, 48)

  def test_other_variants(self):
    spec = families.spec_from_hf(
        dict(REAL['gpt2-xl'], scale_attn_weights=False, n_inner=100)
    )
    self.assertEqual((spec.attn_scale, spec.mlp_width), (1.0, 100))
    spec = families.spec_from_hf(
        dict(REAL['llama-3-8b'], attention_bias=True, mlp_bias=True)
    )
    self.assertTrue(spec.qkv_bias and spec.out_bias and spec.mlp_bias)
    long_window = dict(REAL['qwen2.5-7b-instruct'], use_sliding_window=True)
    self.assertEqual(
        families.spec_from_hf(long_window), EXPECTED['qwen2.5-7b-instruct']
    )

  @parameterized.parameters(
      ('gpt2-xl', dict(scale_attn_by_inverse_layer_idx=True), 'inverse_layer'),
      ('gpt2-xl', dict(add_cross_attention=True), 'add_cross_attention'),
      ('gpt2-xl', dict(activation_function='mish'), 'activation_function'),
      ('gpt-j-6b', dict(rotary=False), 'rotary'),
      ('gpt-j-6b', dict(rotary_dim=None), "'rotary_dim' is missing"),
      ('gpt-j-6b', dict(rotary_dim=65), 'must be even'),
      ('llama-3-8b', dict(quantization_config={'bits': 4}), 'quantization'),
      ('llama-3-8b', dict(auto_map={'AutoModel': 'x'}), 'auto_map'),
      ('llama-3-8b', dict(rope_interleaved=True), 'rope_interleaved'),
      ('llama-3-8b', dict(hidden_size='4096'), 'positive whole number'),
      ('llama-3-8b', dict(num_key_value_heads=5), 'cannot share'),
      ('llama-3-8b', dict(num_attention_heads=24), 'not a multiple'),
      ('llama-3-8b', dict(tie_word_embeddings='no'), 'true or false'),
      ('mistral-7b-v0.1', dict(layer_types=['full_attention']), 'layer_types'),
      (
          'qwen2.5-7b-instruct',
          dict(use_sliding_window=True, sliding_window=4096),
          'at least the 32768 positions',
      ),
  )
  def test_refusals(self, name, changes, words):
    with self.assertRaisesRegex(InputError, words):
      families.spec_from_hf(dict(REAL[name], **changes))

  def test_all_faults_at_once(self):
    config = dict(REAL['llama-3-8b'], logit_scale=0.5, hidden_act='tanh')
    del config['vocab_size'], config['hidden_size']
    with self.assertRaises(InputError) as caught:
      families.spec_from_hf(config)
    text = str(caught.exception)
    for name in ('logit_scale', 'hidden_act', 'vocab_size', 'hidden_size'):
      self.assertIn(name, text)
    self.assertLen(caught.exception.problems, 4)

  def test_empty_unknown_fields_pass(self):
    config = dict(REAL['llama-3-8b'], a=None, b=False, c=[], d='', pruned={})
    self.assertEqual(families.spec_from_hf(config), EXPECTED['llama-3-8b'])

  def test_unknown_family_lists_the_known(self):
    with self.assertRaisesRegex(InputError, 'gpt2, gpt_neox, gptj, llama'):
      families.spec_from_hf({'model_type': 'bloom'})
    with self.assertRaisesRegex(InputError, 'no model_type'):
      families.spec_from_hf({})

  def test_specs_are_hashable(self):
    for spec in EXPECTED.values():
      self.assertEqual(hash(spec), hash(dataclasses.replace(spec)))


if __name__ == '__main__':
  absltest.main()
