"""Optax's transformations under test: updates, masks, skipped steps, accumulation.

Nothing outside of this package and `gradtest.optax` imports optax.
"""
