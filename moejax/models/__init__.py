"""Whole models built from moejax.layers."""
