"""Images and captions in one tower (LIMoE): pairs of digits and their names, model and loss."""
