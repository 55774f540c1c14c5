"""Backends: the method of ``loda_math`` over the modules of a deep-learning framework."""
