"""Strings that know what a template wrote: they compute what plain ones do, and take no typed text for its own."""

import random
from collections.abc import Callable
from typing import Any

import pytest

from glm_mlx.template_text import TemplateText, joined, own, plain, runs

# What the template writes and what is typed have no character in common, so that a record can be read off a result.
OWN, TYPED = "<|a \nB", "{;x\tY\r"
Operation = Callable[[Any, random.Random], Any]


def text_of(rng: random.Random, letters: str, most: int = 6) -> str:
    return "".join(rng.choice(letters) for _ in range(rng.randrange(most)))


def mixed(rng: random.Random) -> tuple[str, str]:
    """The same text with a record and plain."""
    parts = [(rng.random() < 0.5) for _ in range(rng.randrange(1, 6))]
    texts = [text_of(rng, OWN if is_own else TYPED) for is_own in parts]
    return joined(own(t) if is_own else t for t, is_own in zip(texts, parts, strict=True)), "".join(texts)


def piece(text: str, rng: random.Random) -> str:
    start = rng.randrange(len(text) + 1)
    return plain(text)[start : start + rng.randrange(3)]


OPERATIONS: dict[str, Operation] = {
    "typed + ": lambda s, rng: text_of(rng, TYPED) + s,
    "+ typed": lambda s, rng: s + text_of(rng, TYPED),
    "times": lambda s, rng: s * rng.randrange(-1, 3),
    "times from the left": lambda s, rng: rng.randrange(3) * s,
    "slice": lambda s, rng: s[rng.randrange(-4, 5) : rng.randrange(-4, 9) : rng.choice((None, 1, 2, -1))],
    "character": lambda s, rng: s[rng.randrange(-len(s), len(s))] if s else s,
    "strip": lambda s, rng: s.strip(rng.choice((None, "<", "x;", ""))),
    "lstrip": lambda s, rng: s.lstrip(rng.choice((None, "<", "x;"))),
    "rstrip": lambda s, rng: s.rstrip(rng.choice((None, "a", "x;"))),
    "removeprefix": lambda s, rng: s.removeprefix(piece(s, rng)),
    "removesuffix": lambda s, rng: s.removesuffix(piece(s, rng)),
    "split": lambda s, rng: s.split(piece(s, rng) or None, rng.randrange(-1, 3)),
    "rsplit": lambda s, rng: s.rsplit(piece(s, rng) or None, rng.randrange(-1, 3)),
    "splitlines": lambda s, rng: s.splitlines(rng.random() < 0.5),
    "partition": lambda s, rng: s.partition(piece(s, rng) or "?"),
    "rpartition": lambda s, rng: s.rpartition(piece(s, rng) or "?"),
    "replace": lambda s, rng: s.replace(piece(s, rng), text_of(rng, TYPED, 3), rng.randrange(-1, 3)),
    "join": lambda s, rng: s.join([text_of(rng, TYPED) for _ in range(3)]),
    "lower": lambda s, rng: s.lower(),
    "upper": lambda s, rng: s.upper(),
    "title": lambda s, rng: s.title(),
    "capitalize": lambda s, rng: s.capitalize(),
    "casefold": lambda s, rng: s.casefold(),
    "format": lambda s, rng: f"{s}{text_of(rng, TYPED)}",
    "percent": lambda s, rng: s % (),
    "centre": lambda s, rng: s.center(9),
}
OWN_AT_ALL = set(OWN) | set(OWN.upper()) | set(OWN.lower())


def holds(found: Any, wanted: Any) -> None:
    if isinstance(wanted, list | tuple):
        assert type(found) is type(wanted)
        assert len(found) == len(wanted)
        for pair in zip(found, wanted, strict=True):
            holds(*pair)
        return
    assert plain(found) == wanted
    assert "".join(text for _, text in runs(found)) == wanted
    for is_own, text in runs(found):
        if is_own:
            assert set(text) <= OWN_AT_ALL, (found, text)


@pytest.mark.parametrize("name", OPERATIONS)
def test_an_operation_gives_what_it_gives_of_a_plain_string_and_marks_nothing_typed(name: str) -> None:
    for seed in range(300):
        text, bare = mixed(random.Random(seed))
        found, wanted = (OPERATIONS[name](s, random.Random(seed)) for s in (text, bare))
        holds(found, wanted)


def test_a_record_is_not_lost_where_templates_need_it() -> None:
    tag = own("<|user|>")
    for text in (str(tag), "" + tag, tag + "", " " + tag, own(" <|user|> ").strip(), own("a<|user|>b")[1:-1]):
        assert (True, "<|user|>") in list(runs(text))
    assert list(runs(own("<|") + own("user") + own("|>"))) == [(True, "<|user|>")]
    assert list(runs(joined(["x", tag, "y"], own(",")))) == [
        (False, "x"), (True, ",<|user|>,"), (False, "y"),
    ]  # fmt: skip
    assert list(runs(own("a.<|user|>.b").split(".")[1])) == [(True, "<|user|>")]
    assert list(runs(own("<|X|>").replace("X", own("user")))) == [(True, "<|user|>")]
    assert list(runs(own("<|USER|>").lower())) == [(True, "<|user|>")]


def test_of_an_object_nothing_is_the_templates_own() -> None:
    """Jinja's sandbox makes a string of the class of the one that `format` is called on."""
    assert list(runs(TemplateText(own("<|user|>")))) == [(False, "<|user|>")]
    assert list(runs(TemplateText(5))) == [(False, "5")]


def test_between_equal_separators_a_piece_is_taken_where_it_stands() -> None:
    """`b` is in the separator, too."""
    parts = (own("1ab") + "b" + own("ab2")).split("ab")
    assert [list(runs(part)) for part in parts] == [[(True, "1")], [(False, "b")], [(True, "2")]]
