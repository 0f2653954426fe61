"""Flax NNX modules: a thin shell of parameters around pure functions."""
