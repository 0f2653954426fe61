"""A run's folder: its contents, its record in config.json, its lock and its summary."""
