"""Head, log-softmax and gather, as plain JAX writes them.

  logits = x @ W (+ b)
  logprob = logits[label] - logsumexp(logits)

The [R, V] logits exist in memory; a fused kernel would not need them. Axes: R
scored positions, D width, V vocabulary.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp


def linear_logprob(
    x: jax.Array, kernel: jax.Array, bias: jax.Array | None, labels: jax.Array
) -> tuple[jax.Array, jax.Array]:
  """Scores labels under a linear head.

  Args:
    x: [R, D] normed hidden states, in the dtype of the kernel.
    kernel: [D, V].
    bias: [V] or None.
    labels: [R] int32 vocabulary ids.

  Returns:
    ([R] log-probability of the label in nats, f32 or wider; [R] int32 id of the
    most probable token).
  """
  wide = jnp.promote_types(x.dtype, jnp.float32)
  precision = 'highest' if kernel.dtype == wide else 'default'
  logits = jnp.matmul(
      x, kernel, precision=precision, preferred_element_type=wide
  )
  if bias is not None:
    logits = logits + bias.astype(wide)
  picked = jnp.take_along_axis(logits, labels[:, None], axis=-1)[:, 0]
  logprob = picked - jax.nn.logsumexp(logits, axis=-1)
  return logprob, jnp.argmax(logits, axis=-1).astype(jnp.int32)
