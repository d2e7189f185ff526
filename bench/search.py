"""Which launch shape of an op is the fastest, alone: the search that bench/tune.py makes for each case.

One parameter of a launch at a time, beginning with what is in use, until no other value is faster.
"""

import importlib
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from typing import TypeAlias

import mlx.core as mx

from bench import op_cases
from bench.op_cases import Case, Contestant
from bench.op_timing import Link, Row, compile_first, measure
from bench.paired import LEAST_PAIRS, Effect, judge
from kernels import launcher, shapes
from kernels.check import difference
from kernels.launcher import Launch

# What an op is asked to try, by the name of its constant: such values as the text of every kernel allows.
VALUES = {
    "ROWS": (1, 2, 4, 8),
    "SIMDGROUPS": (1, 2, 4, 8),
    "MAX_SIMDGROUPS": (1, 2, 4, 8),
    "DEPTH": (1, 2, 3, 4, 6, 8),
    "HEADS_AT_ONCE": (1, 2, 4, 8),
    "ROWS_AT_ONCE": (1, 2, 4, 8),
    "ROWS_OF_SPLIT": (16, 32, 64, 128, 256),
    "MAX_SPLITS": (16, 32, 64, 128),
    "MATRIX_HEADS": (8, 16, 24),
    "MATRIX_THREADGROUPS": (66, 132, 198, 264),
    "MATRIX_AHEAD": (1, 2),
    "MERGE_ROWS": (1, 2, 4, 8),
    "MERGE_SIMDGROUPS": (1, 2, 4, 8),
}
MOST_THREADS = 256  # of a threadgroup: with more, Apple's compiler may leave a thread too few registers
PASSES = 3  # over the parameters of a launch, at most
# Of each launch that a call makes, by (op, what it works on): its parameters.
Shape: TypeAlias = Mapping[tuple[str, str], Mapping[str, int]]


@dataclass
class Found:
    """What the search of a case came to. seconds: every measurement, in order, by the shape that it is of."""

    case: str
    quant: str
    start: Shape
    best: Shape
    effect: Effect | None = None  # of the best against the start, measured once more
    tried: int = 0
    refused: dict[str, str] = field(default_factory=dict)
    wrong: dict[str, str] = field(default_factory=dict)
    seconds: list[dict[str, list[float]]] = field(default_factory=list)

    @property
    def is_candidate(self) -> bool:
        return self.effect is not None and self.effect.verdict == "faster"


class Search:
    """Of the shape of one case's launches."""

    def __init__(self, case: Case, link: Link, rounds: int, smallest: float):
        self.case, self.link, self.rounds, self.smallest = case, link, rounds, smallest
        self.kernel = case.contestants["kernel"]
        self.prepared: Shape | None = None  # what the launches that the ops keep are for
        clear_launches()
        with launcher.recording(), shapes.asking() as asked:
            self.kernel.run(case.x, 0)
        start = {(a.op, a.what): dict(a.values) for a in asked}
        self.found = Found(case.what, case.quant, start, start)
        self.judged: dict[str, str | None] = {}
        self.expected: list[list[mx.array]] = []

    def run(self) -> Found:
        found = self.found
        for _ in range(PASSES):
            before = found.best
            for key, parameters in found.start.items():
                for name in parameters:
                    self._vary(key, name)
            if found.best == before:
                break
        if found.best != found.start:
            # The best of many is partly luck, so it is measured once more.
            found.effect = self._effects([found.best], found.start).get(label(found.best))
        clear_launches()
        return found

    def _vary(self, key: tuple[str, str], name: str) -> None:
        """Take the value of one parameter that is surely faster than the present one, if there is one."""
        best = self.found.best
        seen = {self._signature(best)}
        others = []
        for value in VALUES.get(name, ()):
            shape = {**best, key: {**best[key], name: value}}
            if self._problem(shape) is None and (signature := self._signature(shape)) not in seen:
                seen.add(signature)
                others.append(shape)
        if not others:
            return
        effects = self._effects(others, best)
        faster = [s for s in others if label(s) in effects and effects[label(s)].verdict == "faster"]
        if faster:
            self.found.best = min(faster, key=lambda shape: effects[label(shape)].change)

    def _effects(self, others: Sequence[Shape], base: Shape) -> dict[str, Effect]:
        """Of each against the base, measured in turns."""
        named = {label(shape): shape for shape in (base, *others)}
        ways = {name: Contestant(self._way(shape), self.kernel.nbytes) for name, shape in named.items()}
        rows: list[Row] = []
        measure(replace(self.case, contestants=ways), self.link, self.rounds, rows)
        samples = {row.by: row.gpu or row.chain for row in rows if row.problem is None}
        self.found.seconds.append(samples)
        first = samples.get(label(base), [])
        effects = {}
        for name, values in samples.items():
            usable = len(first) == len(values) >= LEAST_PAIRS and min(*first, *values) > 0
            if name != label(base) and usable:
                effects[name] = judge([b / a for a, b in zip(first, values, strict=True)], self.smallest)
        return effects

    def _problem(self, shape: Shape) -> str | None:
        """Why a shape can't be used: never launched where it is refused, never timed where it is wrong."""
        name = label(shape)
        if name not in self.judged:
            self.found.tried += 1
            refused = self._refusal(shape)
            wrong = None if refused else self._fault(shape)
            if refused:
                self.found.refused[name] = refused
            if wrong:
                self.found.wrong[name] = wrong
            self.judged[name] = refused or wrong
        return self.judged[name]

    def _refusal(self, shape: Shape) -> str | None:
        try:
            launches = self._launches(shape)
        except launcher.KernelRefusedError as error:
            return str(error)
        return too_many_threads(launches)

    def _fault(self, shape: Shape) -> str | None:
        """What is wrong with its result, in words."""
        sets = range(min(2, self.case.sets))
        if not self.expected:
            exact = self.case.x.astype(mx.float32)
            self.expected = [list(self.case.contestants["twin"].run(exact, i)) for i in sets]
            mx.eval(self.expected)
        run = self._way(shape)
        compile_first(partial(run, self.case.x, 0))
        return next(filter(None, (fault(partial(run, self.case.x, i), self.expected[i]) for i in sets)), None)

    def _signature(self, shape: Shape) -> str:
        """Equal for shapes that come to the same launches."""
        launches = self._launches(shape)
        return repr([(launch.template, launch.defines, launch.grid, launch.threadgroup) for launch in launches])

    def _launches(self, shape: Shape) -> list[Launch]:
        with self._using(shape), launcher.recording() as seen:
            self.kernel.run(self.case.x, 0)
        return [launch for launch, _ in seen]

    def _way(self, shape: Shape) -> op_cases.Run:
        def run(x: mx.array, i: int) -> Sequence[mx.array]:
            with self._using(shape):
                return self.kernel.run(x, i)

        return run

    @contextmanager
    def _using(self, shape: Shape) -> Iterator[None]:
        if shape != self.prepared:
            clear_launches()
            self.prepared = shape
        with shapes.trying(shape):
            yield


def clear_launches() -> None:
    """The ops forget the launches that they have prepared."""
    for op in launcher.OPS:
        module = importlib.import_module(f"kernels.{op}")
        for value in vars(module).values():
            if hasattr(value, "cache_clear") and value.__module__ == module.__name__:
                value.cache_clear()


def label(shape: Shape) -> str:
    return "; ".join(", ".join(f"{name} {value}" for name, value in values.items()) for values in shape.values())


def too_many_threads(launches: Sequence[Launch]) -> str | None:
    """Why they are refused, if they are."""
    threads = max(math.prod(launch.threadgroup) for launch in launches)
    return f"{threads} threads in a threadgroup, over {MOST_THREADS}" if threads > MOST_THREADS else None


def fault(run: Callable[[], Sequence[mx.array]], expected: Sequence[mx.array]) -> str | None:
    """What is wrong with a result, in words: it is not the twin's, or not the same twice."""
    try:
        got, again = list(run()), list(run())
        mx.eval(got, again)
        if found := difference(got, expected):
            return found
        if any(not mx.array_equal(a, b, equal_nan=True) for a, b in zip(got, again, strict=True)):
            return "two runs give different results"
    except (RuntimeError, ValueError) as error:
        return "fails: " + " ".join(str(error).split())[:200]
    return None
