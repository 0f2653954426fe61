"""Tasks: each a data source with a model and its loss, chosen by a config page.

``moejax/config/tasks.py`` has their names, their config fields and where each is built. A task is
one folder with ``build(config) -> (Task, Source)`` in its ``task.py``.
"""
