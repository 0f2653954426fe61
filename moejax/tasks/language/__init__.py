"""Language modelling: text, decoder and task."""
