"""Flax modules under test: what `gradtest.flax` is made of."""
