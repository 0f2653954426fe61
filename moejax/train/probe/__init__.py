"""Forward passes on fixed held-out sequences that record routing and representations."""
