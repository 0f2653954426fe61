"""Images and their captions under one loss (LIMoE): data, model and task."""
