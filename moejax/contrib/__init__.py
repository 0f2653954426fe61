"""Tasks and studies beyond the library's core, under the same contracts and tests."""
