"""Profiles of the training step, attributed to the layer's parts."""
