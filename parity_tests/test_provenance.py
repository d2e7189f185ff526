"""A traced text has the contents of a plain `str` after any operations, and marks only what was marked before."""

import random
from collections.abc import Callable
from typing import Any

import pytest

from glm_mlx.provenance import Traced, concat, own, runs

# No character of one kind is, or becomes by a change of case, one of the other.
OWN, TYPED = "abAB \n", "xyXY\u2003\x0c"

# Each takes a text, two others and two integers.
Operation = Callable[[Any, Any, Any, int, int], Any]
KEEPING: dict[str, Operation] = {
    "add": lambda s, t, u, i, j: s + t,
    "add three": lambda s, t, u, i, j: t + s + u,
    "times": lambda s, t, u, i, j: s * (i % 4) + j % 3 * t,
    "slice": lambda s, t, u, i, j: s[i:j],
    "step": lambda s, t, u, i, j: s[i : j : i or -1],
    "index": lambda s, t, u, i, j: s[i % len(s)] + s[-1] if s else t,
    "iterate": lambda s, t, u, i, j: list(s) + list(reversed(s)),
    "strip": lambda s, t, u, i, j: [s.strip(), s.lstrip(), s.rstrip()],
    "strip characters": lambda s, t, u, i, j: [s.strip(t), s.lstrip(t), s.rstrip(t)],
    "prefix": lambda s, t, u, i, j: [s.removeprefix(t), (t + s).removeprefix(t), (s + t).removesuffix(t)],
    "split": lambda s, t, u, i, j: [*s.split(), *s.split(None, i), *s.rsplit(None, i), *s.rsplit(maxsplit=j)],
    "split at": lambda s, t, u, i, j: [*s.split(t, i), *s.rsplit(t, i), *s.split(sep=t[:1] or "a")] if t else s,
    "lines": lambda s, t, u, i, j: [*s.splitlines(), *s.splitlines(True), *s.splitlines(keepends=True)],
    "partition": lambda s, t, u, i, j: [*s.partition(t), *s.rpartition(t)] if t else s,
    "join": lambda s, t, u, i, j: s.join([t, u, s]) + s.join(u[:3]),
    "concat": lambda s, t, u, i, j: "".join([s, t, u]) if type(s) is type(t) is type(u) is str else concat((s, t, u)),
    "str": lambda s, t, u, i, j: [str(s), str(t)],
    "percent": lambda s, t, u, i, j: [(s + "%s%%%s") % (t, u), "%s" % s],  # noqa: UP031
}
LOSING: dict[str, Operation] = {
    "case": lambda s, t, u, i, j: [s.lower(), s.upper(), s.casefold(), s.title(), s.capitalize(), s.swapcase()],
    "replace": lambda s, t, u, i, j: [
        s.replace(t, u),
        s.replace(t, u, i),
        s.replace(s[:1], u),
        s.replace(s[2:4], t),
        s.replace(t, t),
    ],
    "percent": lambda s, t, u, i, j: [(s.replace("%", "") + "%5s%s") % (t, u), (t + "%(k)s") % {"k": s}],
    "format": lambda s, t, u, i, j: [(s + "{}{}").format(t, u), f"{s:>9}", f"{s}{t}"],
    "margins": lambda s, t, u, i, j: [s.center(i, "a"), s.ljust(9), s.zfill(9), s.expandtabs(), s.translate({97: "x"})],
}


def texts(value: Any) -> list[str]:
    return [value] if isinstance(value, str) else list(value)


def marked(text: str) -> str:
    return "".join("o" if is_own else "t" for is_own, piece in runs(text) for _ in piece)


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("operations", [KEEPING, KEEPING | LOSING], ids=["keeping", "all"])
def test_contents_are_those_of_str_and_no_mark_is_forged(seed: int, operations: dict[str, Operation]) -> None:
    """Random operations on marked and unmarked texts, each beside the same on plain texts.

    Operations that keep the record lose no mark either.
    """
    rng = random.Random(seed)
    keeps = operations is KEEPING

    def new() -> tuple[str, str]:
        text = "".join(rng.choices(rng.choice((OWN, TYPED)), k=rng.randrange(7)))
        return (own(text) if set(text) <= set(OWN) else text), text

    pool = [new() for _ in range(20)]
    for _ in range(4000):
        name, operation = rng.choice(list(operations.items()))
        (s, p), (t, q), (u, r) = rng.choice(pool), rng.choice(pool), rng.choice(pool)
        i, j = rng.randrange(-6, 7), rng.randrange(-6, 7)
        if keeps and type(s) is str and "add" not in name:
            s = Traced(s)  # a plain text would lose the marks of what it joins
        try:
            expected = texts(operation(p, q, r, i, j))
        except Exception as error:
            with pytest.raises(type(error)):
                operation(s, t, u, i, j)
            continue
        found = texts(operation(s, t, u, i, j))
        assert found == expected
        assert [(len(x), hash(x), repr(x)) for x in found] == [(len(x), hash(x), repr(x)) for x in expected]
        for traced, plain in zip(found, expected, strict=True):
            for char, mark in zip(plain, marked(traced), strict=True):
                assert mark == "t" or char in OWN, (plain, marked(traced))
                assert mark == "o" or char in TYPED + "%" or not keeps, (plain, marked(traced))
        index = rng.randrange(len(found)) if found else 0
        if found and len(expected[index]) < 40 and "%" not in expected[index]:
            pool[rng.randrange(len(pool))] = found[index], expected[index]
        else:
            pool[rng.randrange(len(pool))] = new()


def test_what_replaces_typed_text_counts_as_typed() -> None:
    mixed = own("a-b") + "-c-" + own("-")
    assert marked(mixed.replace("-", own("++"))) == "ooootttttoo"
    assert marked(own("a-b").replace("-", "typed")) == "ottttto"
    assert marked((own("a") + "-").replace("a-", own("+"))) == "t"
    assert marked("a-b".replace("-", own("+"))) == "ttt"
    assert marked(own("ab").replace("", own("+"))) == "ttttt"


def test_a_change_of_case_keeps_the_record_of_a_text_that_is_all_marked() -> None:
    assert marked(own("<|USER|>").lower()) == "oooooooo"
    assert marked((own("<|US") + "ER|>").lower()) == "tttttttt"


def test_a_template_reaches_no_attribute_that_str_does_not_have() -> None:
    """The sandbox keeps all others away by their underscore."""
    assert all(name.startswith("_") for name in set(dir(Traced)) - set(dir(str)))


def test_a_record_of_another_length_is_refused() -> None:
    with pytest.raises(ValueError, match="a record of 1 for 2"):
        Traced("ab", b"\1")
