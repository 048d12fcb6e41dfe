"""Causal tracing: where in a model, and at which token, a fact is stored."""
