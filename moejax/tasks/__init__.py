"""Tasks: a data source, a model and its loss, chosen by a config page.

A task is one folder, and one line in ``moejax/config/tasks.py``:

    fields.py  its config: a ``TaskEntry``
    source.py  its data: a ``Source``
    model.py   its model
    task.py    its loss: a ``Task``, and ``build(config) -> (Task, Source)``
"""
