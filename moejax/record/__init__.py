"""The files of a run: routing, arrays of the probe, and writing by rename."""
