"""Models in other people's formats: names, GGUF files, Flax trees."""

from jaxedit.convert.gguf import convert_gguf
from jaxedit.convert.hub import resolve
from jaxedit.convert.interop import (
    TUNIX_LLAMA,
    from_hf_flax,
    from_nested,
    load_hf_flax_msgpack,
    to_hf_flax,
    to_nested,
)

__all__ = [
    'TUNIX_LLAMA',
    'convert_gguf',
    'from_hf_flax',
    'from_nested',
    'load_hf_flax_msgpack',
    'resolve',
    'to_hf_flax',
    'to_nested',
]
