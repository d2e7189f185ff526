"""Which launch shapes are the fastest within the model: the search of `bench/tune.py --within`, on NVIDIA.

Alone a kernel finds its own code in the caches. In a token all the others run between two launches of it, and what is
the fastest alone often is not there (bench/LOG.md). So whole tokens are decoded, and the GPU tells how long each launch
took. A step of the search tries every other value of each parameter, of all kernels at the same time, and takes for
each kernel the one that is best, until none is better, or six times. What was found meets what was in use once more,
in turns.
"""

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TypeAlias

import mlx.core as mx

from bench import gpu_time, search, synthetic
from bench.paired import Effect, judge
from bench.search import Found, Shape, clear_launches, fault, label, too_many_threads
from glm_mlx.errors import InputError
from glm_mlx.model import Model
from glm_mlx.model_cases import decode_cases
from kernels import launcher, shapes
from kernels.cases import Case
from kernels.compiled import compile_ahead
from kernels.launcher import Recorded

WARM_UP, TOKENS = 3, 16  # of a sample
STEPS = 6  # of the search, at most
NAME = re.compile(rf"({'|'.join((*launcher.OPS, 'mla_merge', 'mla_matrix'))})_[0-9a-f]{{12}}")

Step: TypeAlias = Callable[[mx.array, mx.array, list[mx.array]], tuple[mx.array, list[mx.array]]]  # `Model.step`
Key: TypeAlias = tuple[str, str]  # what a table has an entry for: op, and what it works on
TOKEN: Key = ("token", "")  # all that the GPU does


@dataclass
class Part:
    """The launches of one key. cases: one call of each kind. judged: of values, by their label, what is wrong."""

    found: Found
    cases: list[Case] = field(default_factory=list)
    expected: list[list[mx.array]] = field(default_factory=list)
    judged: dict[str, str | None] = field(default_factory=dict)


class Within:
    """The search in one context of a model."""

    def __init__(self, model: Model, depth: int, ops: Sequence[str], smallest: float):
        self.model, self.depth, self.smallest = model, depth, smallest
        cache = model.new_cache()
        synthetic.fill_cache(cache, depth)
        self.rows = cache.reserve(WARM_UP + TOKENS)
        mx.eval(self.rows)
        self.cases = decode_cases(model, (self.rows[0].shape[1],))
        self.in_use: dict[Key, Mapping[str, int]] = {}
        self.parts: dict[Key, Part] = {}
        for case in self.cases:
            clear_launches()
            with launcher.recording(), shapes.asking() as asked:
                case.run()
            for one in asked:
                key, values = (one.op, one.what), dict(one.values)
                self.in_use[key] = values
                if one.op in ops:
                    new = Part(Found(f"{one.op}: {one.what}", "", {key: values}, {key: values}))
                    self.parts.setdefault(key, new).cases.append(case)

    @property
    def best(self) -> dict[Key, Mapping[str, int]]:
        return {key: part.found.best[key] for key, part in self.parts.items()}

    @property
    def found(self) -> list[Found]:
        return [part.found for part in self.parts.values()]

    def run(self, pairs: int) -> Effect | None:
        """Search. What all that won together makes of the GPU's time for a token; None where nothing did."""
        try:
            self._seconds(self.best)  # the first trace of a process shows shorter launches than all others
            for _ in range(STEPS):
                if not self._step(self._moves()):
                    break
            return self._verdict(pairs)
        finally:
            clear_launches()

    def _verdict(self, pairs: int) -> Effect | None:
        """What does not win once more goes back to what was in use, and the rest is measured without it."""
        start = {key: part.found.start[key] for key, part in self.parts.items()}
        while moved := [part.found for part in self.parts.values() if part.found.best != part.found.start]:
            effects = self._effects(start, pairs)
            for found in moved:
                found.effect = effects[next(iter(found.start))]
            lost = [found for found in moved if not found.is_candidate]
            if not lost:
                return effects[TOKEN]
            for found in lost:
                found.best = found.start
        return None

    def _moves(self) -> dict[Key, list[Mapping[str, int]]]:
        """Of each key the present values with another one for one of them: of such as can be used."""
        candidates = {key: self._candidates(key) for key in self.parts}
        compile_ahead(one for of_key in candidates.values() for _, recorded in of_key for one in recorded)
        return {
            key: [values for values, _ in of_key if self._fault(key, values) is None]
            for key, of_key in candidates.items()
        }

    def _candidates(self, key: Key) -> list[tuple[Mapping[str, int], list[Recorded]]]:
        """What no device would refuse and comes to other launches; and these."""
        best, found = self.best[key], list[tuple[Mapping[str, int], list[Recorded]]]()
        seen = {_signature(self._launches(key, best))}
        for name in best:
            for values in ({**best, name: value} for value in search.VALUES.get(name, ())):
                try:
                    recorded = self._launches(key, values)
                    refused = too_many_threads([launch for launch, _ in recorded])
                except launcher.KernelRefusedError as error:
                    refused = str(error)
                if refused:
                    self.parts[key].found.refused[label({key: values})] = refused
                elif (signature := _signature(recorded)) not in seen:
                    seen.add(signature)
                    found.append((values, recorded))
        return found

    def _step(self, moves: Mapping[Key, Sequence[Mapping[str, int]]]) -> bool:
        """Try all, and take for each key the best. Whether there was a better one."""
        best = self.best
        samples = [self._seconds(best)]
        for i in range(max(map(len, moves.values()), default=0)):
            tried = {key: moves[key][i] if i < len(moves[key]) else best[key] for key in best}
            samples.append(self._seconds(tried))
        samples.append(self._seconds(best))
        moved = False
        for key, part in self.parts.items():
            seconds = [sample[key] for sample in samples]
            before = (seconds[0] + seconds[-1]) / 2
            of_moves = seconds[1 : 1 + len(moves[key])]
            names = [label({key: values}) for values in moves[key]]
            part.found.seconds.append({label({key: best[key]}): [seconds[0], seconds[-1]]})
            part.found.seconds[-1] |= {name: [s] for name, s in zip(names, of_moves, strict=True)}
            if of_moves and min(of_moves) < (1 - self.smallest) * before:
                part.found.best = {key: moves[key][of_moves.index(min(of_moves))]}
                moved = True
        return moved

    def _effects(self, start: Shape, pairs: int) -> dict[Key, Effect]:
        ratios: dict[Key, list[float]] = {}
        for number in range(pairs):
            sides = [("start", start), ("best", self.best)]
            seconds = {name: self._seconds(shape) for name, shape in sides[:: 1 if number % 2 == 0 else -1]}
            for key, before in seconds["start"].items():
                ratios.setdefault(key, []).append(seconds["best"][key] / before)
        return {key: judge(values, self.smallest) for key, values in ratios.items()}

    def _fault(self, key: Key, values: Mapping[str, int]) -> str | None:
        """What is wrong with the results, which then are never timed."""
        part, name = self.parts[key], label({key: values})
        if name not in part.judged:
            if not part.expected:
                part.expected = [case.expected() for case in part.cases]
                mx.eval(part.expected)
            with self._using({key: values}):
                pairs = zip(part.cases, part.expected, strict=True)
                wrong = next(filter(None, (fault(case.run, expected) for case, expected in pairs)), None)
            if wrong:
                part.found.wrong[name] = wrong
            part.found.tried += 1
            part.judged[name] = wrong
        return part.judged[name]

    def _launches(self, key: Key, values: Mapping[str, int]) -> list[Recorded]:
        with self._using({key: values}):
            return [one for case in self.parts[key].cases for one in case.launches()]

    def _seconds(self, shape: Shape) -> dict[Key, float]:
        """The GPU's time for a token, in seconds: all of it, and of the launches of each key."""
        keys: dict[str, Key] = {}
        for case in self.cases:  # each anew, as only a launch that is prepared asks for its shape
            with self._using(shape), shapes.asking() as asked:
                names = [launch.name for launch, _ in case.launches()]
            for one in asked:
                keys |= dict.fromkeys(names, (one.op, one.what))
        with self._using(shape):
            step = mx.compile(self.model.step)
            self._decode(step, WARM_UP)
            timeline = gpu_time.record(lambda: self._decode(step, TOKENS))
        seconds = {TOKEN: timeline.busy_seconds / TOKENS, **dict.fromkeys(self.parts, 0.0)}
        for kernel in timeline.kernels:
            name = NAME.search(kernel.name)
            key = keys.get(name[0]) if name else None
            if key in self.parts:
                seconds[key] += kernel.seconds / TOKENS
        if lost := [": ".join(key) for key, value in seconds.items() if not value]:
            raise InputError(f"the GPU tells no time of {lost[0]}; leave its op out with --op")
        return seconds

    def _decode(self, step: Step, tokens: int) -> None:
        token = mx.zeros((1, 1), mx.int32)
        for position in range(self.depth, self.depth + tokens):
            logits, _ = step(token, mx.array([position], mx.int32), self.rows)
            token = mx.argmax(logits, axis=-1).astype(mx.int32)[:, None]
            mx.eval(token)

    @contextmanager
    def _using(self, shape: Shape) -> Iterator[None]:
        clear_launches()
        with shapes.trying({**self.in_use, **self.best, **shape}):
            yield


def _signature(recorded: Sequence[Recorded]) -> str:
    """Equal for values that come to the same launches."""
    return repr([(launch.template, launch.defines, launch.grid, launch.threadgroup) for launch, _ in recorded])
