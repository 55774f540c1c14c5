"""The continual-learning methods, all under one small interface."""

from training.methods.base import METHODS, Context, Method, MethodConfig, steps_a_batch

__all__ = ["METHODS", "Context", "Method", "MethodConfig", "steps_a_batch"]
