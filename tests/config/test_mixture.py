"""``data.mixture``: names, paths and weights of a literal, and what is refused."""

from fractions import Fraction

import pytest

from moejax.config import apply_overrides, default, validate
from moejax.config.mixture import EXAMPLE, Part, parts_of
from moejax.errors import UserError


def test_weights_are_the_decimal_numbers_that_are_written_divided_by_their_sum():
    assert parts_of("{'a': ('x', 0.7), 'b': ('y/*.gz, z', 0.2), 'c': ['w', 1e-1]}") == (
        Part("a", "x", Fraction(7, 10)),
        Part("b", "y/*.gz, z", Fraction(2, 10)),
        Part("c", "w", Fraction(1, 10)),
    )
    assert parts_of("{'a': ('x', 7), 'b': ('y', 3)}") == parts_of(
        "{'a': ('x', 0.7), 'b': ('y', 0.3)}"
    )
    sevenths = parts_of("{'a': ('x', 3), 'b': ('y', 4)}")
    assert [part.share for part in sevenths] == [Fraction(3, 7), Fraction(4, 7)]
    assert [part.name for part in parts_of(EXAMPLE)] == ["web", "code"]


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("web", "is not a dictionary"),
        ("{", "is not a Python literal"),
        ("{}", "is not a dictionary"),
        ("[('a', 'x', 1)]", "is not a dictionary"),
        ("{**a}", "is not a dictionary"),
        ("{'a': x}", "holds x, which is not a literal"),
        ("{'a': ('x', open('y'))}", "holds ('x', open('y')), which is not a literal"),
        ("{'a': 'x'}", "has 'x' for 'a'"),
        ("{'a': ('x', 1, 2)}", "has ('x', 1, 2) for 'a'"),
        ("{'a': ('', 1)}", "has '' as the path of 'a'"),
        ("{'a': (3, 1)}", "has 3 as the path of 'a'"),
        ("{'a': ('x', 0)}", "gives 'a' the weight 0;"),
        ("{'a': ('x', -0.5)}", "gives 'a' the weight -0.5;"),
        ("{'a': ('x', 1e999)}", "gives 'a' the weight inf;"),
        ("{'a': ('x', 1e999 - 1e999)}", "which is not a literal"),
        ("{'a': ('x', True)}", "gives 'a' the weight True;"),
        ("{'a': ('x', '1')}", "gives 'a' the weight '1';"),
        ("{'a': ('x', 1), 'a': ('y', 1)}", "names two sources 'a'"),
        ("{'a b': ('x', 1)}", "names a source 'a b'"),
        ("{'a/b': ('x', 1)}", "names a source 'a/b'"),
        ("{'1': ('x', 1)}", "names a source '1'"),
        ("{1: ('x', 1)}", "names a source 1"),
        ("{" + ", ".join(f"'s{i}': ('x', 1)" for i in range(257)) + "}", "names 257 sources"),
    ],
)
def test_what_is_no_mixture_is_refused_in_one_line_with_field_value_and_remedy(text, problem):
    with pytest.raises(UserError) as caught:
        parts_of(text)
    message = str(caught.value)
    assert message.startswith(f"data.mixture={text!r} ") and problem in message
    assert "\n" not in message and "; " in message


def configured(**fields):
    config = default()
    given = {"data.mixture": "{'a': ('.', 1), 'b': ('..', 1)}", **fields}
    apply_overrides(config, [f"--config.{name}={value}" for name, value in given.items()])
    return config


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("data.path", "."),
        ("data.eval_path", "."),
        ("data.stream", "True"),
        ("moe.replay", __file__),
        ("train.eval_rows", "1"),
    ],
)
def test_fields_that_do_not_go_with_a_mixture_are_refused_by_name(field, value):
    validate(configured())
    with pytest.raises(UserError, match=f"^{field}=.*; .*data.mixture|^{field}=.*data.mixture.*; "):
        validate(configured(**{field: value}))


def test_a_config_page_may_set_a_dictionary():
    config = default()
    config.data.mixture = {"web": (".", 0.7), "code": ("./*.py", 0.3)}
    assert isinstance(config.data.mixture, str)
    given = parts_of("{'web': ('.', 0.7), 'code': ('./*.py', 0.3)}")
    assert parts_of(config.data.mixture) == given
    validate(config)


@pytest.mark.parametrize(
    ("path", "problem"),
    [("absent", "'absent' does not exist"), ("hf://c4", "a data set of the hub")],
)
def test_paths_that_a_mixture_cannot_read_are_refused_before_anything_is_read(path, problem):
    with pytest.raises(UserError, match=f"^data.mixture=.*: .*{problem}"):
        validate(configured(**{"data.mixture": {"a": (".", 1), "b": (path, 1)}}))
