"""Image classification: data, model (a vision transformer) and task."""
