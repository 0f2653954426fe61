"""FLOPs, memory and parameters of a run, counted before it starts."""
