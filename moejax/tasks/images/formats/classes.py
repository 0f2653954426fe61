"""Classes and their numbers from the labels of several files."""

from collections.abc import Sequence

import numpy as np
from jaxtyping import Int32

from moejax.errors import UserError
from moejax.tasks.images.formats.format import Labels


def number_labels(
    paths: Sequence[str], labels: Sequence[Labels]
) -> tuple[tuple[str, ...], list[Int32[np.ndarray, " N"]]]:
    """Names of the classes, and the class of every picture by file.

    Classes are those that the files name, in their order. Otherwise they are the labels that occur:
    numbers in the order of their values, words in alphabetical order.

    Raises:
      UserError: files with different names or kinds of labels; a label outside the classes.
    """
    first = labels[0].names
    for path, (_, names) in zip(paths, labels, strict=True):
        if names != first:
            raise UserError(
                f"data.path: {path!r} names {_some(names)}, and {paths[0]!r} {_some(first)}; write "
                "them with the same classes"
            )
    kinds = {type(value) for values, _ in labels for value in values}
    if first and str in kinds:
        raise UserError(
            f"data.path: the label of {_place(paths, labels, str)} is a word, but {paths[0]!r} "
            f"names {_some(first)}; write labels as numbers of these"
        )
    if len(kinds) > 1:
        raise UserError(
            f"data.path: labels are words at {_place(paths, labels, str)} and numbers at "
            f"{_place(paths, labels, int)}; write all of them as numbers or all as words"
        )
    for path, (values, _) in zip(paths, labels, strict=True):
        for row, value in enumerate(values, 1):
            if isinstance(value, int) and (value < 0 or first and value >= len(first)):
                classes = f"is not in [0, {len(first)}), {_some(first)}" if first else "is negative"
                raise UserError(
                    f"data.path: the label {value} of {path}:{row} {classes}; leave out pictures "
                    "without a class, or correct their labels"
                )
    if first:
        return first, [np.asarray(values, np.int32) for values, _ in labels]
    ordered = sorted({value for values, _ in labels for value in values})  # type: ignore[type-var]  # of one type
    index = {value: i for i, value in enumerate(ordered)}
    numbers = [np.array([index[v] for v in values], np.int32) for values, _ in labels]
    return tuple(str(value) for value in ordered), numbers


def check_classes(
    classes: Sequence[str], train_label_N: np.ndarray, heldout_label_N: np.ndarray, sides: list[str]
) -> None:
    """Raise UserError for a class on one side only. A class without pictures on both is kept."""
    train, heldout = set(train_label_N.tolist()), set(heldout_label_N.tolist())
    for label in sorted(train ^ heldout):
        side, missing = sides if label in train else sides[::-1]
        raise UserError(
            f"data.path: class {classes[label]!r} is in {side!r} but not in {missing!r}; both need "
            "it"
        )


def _some(names: tuple[str, ...]) -> str:
    if not names:
        return "no classes"
    more = ", .." if len(names) > 3 else ""
    return f"{len(names)} classes ({', '.join(names[:3])}{more})"


def _place(paths: Sequence[str], labels: Sequence[Labels], kind: type) -> str:
    return next(
        f"{path}:{row}"
        for path, (values, _) in zip(paths, labels, strict=True)
        for row, value in enumerate(values, 1)
        if isinstance(value, kind)
    )
