"""Log-probability of labels under a linear head, by a named implementation."""

from __future__ import annotations

import jax

from jaxedit.kernels.linear_logprob import reference
from jaxedit.types import InputError

IMPLEMENTATIONS = ('reference', 'pallas_tpu')


def linear_logprob(
    x: jax.Array,
    kernel: jax.Array,
    bias: jax.Array | None,
    labels: jax.Array,
    *,
    tied: bool = False,
    implementation: str = 'reference',
    interpret: bool = False,
) -> tuple[jax.Array, jax.Array]:
  """Scores labels under a linear head.

  Both implementations are differentiable in x; the reference also in the kernel
  and the bias, which the fused kernel takes as constants.

  Args:
    x: [R, D] normed hidden states, in the dtype of the kernel.
    kernel: [D, V].
    bias: [V] or None.
    labels: [R] int32 vocabulary ids.
    tied: the kernel is given as `embedding.T`. The fused kernel then reads the
      embedding in its own order; without it, it would be given a copy of the
      head in the other order. The reference needs no such hint.
    implementation: one of `IMPLEMENTATIONS`.
    interpret: run the Pallas kernel without a TPU, slowly.

  Returns:
    ([R] log-probability of the label in nats, f32 or wider; [R] int32 id of the
    most probable token).

  Raises:
    InputError: an unknown implementation, shapes that do not fit, or what the
      fused kernel refuses: see `pallas_tpu.linear_logprob`.
  """
  problems = []
  if implementation not in IMPLEMENTATIONS:
    problems.append(
        f'linear_logprob has no implementation {implementation!r}; it has'
        f' {", ".join(IMPLEMENTATIONS)}'
    )
  if x.ndim != 2 or kernel.ndim != 2 or x.shape[1] != kernel.shape[0]:
    problems.append(
        f'x is {list(x.shape)} and the kernel {list(kernel.shape)}; give [R, D]'
        ' and [D, V]'
    )
  if bias is not None and bias.shape != kernel.shape[1:]:
    problems.append(
        f'the bias is {list(bias.shape)}; give [V], {list(kernel.shape[1:])}'
    )
  if labels.shape != x.shape[:1]:
    problems.append(
        f'the labels are {list(labels.shape)}; give [R], {list(x.shape[:1])}'
    )
  if problems:
    raise InputError(*problems)
  if implementation == 'reference':
    return reference.linear_logprob(x, kernel, bias, labels)
  # Imported where it is used, so that nothing else needs Pallas.
  from jaxedit.kernels.linear_logprob import pallas_tpu

  return pallas_tpu.linear_logprob(
      x, kernel, bias, labels, tied=tied, interpret=interpret
  )
