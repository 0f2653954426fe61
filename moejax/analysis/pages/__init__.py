"""The pages of the report, one a file: what was recorded in, a `Page` out."""
