"""Times the contestants of a case in turns, each in a chain of launches that wait for one another.

In a chain, as in decode, a launch takes its activations, or its token, from the result of the one before. Between them
stands a link: a few small operations, one of them so slow that the device, and not the host that queues the launches,
sets the time of the chain. The link alone is timed in every round, and its time is taken off. So the figure is what the
device needs for a launch that has to wait; what the host needs for each is the "tiny launch" beside the table.
"""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial

import mlx.core as mx

from bench import gpu_time
from bench.op_cases import Case, Contestant
from kernels import launcher
from kernels.compiled import compile_ahead

# Relative errors (RMS) against the twin in float32 from which a result is wrong. Ours in bfloat16 are below 0.01; MLX's
# own operations sum in bfloat16 on some back ends, and round the product of a K-quant's scales.
WRONG, WRONG_MLX = 0.05, 0.5
SAMPLE_SECONDS = 0.005  # that one sample takes, about
LAUNCHES = (2, 256)  # of a sample: least and most
LINK_FACTOR = 2  # how much longer a link takes than one that the host holds up
LONGEST_LINK = 1 << 22  # elements
LINK_LAUNCHES = 3
GPU_ROUNDS = 10  # of samples of the GPU's own time, which need no more
GPU_LAUNCHES = 32  # of such a sample, at most


def seconds(arrays: Sequence[mx.array]) -> float:
    """To compute a graph that is built already: in decode, Python builds the next one while the device computes."""
    start = time.perf_counter()
    mx.eval(arrays)
    return time.perf_counter() - start


class Link:
    """From the first value of a result to activations: the same normal ones every time, moved by less than 1.
    Of int32, for tokens, they are 0, 1, 2 and so on. `mx.depends` would not do: the device does not wait for it.

    A sum over a row runs in one threadgroup: it takes as long as the row is, and leaves the memory and its caches to
    what is measured.
    """

    def __init__(self, dtype: mx.Dtype, elements: int):
        self.is_first = mx.arange(elements) == 0
        normal = mx.where(self.is_first, 0, mx.random.normal((elements,), key=mx.random.key(0)))
        values = mx.arange(elements) if dtype == mx.int32 else normal
        self.steps = (values - mx.concatenate([values[:1], values[:-1]])).astype(dtype)
        mx.eval(self.steps, self.is_first)

    def next(self, result: mx.array) -> mx.array:
        values = result.reshape(-1)
        if self.steps.dtype == mx.int32:
            first = values[: mx.int32.size // values.itemsize].view(mx.int32) & 0  # one small operation, as tanh is
        else:
            first = mx.tanh(values[:1])
        return mx.cumsum(mx.where(self.is_first, first, self.steps))

    def chain(self, links: int) -> float:
        """Seconds of so many links after another."""
        values = self.steps
        for _ in range(links):
            values = self.next(values)
        return seconds([values])

    @classmethod
    def long_enough(cls, dtype: mx.Dtype, least: int) -> tuple["Link", float]:
        """A link with at least so many values, and the seconds of a tiny launch that waits for another."""

        def each(link: "Link") -> float:
            return min(link.chain(64) for _ in range(5)) / 64

        shortest = each(cls(dtype, 32))
        elements = max(least, 1024)
        link = cls(dtype, elements)
        while each(link) < LINK_FACTOR * shortest and elements < LONGEST_LINK:
            elements *= 2
            link = cls(dtype, elements)
        return link, shortest / LINK_LAUNCHES


OWN = "custom_kernel_"  # how MLX's CUDA back end names what mx.fast.cuda_kernel launches


@dataclass
class Row:
    """What is known of one contestant. Samples are seconds a launch."""

    case: Case
    by: str
    nbytes: float = 0.0  # read and written by one launch
    error: float | None = None
    problem: str | None = None  # why it was not timed
    launches: int = 0  # in a sample
    first: float | None = None  # seconds of the first launch, compiling included
    warm_up: list[float] = field(default_factory=list)
    chain: list[float] = field(default_factory=list)
    link: list[float] = field(default_factory=list)
    independent: list[float] = field(default_factory=list)
    gpu: list[float] = field(default_factory=list)  # busy, where the GPU tells


def relative_error(got: mx.array, truth: mx.array) -> float:
    difference = got.reshape(-1).astype(mx.float32) - truth.reshape(-1)
    return float(difference.square().mean().sqrt() / truth.square().mean().sqrt())


class Timer:
    """A contestant that gave the right result, and the set that its next launch takes."""

    def __init__(self, case: Case, contestant: Contestant, link: Link, row: Row):
        self.case, self.run, self.link, self.row = case, contestant.run, link, row
        self.next_set = 0

    def take(self) -> int:
        self.next_set = (self.next_set + 1) % self.case.sets
        return self.next_set

    def chain(self, launches: int) -> float:
        values, x = self.link.steps, self.case.x
        results: list[mx.array] = []  # all of them: one that nobody asks for is not computed
        for _ in range(launches):
            result = self.run(x, self.take())
            results += result
            values = self.link.next(result[0])
            x = values[: x.size].reshape(x.shape)
        return seconds([values, *results])

    def independent(self, launches: int) -> float:
        return seconds([y for _ in range(launches) for y in self.run(self.case.x, self.take())])

    def warm_up(self) -> None:
        """Compile, find how many launches make a sample, and reach the pace of the measurement."""
        row = self.row
        least, most = LAUNCHES
        self.chain(least)
        each = self.chain(least) / least
        row.launches = max(least, min(most, round(SAMPLE_SECONDS / each)))
        row.warm_up = [self.chain(row.launches) / row.launches for _ in range(3)]

    def sample(self) -> None:
        row, n = self.row, self.row.launches
        link, chain, independent = self.link.chain(n), self.chain(n), self.independent(n)
        row.link.append(link / n)
        row.chain.append((chain - link) / n)
        row.independent.append(independent / n)

    def sample_gpu(self) -> None:
        """Our own launches are told by their names; of other contestants the links' time is taken off."""
        n = min(self.row.launches, GPU_LAUNCHES)
        chain = gpu_time.record(lambda: self.chain(n))
        own = [kernel.seconds for kernel in chain.kernels if OWN in kernel.name]
        spent = sum(own) if own else chain.busy_seconds - gpu_time.busy_seconds(lambda: self.link.chain(n))
        self.row.gpu.append(spent / n)


def compile_first(run: Callable[[], object]) -> None:
    """What a call launches is compiled by ourselves on CUDA, where MLX takes several times as long."""
    if mx.cuda.is_available():
        with launcher.recording() as launches:
            run()
        compile_ahead(launches)


def measure(case: Case, link: Link, rounds: int, rows: list[Row]) -> None:
    """`measure_wall`, and where the GPU tells its own time `measure_gpu`."""
    timers = measure_wall(case, link, rounds, rows)
    if gpu_time.available():
        measure_gpu(timers, rounds)


def measure_wall(case: Case, link: Link, rounds: int, rows: list[Row]) -> list[Timer]:
    """Append a row for each contestant and fill them in turns: what is there when Ctrl-C comes is good.

    Returns what times those that gave the right result.
    """
    timers: list[Timer] = []
    truth: mx.array | None = None
    for name, contestant in case.contestants.items():
        row = Row(case, name)
        rows.append(row)
        try:
            start = time.perf_counter()
            compile_first(partial(contestant.run, case.x, 0))
            results = contestant.run(case.x, 0)
            mx.eval(results)
            row.first = time.perf_counter() - start
            if truth is None:
                truth = contestant.run(case.x.astype(mx.float32), 0)[0]
            row.error = relative_error(results[0], truth)
        except (RuntimeError, ValueError) as error:
            row.problem = "fails: " + " ".join(str(error).split())[:200]
            continue
        if not row.error < (WRONG_MLX if name == "mlx" else WRONG):
            row.problem = f"wrong result, off by {row.error:.2g}"
            continue
        row.nbytes = contestant.nbytes + case.other_nbytes + case.x.nbytes + sum(y.nbytes for y in results)
        timers.append(Timer(case, contestant, link, row))
    for timer in timers:
        timer.warm_up()
    for number in range(rounds):
        for timer in timers if number % 2 == 0 else timers[::-1]:
            timer.sample()
    return timers


def measure_gpu(timers: Sequence[Timer], rounds: int) -> None:
    """The GPU's own time, in turns; see `gpu_time` for what comes before it."""
    for _ in range(min(rounds, GPU_ROUNDS)):
        for timer in timers:
            timer.sample_gpu()
