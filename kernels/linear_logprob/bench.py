"""Times the log-probability of labels on the shapes of real runs.

  python -m jaxedit.kernels.linear_logprob.bench

R is the scored positions of one step: 8 for a single edit, 1500 for a full
batch. The head of SmolLM2 is tied. The operations counted are one product with
the head forward, two forward and backward.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxedit.kernels import timing
from jaxedit.kernels.linear_logprob import pallas_tpu, reference


class Head(NamedTuple):
  """A model's head.

  Attributes:
    width: D.
    vocabulary: V.
    bias: whether it has one.
    tied: whether it is the transpose of the embedding.
  """

  width: int
  vocabulary: int
  bias: bool = False
  tied: bool = False


HEADS = {
    'SmolLM2-135M': Head(576, 49152, tied=True),
    'GPT-J-6B': Head(4096, 50400, bias=True),
    'Llama-3-8B': Head(4096, 128256),
    'Qwen2.5-7B': Head(3584, 152064),
}
COUNTS = (8, 64, 512, 1500)
_SMALL = {
    'small tied': Head(48, 600, tied=True),
    'small': Head(48, 700, bias=True),
}
_SHORT = {'bfloat16': 'bf16', 'float32': 'f32'}

Function = Callable[..., Any]


def _forward(op: Function, tied: bool) -> Function:
  return lambda x, head, bias, labels: op(
      x, head.T if tied else head, bias, labels
  )


def _backward(op: Function, tied: bool) -> Function:
  forward = _forward(op, tied)

  def loss(x, head, bias, labels):
    logprob, best = forward(x, head, bias, labels)
    return -jnp.sum(logprob), (logprob, best)

  return jax.value_and_grad(loss, has_aux=True)


def cases(
    dtypes: list[str], tiles: pallas_tpu.Tiles | None, interpret: bool
) -> Iterator[timing.Case]:
  """Makes the shapes, one at a time.

  Args:
    dtypes: names of the dtypes of the operands.
    tiles: of the kernel, None for its own choice.
    interpret: small shapes.
  """
  for name, shape in (_SMALL if interpret else HEADS).items():
    for dtype in dtypes:
      head, bias = _weights(shape, dtype)
      for count in (8,) if interpret else COUNTS:
        keys = jax.random.split(jax.random.key(1), 2)
        x = jax.random.normal(keys[0], (count, shape.width), dtype)
        labels = jax.random.randint(keys[1], (count,), 0, shape.vocabulary)
        kernel = functools.partial(
            pallas_tpu.linear_logprob,
            tied=shape.tied,
            tiles=tiles,
            interpret=interpret,
        )
        flops = 2.0 * count * shape.width * shape.vocabulary
        for what, make, products in (
            ('forward', _forward, 1),
            ('forward+backward', _backward, 2),
        ):
          yield timing.Case(
              f'{name} V={shape.vocabulary} R={count}'
              f' {_SHORT.get(dtype, dtype)}',
              what,
              (x, head, bias, labels),
              {
                  'reference': make(reference.linear_logprob, shape.tied),
                  'pallas_tpu': make(kernel, shape.tied),
              },
              flops * products,
          )


def _weights(shape: Head, dtype: str) -> tuple[jax.Array, jax.Array | None]:
  """Draws a head that gives logits of unit scale."""
  size = (shape.width, shape.vocabulary)
  size = size[::-1] if shape.tied else size
  head = jax.random.normal(jax.random.key(0), size, dtype)
  head = head / jnp.asarray(shape.width**0.5, dtype)
  if not shape.bias:
    return head, None
  return head, jax.random.normal(jax.random.key(2), (shape.vocabulary,), dtype)


def main() -> None:
  options = timing.parser(__doc__)
  arguments = options.parse_args()
  tiles = None
  if arguments.tiles:
    tiles = pallas_tpu.Tiles(*map(int, arguments.tiles.split(',')))
  dtypes = arguments.dtypes.split(',')
  timing.run(options, arguments, cases(dtypes, tiles, arguments.interpret))


if __name__ == '__main__':
  main()
