"""Executes every custom Metal kernel of a block of code on this CPU; MLX's own operations run as usual."""

import ctypes
import itertools
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeAlias
from unittest import mock

import mlx.core as mx
import numpy as np
import numpy.typing as npt
from elftools.elf.elffile import ELFFile

from parity_tests.msl import compiler
from parity_tests.msl.capture import KernelError, Launch, capture, with_dimensions
from parity_tests.msl.device import posing_as
from parity_tests.msl.lint import lint_llvm, lint_text
from parity_tests.msl.source import Unit, translate
from parity_tests.msl.traffic import BufferTraffic, LaunchReport

ORDERS = ("forward", "reverse", "random")  # in which lanes, simdgroups and threadgroups take turns
LOOP_LIMIT = 400_000  # branches of one thread; a row of 10,240 columns in one simdgroup takes about 1,000
_NUMPY = {
    mx.float32: np.float32,
    mx.float16: np.float16,
    mx.bfloat16: np.uint16,  # numpy has no such type; bits are moved, never computed with
    mx.int32: np.int32,
    mx.uint32: np.uint32,
    mx.int16: np.int16,
    mx.uint16: np.uint16,
    mx.int8: np.int8,
    mx.uint8: np.uint8,
    mx.int64: np.int64,
    mx.uint64: np.uint64,
    mx.bool_: np.bool_,
}
_Array = npt.NDArray[Any]
_Outputs: TypeAlias = list[mx.array]
_real_metal_kernel: Callable[..., Any] = mx.fast.metal_kernel
_run_here: Callable[[str, Callable[..., Any], Sequence[Any], dict[str, Any]], _Outputs] | None = None  # in a block
_INPUT, _OUTPUT, _WRITTEN = 0, 1, 3


class _Buffer(ctypes.Structure):  # simt.cpp explains these
    _fields_ = (
        ("data", ctypes.c_void_p),
        ("size", ctypes.c_uint64),
        ("kind", ctypes.c_int32),
        ("filled", ctypes.c_int32),
        ("name", ctypes.c_char_p),
    )


class _Traffic(ctypes.Structure):
    _fields_ = tuple(
        (n, ctypes.c_uint64)
        for n in (
            *("read", "written", "unique_read", "unique_written"),
            *("accesses", "lines", "least_lines", "touched_lines", "fetched_lines"),
        )
    )


class _Counts(ctypes.Structure):
    _fields_ = tuple(
        (n, ctypes.c_uint64)
        for n in ("threadgroup_barriers", "simdgroup_barriers", "simdgroup_operations", "accesses", "shared_bytes")
    )


class _Launch(ctypes.Structure):
    _fields_ = (
        ("entry", ctypes.c_void_p),
        ("buffers", ctypes.POINTER(_Buffer)),
        ("buffer_count", ctypes.c_uint32),
        ("grid", ctypes.c_uint32 * 3),
        ("threadgroup", ctypes.c_uint32 * 3),
        ("order", ctypes.c_uint32),
        ("seed", ctypes.c_uint32),
        ("checked", ctypes.c_uint32),
        ("collect", ctypes.c_uint32),
        ("loop_limit", ctypes.c_uint64),
    )


def _metal_kernel(name: str, *arguments: Any, **options: Any) -> Callable[..., _Outputs]:
    """`mx.fast.metal_kernel` in a block; one function for all blocks, so that a launcher may cache by it."""
    kernel = _real_metal_kernel(name, *arguments, **options)

    def call(*, inputs: Sequence[Any], **options: Any) -> _Outputs:
        if _run_here is None:
            return list(kernel(inputs=inputs, **options))
        return _run_here(name, kernel, inputs, options)

    return call


@contextmanager
def executing(mode: str = "trace", seed: int = 1) -> Iterator[list[LaunchReport]]:
    """Within the block `mx.fast.metal_kernel` checks and executes its kernels here; yields a report of each launch.

    mode 'trace': type check, lint, every access checked, three orders of the lanes that must give the same bits.
    mode 'fast': type check and lint, then one run without checks, for real shapes; its reports count no bytes.

    In the block MLX says that it has Metal and that its default device is the GPU (device.py). A kernel that was built
    in any such block is executed here; outside one it launches as usual. Inputs that are not row-contiguous are copied
    first, as MLX does by default. A kernel that writes into an input (by casting const away) is refused, unless the
    first line of its body says so: `// writes: cache`. Such an input is an output that begins with the array's content;
    the array itself gets the new content when all orders have agreed. It must be row-contiguous and share no memory
    with another input, or the launch is refused.
    """
    global _run_here
    if mode not in ("trace", "fast"):
        raise ValueError(f"mode {mode!r}: trace or fast")
    reports: list[LaunchReport] = []

    def run_here(name: str, kernel: Callable[..., Any], inputs: Sequence[Any], options: dict[str, Any]) -> _Outputs:
        outputs, report = _execute(name, kernel, inputs, options, mode, seed)
        reports.append(report)
        return outputs

    before, _run_here = _run_here, run_here
    try:
        with posing_as("metal"), mock.patch.object(mx.fast, "metal_kernel", _metal_kernel):
            yield reports
    finally:
        _run_here = before


def _execute(
    name: str, kernel: Callable[..., Any], inputs: Sequence[Any], options: dict[str, Any], mode: str, seed: int
) -> tuple[_Outputs, LaunchReport]:
    given = with_dimensions(name, inputs)
    arrays = [mx.contiguous(a) for a in given]
    launch = capture(name, kernel, arrays, options)
    unit = translate(launch)
    check(unit)
    written = _written(unit, launch, inputs, given)
    initial = options.get("init_value")
    shapes, dtypes = options["output_shapes"], options["output_dtypes"]

    first: list[_Array] | None = None
    report = None
    for order in range(len(ORDERS) if mode == "trace" else 1):
        outputs = [np.full(s, initial or 0, _NUMPY[d]) for s, d in zip(shapes, dtypes, strict=True)]
        contents = {i: content.copy() for i, content in written.items()}
        bound = _bind(unit, launch, arrays, contents, outputs)
        counted = _run(unit, launch, bound, mode, order, seed, initial is not None)
        report = report or counted
        made = [*outputs, *contents.values()]
        if first is None:
            first = made
        elif any(a.tobytes() != b.tobytes() for a, b in zip(first, made, strict=True)):
            raise KernelError(f"{name}: {ORDERS[order]} order of the lanes gives other bits than {ORDERS[0]} order")
    assert first is not None
    assert report is not None
    for content, new in zip(written.values(), first[len(dtypes) :], strict=True):
        content[...] = new
    return [
        mx.array(a).view(mx.bfloat16) if d == mx.bfloat16 else mx.array(a)
        for a, d in zip(first[: len(dtypes)], dtypes, strict=True)
    ], report


def _written(unit: Unit, launch: Launch, inputs: Sequence[Any], arrays: list[mx.array]) -> dict[int, _Array]:
    """The memory of the inputs that the kernel says it writes, by their place; `arrays` are the inputs as arrays."""
    if not unit.writes:
        return {}
    # Each input is followed in the signature by what it has of _shape, _strides and _ndim.
    places = [0, *itertools.accumulate(1 + sum(more) for more in launch.with_shape)]
    names = [unit.buffers[place] for place in places[:-1]]
    memory = [np.array(_bits(a), copy=False) for a in arrays]
    found = {}
    for name in unit.writes:
        if name not in names:
            raise KernelError(f"{unit.name}.metal:1: writes {name!r}; the inputs are {', '.join(names)}")
        i = names.index(name)
        if not isinstance(inputs[i], mx.array):
            raise KernelError(f"{unit.name}: {name!r} is written and no MLX array: a copy of it would be written")
        if not memory[i].flags.c_contiguous:
            raise KernelError(f"{unit.name}: {name!r} is written and not row-contiguous: a copy of it would be written")
        for j, other in enumerate(memory):
            if j != i and other.flags.c_contiguous and np.may_share_memory(memory[i], other):
                raise KernelError(f"{unit.name}: {name!r} is written and shares memory with {names[j]!r}")
        found[i] = memory[i]
    return found


def _bits(a: mx.array) -> mx.array:
    return a.view(mx.uint16) if a.dtype == mx.bfloat16 else a


def check(unit: Unit) -> None:
    """The type check with address spaces, then the lint."""
    llvm = compiler.type_check(unit.name, unit.check)
    if complaints := lint_text(unit) + lint_llvm(llvm.read_text()):
        raise KernelError("\n".join(complaints))


def _bind(
    unit: Unit, launch: Launch, inputs: list[mx.array], written: dict[int, _Array], outputs: list[_Array]
) -> list[tuple[str, _Array, int]]:
    """Values for the buffers of the signature, in order: name, array, kind. written: by the place of the input."""
    values: list[tuple[_Array, int]] = []
    for i, (a, (shape, strides, ndim)) in enumerate(zip(inputs, launch.with_shape, strict=True)):
        values.append((written[i], _WRITTEN) if i in written else (np.array(_bits(a)), _INPUT))
        row_major = [int(np.prod(a.shape[i + 1 :])) for i in range(a.ndim)]
        values += [(np.array(a.shape, np.int32), _INPUT)] if shape else []
        values += [(np.array(row_major, np.int64), _INPUT)] if strides else []
        values += [(np.array([a.ndim], np.int32), _INPUT)] if ndim else []
    values += [(a, _OUTPUT) for a in outputs]
    if len(values) != len(unit.buffers):
        raise KernelError(f"{unit.name}: {len(values)} values for the buffers {unit.buffers}")
    return [(name, a, kind) for name, (a, kind) in zip(unit.buffers, values, strict=True)]


def _run(
    unit: Unit,
    launch: Launch,
    bound: list[tuple[str, _Array, int]],
    mode: str,
    order: int,
    seed: int,
    filled: bool,
) -> LaunchReport:
    path = compiler.library(unit.name, unit.execute, mode)
    library = _load(path)
    buffers = (_Buffer * len(bound))(
        *(_Buffer(a.ctypes.data, a.nbytes, kind, kind == _OUTPUT and filled, name.encode()) for name, a, kind in bound)
    )
    traffic, counts = (_Traffic * (len(bound) + 1))(), _Counts()
    text = ctypes.create_string_buffer(4096)
    checked = mode == "trace"
    request = _Launch(
        ctypes.cast(library.msl_entry, ctypes.c_void_p),
        *(buffers, len(bound), launch.grid, launch.threadgroup),
        *(order, seed, checked, checked and order == 0, LOOP_LIMIT),
    )
    if library.msl_run(ctypes.byref(request), text, ctypes.c_uint64(len(text)), traffic, ctypes.byref(counts)):
        kind, address, message = text.value.decode().split("\t", 2)
        where = f"{_place(path, int(address, 16))}: " if int(address, 16) else f"{unit.name}: "
        raise KernelError(f"{where}{kind}: {message} ({ORDERS[order]} order)")
    names = [(name, a.nbytes) for name, a, _ in bound] + [("threadgroup memory", counts.shared_bytes)]
    measured = [
        BufferTraffic(name, size, *(getattr(t, field[0]) for field in _Traffic._fields_))
        for (name, size), t in zip(names, traffic, strict=True)
        if checked
    ]
    return LaunchReport(
        *(unit.name, launch.text, launch.grid, launch.threadgroup, measured, counts.shared_bytes),
        *(counts.threadgroup_barriers, counts.simdgroup_barriers, counts.simdgroup_operations),
    )


def _load(path: Path) -> ctypes.CDLL:
    ctypes.CDLL("libm.so.6", ctypes.RTLD_GLOBAL)  # the kernel's exp and the like; nothing else is linked
    return ctypes.CDLL(str(path))


def _place(library: Path, address: int) -> str:
    """file:line of an address, from the library's own line table."""
    with library.open("rb") as file:
        dwarf = ELFFile(file).get_dwarf_info()
        for unit in dwarf.iter_CUs():
            program = dwarf.line_program_for_CU(unit)
            if program is None:
                continue
            states = [e.state for e in program.get_entries() if e.state is not None]
            for a, b in itertools.pairwise(states):
                if not a.end_sequence and a.address <= address < b.address:
                    # DWARF 5 counts files from 0, earlier versions from 1.
                    entry = program["file_entry"][a.file - (program["version"] < 5)]
                    name = entry.name if isinstance(entry.name, bytes) else bytes(entry.name)
                    return f"{name.decode()}:{a.line}"
    return "?"
