"""Fused operations: each has a reference in plain JAX and shared tests.

The folder stays at the top level of the repository and is installed as
`jaxedit.kernels` (`kernels` alone is a name that transformers looks for).
"""
