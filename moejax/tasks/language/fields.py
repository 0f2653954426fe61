"""Config of language modelling: the common fields, and none of its own."""

from moejax.config.tasks import OF_MODALITIES, TaskEntry

TASK = TaskEntry("moejax.tasks.language.task:build", without=OF_MODALITIES)
