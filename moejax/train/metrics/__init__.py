"""Metric rows: how they are computed, logged, mirrored and printed."""
