"""Tasks: each a data source with a model and its loss, chosen by a config page.

``moejax/task_table.py`` has their names, their config fields and where each is built. A task is one
file here with ``build(config) -> (Task, Source)``.
"""
