"""Times the Gram matrix of masked rows on the shapes of real runs.

  python -m jaxedit.kernels.gram.bench

F is the key width of the models that are edited, N the tokens of one batch.
'cast' is the reference on keys cast to f32 first, with products in full f32.
The operations counted are those of one triangle. A tenth of the rows is masked.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator

import jax
import jax.numpy as jnp

from jaxedit.kernels import timing
from jaxedit.kernels.gram import pallas_gpu, reference

# Model -> key width of mlp/down.
LENGTHS = {
    'SmolLM2-135M': 1536,
    'Llama-3-8B': 14336,
    'GPT-J-6B': 16384,
    'Qwen2.5-7B': 18944,
}
COUNTS = (512, 4096, 16384)
_SHORT = {'bfloat16': 'bf16', 'float32': 'f32'}


def cases(
    dtypes: list[str], tiles: pallas_gpu.Tiles | None, interpret: bool
) -> Iterator[timing.Case]:
  """Makes the shapes, one at a time.

  Args:
    dtypes: names of the dtypes of keys.
    tiles: of the kernel, None for its own choice.
    interpret: small shapes.
  """
  widths = {'small': 200} if interpret else LENGTHS
  functions = {
      'reference': reference.gram,
      'cast': lambda keys, mask: reference.gram(keys.astype(jnp.float32), mask),
      'pallas_gpu': functools.partial(
          pallas_gpu.gram, tiles=tiles, interpret=interpret
      ),
  }
  for name, size in widths.items():
    for count in (96,) if interpret else COUNTS:
      for dtype in dtypes:
        keys = jax.random.normal(jax.random.key(0), (count, size), dtype)
        mask = jnp.arange(count) % 10 > 0
        yield timing.Case(
            f'{name} F={size} N={count} {_SHORT.get(dtype, dtype)}',
            'forward',
            (keys, mask),
            functions,
            count * size * (size + 1.0),
        )


def main() -> None:
  options = timing.parser(__doc__)
  arguments = options.parse_args()
  tiles = None
  if arguments.tiles:
    tiles = pallas_gpu.Tiles(*map(int, arguments.tiles.split(',')))
  dtypes = arguments.dtypes.split(',')
  timing.run(options, arguments, cases(dtypes, tiles, arguments.interpret))


if __name__ == '__main__':
  main()
