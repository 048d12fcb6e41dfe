"""Fused operations: each has a reference in plain JAX and shared tests.

An operation is a folder: `reference.py` says in plain JAX what is computed,
`pallas_tpu.py` computes the same in one kernel, `api.py` checks the arguments
and calls the one that is named, `bench.py` times both on the shapes of real
runs. A model names none and so runs the reference: a kernel becomes the default
of a platform once its benchmark shows 1.2 times the speed there.

The folder stays at the top level of the repository and is installed as
`jaxedit.kernels` (`kernels` alone is a name that transformers looks for).
"""
