"""Picks, for every fused operation, the kernel or its reference.

A kernel is switched on only on the accelerators where it was measured to win;
elsewhere the reference runs. Today every operation runs its reference.
"""

from __future__ import annotations

from jaxedit.kernels.linear_logprob.reference import linear_logprob

__all__ = ['linear_logprob']
