"""Several targets per row of a table (MMoE): data, model and task."""
