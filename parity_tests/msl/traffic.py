"""What a launch moved, counted from its trace."""

from dataclasses import dataclass, field

LINE = 128  # bytes; what Apple's and NVIDIA's caches fetch


@dataclass(frozen=True)
class BufferTraffic:
    """Bytes of one buffer over the whole grid. read, written: every access of every thread; unique_*: each byte once.

    accesses: instructions of a simdgroup that met the buffer; lines: the 128-byte lines they touched; least_lines: the
    fewest lines that could have held the bytes they asked for. touched_lines: each line once in the whole grid;
    fetched_lines: each once in every threadgroup, read or written. All of these are zero for threadgroup memory.
    """

    name: str
    size: int
    read: int
    written: int
    unique_read: int
    unique_written: int
    accesses: int
    lines: int
    least_lines: int
    touched_lines: int
    fetched_lines: int

    @property
    def fetched(self) -> int:
        """Bytes that a GPU would ask of memory if every threadgroup had a cache, and none of them shared it."""
        return LINE * self.fetched_lines

    @property
    def coalescing(self) -> float:
        """1.0 when no access could be served by fewer lines; lanes that read the same bytes ask once."""
        return self.least_lines / self.lines if self.lines else 1.0


@dataclass(frozen=True)
class LaunchReport:
    """barriers and operations are counted once for each threadgroup or simdgroup that passes them, not per thread.

    text: the whole Metal source, as MLX generated it. threadgroup_memory: bytes. buffers: empty in fast mode.
    """

    kernel: str
    text: str = field(repr=False)
    grid: tuple[int, int, int]
    threadgroup: tuple[int, int, int]
    buffers: list[BufferTraffic]
    threadgroup_memory: int
    threadgroup_barriers: int
    simdgroup_barriers: int
    simdgroup_operations: int

    def buffer(self, name: str) -> BufferTraffic:
        return next(b for b in self.buffers if b.name == name)

    def __str__(self) -> str:
        lines = [
            f"{self.kernel}: grid {self.grid}, threadgroup {self.threadgroup}, {self.threadgroup_memory} bytes of "
            f"threadgroup memory, {self.threadgroup_barriers} threadgroup barriers, "
            f"{self.simdgroup_barriers} simdgroup barriers, {self.simdgroup_operations} simdgroup operations",
            f"{'buffer':24}{'size':>12}{'read':>14}{'unique':>12}{'written':>12}{'unique':>12}{'fetched':>14}"
            f"{'coalescing':>12}",
        ]
        lines += [
            f"{b.name:24}{b.size:>12,}{b.read:>14,}{b.unique_read:>12,}{b.written:>12,}{b.unique_written:>12,}"
            f"{b.fetched:>14,}{b.coalescing:>12.1%}"
            for b in self.buffers
        ]
        return "\n".join(lines)
