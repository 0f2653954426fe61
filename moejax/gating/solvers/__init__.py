"""Assignment solvers that gates share."""
