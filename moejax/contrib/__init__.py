"""Tasks and studies outside the core of the library, under the same contracts and tests."""
