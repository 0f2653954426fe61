"""A run's folder: its files, its lock and its summary."""
