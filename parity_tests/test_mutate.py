"""What parity_tests/mutate.md says is read, and replaced in part, without a loss."""

from parity_tests.mutate import RESULT, Mutant, Result, mutants_of

OLD = Result(
    ["first run"],
    {"embed.metal": [0, 3, 1, 0, 2], "qmv.metal": [1, 5, 6, 0, 1]},
    [Mutant("embed.metal", 3, "a + b", "a - b"), Mutant("embed.metal", 5, "c", "0"), Mutant("qmv.metal", 2, "d", "1")],
)


def copy() -> Result:
    return Result.read(str(OLD))


def test_a_result_is_what_it_was_when_it_was_written() -> None:
    """And mutate.md, with the reasons that there are now: else `python -m parity_tests.mutate --unexplained`."""
    assert copy() == OLD
    written = RESULT.read_text()
    assert str(Result.read(written)) == written
    assert "| all | 19 | 1 | 8 | 7 | 0 | 3 | 83.3% |" in str(OLD)


def test_the_mutants_of_a_text_replace_its_row_and_survivors() -> None:
    new = copy()
    mutants = list(mutants_of("embed.metal", "y = a + b;\n"))
    new.replace([*mutants, Mutant("embed.metal", 1, "f", "g")], [("values", "case"), ("survived", "")], True)
    assert new.rows == {"embed.metal": [0, 0, 1, 0, 1], "qmv.metal": OLD.rows["qmv.metal"]}
    assert [str(m) for m in new.survivors] == ["embed.metal:1 `f` -> `g`", "qmv.metal:2 `d` -> `1`"]


def test_what_survived_and_is_caught_now_moves_to_another_column() -> None:
    new = copy()
    new.replace(OLD.survivors[:1], [("executor", "case")], False)
    assert new.rows == {"embed.metal": [0, 4, 1, 0, 1], "qmv.metal": OLD.rows["qmv.metal"]}
    assert new.survivors == OLD.survivors[1:]
