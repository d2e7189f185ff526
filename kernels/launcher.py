"""Builds and launches the kernels: one Metal text for `mx.fast.metal_kernel` and for `mx.fast.cuda_kernel`.

`<op>.metal` is the body of a kernel. Before it stand, as its header, `quants.h.metal`, the op's own `<op>.h.metal` if
there is one, and lines that say which weights it gets. On NVIDIA, `cuda_prelude.h` stands before all of that and maps
Metal's words to CUDA's.

An op asks `back_end()`. Without one (a CPU, or kernels switched off) it uses its `_ops` twin. Otherwise it prepares a
`Launch` for its shapes and types, once, and calls that with the arrays.
"""

import hashlib
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, TypeAlias, cast

import mlx.core as mx

from kernels.cache_folder import cache_folder, read_own, write_whole
from kernels.planes import QUANT_TYPES, Bundle, QuantizedTensor, QuantType, Weight, planes

HERE = Path(__file__).resolve().parent
MAX_THREADS = 1024  # in a threadgroup
MAX_THREADGROUP_BYTES = 32 << 10
MAX_BUFFERS = 31
MAX_TOKENS = 8  # rows of activations that a decode kernel takes at once
LANES = 32

# mx.fast.metal_kernel or mx.fast.cuda_kernel
BackEnd: TypeAlias = Callable[..., Callable[..., list[mx.array]]]
# What a launch must know of a weight: (type, shape), the type as in GGUF.
Kind: TypeAlias = tuple[str, tuple[int, ...]]
# Where in one array the planes of each weight begin, in words.
Layout: TypeAlias = tuple[tuple[int, ...], ...]

_DENSE = {mx.float32: "F32", mx.float16: "F16", mx.bfloat16: "BF16"}
_DENSE_TEXT = {"F32": "float", "F16": "float16_t", "BF16": "bfloat16_t"}
_avoided: set[str] = set()
_recorded: "list[Recorded] | None" = None


class KernelRefusedError(ValueError):
    """A launch that no device could run, and why. `op` is the one it was for."""

    def __init__(self, op: str, why: str):
        super().__init__(f"{op}: {why}")
        self.op = op


def require(op: str, *facts: tuple[bool, str]) -> None:
    """Raises KernelRefusedError with the text of the first fact that does not hold. For what is prepared, once."""
    for holds, why in facts:
        if not holds:
            raise KernelRefusedError(op, why)


def floats(dtype: mx.Dtype, name: str) -> tuple[bool, str]:
    """The fact that an array of activations is one that kernels read."""
    return dtype in _DENSE, f"{name} is {str(dtype).removeprefix('mlx.core.')}; float32, float16 or bfloat16 is read"


def back_end(op: str) -> BackEnd | None:
    """What launches the kernel of an op on the default device; None where its twin must do.

    In a `recording` block, where nothing is launched, a CPU has one too.
    """
    if op in _avoided or (mx.default_device() != mx.Device(mx.gpu) and _recorded is None):
        return None
    return cast(BackEnd, mx.fast.cuda_kernel if mx.cuda.is_available() else mx.fast.metal_kernel)


def architecture() -> str:
    """Of the CUDA device, as MLX names it to NVRTC."""
    info = mx.device_info()
    name = f"sm_{info.get('compute_capability_major', '')}{info.get('compute_capability_minor', '')}"
    return name + "a" if name == "sm_90" else name


@contextmanager
def avoiding(*ops: str) -> Iterator[None]:
    """Within the block these ops use their twins; all of them if none is named."""
    before = set(_avoided)
    _avoided.update(ops or (*OPS, *PROMPT_OPS))
    try:
        yield
    finally:
        _avoided.clear()
        _avoided.update(before)


def avoid(op: str) -> None:
    """From now on the op uses its twin: its kernel does not work on this device."""
    _avoided.add(op)


OPS = ("embed", "qmv", "experts_gate_up", "experts_down", "mla_decode")
PROMPT_OPS = ("expand",)  # for a prompt's many tokens, where `kernels.wide` applies


def kind(weight: Weight) -> Kind:
    if isinstance(weight, QuantizedTensor):
        return weight.type.name, weight.shape
    return _DENSE[weight.dtype], tuple(weight.shape)


def fits(*weights: Weight | None) -> bool:
    """Whether kernels can read these. None stands for a weight that a model does not have.

    MLX hands Metal an array of fewer than 8 elements as `constant`, which the text's `device` pointers are not; offsets
    are 32 bits wide; rows are read eight values at a time.
    """
    return all(
        weight is None
        or (
            weight.shape[-1] % 8 == 0
            and all(8 <= plane.size < 1 << 32 for plane in planes(weight))
            and (isinstance(weight, QuantizedTensor) or weight.dtype in _DENSE)
        )
        for weight in weights
    )


def placed(*weights: Weight, bundle: Bundle | None = None) -> tuple[Layout | None, list[mx.array]]:
    """Where the planes of each begin in the array that all of them share, and what a launch gets for them: that array.
    Where they have arrays of their own: None, and those.

    bundle: in which they may stand, if not that of the first one that is quantised.
    """
    bundle = bundle or next((w.bundle for w in weights if isinstance(w, QuantizedTensor)), None)
    if bundle is not None:
        begins = [bundle.begins(w) for w in weights]
        layout = tuple(begin for begin in begins if begin is not None)
        if len(layout) == len(weights):
            return layout, [bundle.words]
    return None, [plane for w in weights for plane in planes(w)]


@dataclass(frozen=True)
class Launch:
    """A kernel with everything but its arrays. op, inputs, writes, weights and defines are what `prepare` was given.

    name: the op and a digest of the text.
    """

    op: str
    name: str
    inputs: tuple[str, ...]
    writes: tuple[str, ...]
    weights: dict[str, Kind]
    defines: dict[str, str]
    kernel: Callable[..., list[mx.array]]
    template: list[tuple[str, Any]]
    grid: tuple[int, int, int]
    threadgroup: tuple[int, int, int]
    output_shapes: list[tuple[int, ...]]
    output_dtypes: list[mx.Dtype]

    def __call__(self, *arrays: mx.array) -> list[mx.array]:
        """`arrays`: the plain inputs, then what `placed` says of weights and vectors, in the order of `prepare`."""
        if _recorded is not None:
            _recorded.append((self, arrays))
            return [mx.zeros(*output) for output in zip(self.output_shapes, self.output_dtypes, strict=True)]
        return self.kernel(
            inputs=arrays,
            template=self.template,
            grid=self.grid,
            threadgroup=self.threadgroup,
            output_shapes=self.output_shapes,
            output_dtypes=self.output_dtypes,
        )


Recorded: TypeAlias = tuple[Launch, tuple[mx.array, ...]]  # a launch that was to be, and its arrays


@contextmanager
def recording() -> Iterator[list[Recorded]]:
    """Within the block nothing is launched: each launch and its arrays go to the list, and zeros come back."""
    global _recorded
    before, _recorded = _recorded, []
    try:
        yield _recorded
    finally:
        _recorded = before


def prepare(
    back_end: BackEnd,
    op: str,
    *,
    inputs: Sequence[str],
    weights: Mapping[str, Kind],
    outputs: Mapping[str, tuple[tuple[int, ...], mx.Dtype]],
    template: Mapping[str, int | bool | mx.Dtype],
    vectors: Sequence[str] = (),
    layout: Layout | None = None,
    threadgroups: tuple[int, int, int],
    simdgroups: int,
    defines: Mapping[str, str] | None = None,
    threadgroup_bytes: int = 0,
    writes: Sequence[str] = (),
    helpers: str | None = None,
) -> Launch:
    """The launch of `<op>.metal` with so many threadgroups of so many simdgroups.

    weights: by the name that the text has for each, in capitals; its planes become inputs, or with `layout` the one
    array that holds them all. vectors: of float32, by the name of their pointer in the text; inputs after the weights,
    or behind them in `layout`. defines: more names for the text. helpers: an op whose header it has too. Raises
    KernelRefusedError, naming the op, for what Metal or CUDA could not run.

    writes: inputs that the kernel writes, which the text says too: its first line is `// writes: `, then their names
    with commas between. MLX does not know of such a write. So a launch must get these arrays row-contiguous (of any
    other MLX makes a copy, and that would be written), no other array may share their memory, and what reads them
    afterwards must depend on an output of the launch.
    """
    names = [*inputs]
    lines = [f"#define {name} {value}\n" for name, value in (defines or {}).items()]
    for i, (name, (kind_name, shape)) in enumerate(weights.items()):
        struct, kind_planes = _struct(kind_name, shape[-1])
        if layout is None:
            pointers = [f"{name.lower()}_{plane}" for plane in kind_planes]
            names += pointers
        else:
            types = zip(kind_planes.values(), layout[i], strict=True)
            pointers = [f"(const device {plane_type}*)(bundle + {begin})" for plane_type, begin in types]
        lines.append(f"#define {name} {struct}{{{', '.join(pointers)}}}\n")
    if layout is None:
        names += vectors
    else:
        places = zip(vectors, layout[len(weights) :], strict=True)
        lines += [f"#define {name} ((const device float*)(bundle + {begin}))\n" for name, (begin,) in places]
        names.append("bundle")
    threads = simdgroups * LANES
    if not 0 < threads <= MAX_THREADS:
        raise KernelRefusedError(op, f"{threads} threads in a threadgroup; 32 to {MAX_THREADS} are possible")
    if threadgroup_bytes > MAX_THREADGROUP_BYTES:
        why = f"{threadgroup_bytes} bytes of threadgroup memory; {MAX_THREADGROUP_BYTES} at most"
        raise KernelRefusedError(op, why)
    if len(names) + len(outputs) > MAX_BUFFERS:
        raise KernelRefusedError(op, f"{len(names) + len(outputs)} buffers; {MAX_BUFFERS} at most")
    if min(threadgroups) < 1:
        raise KernelRefusedError(op, f"an empty grid of {threadgroups} threadgroups")
    headers = ("quants.h.metal", *(f"{name}.h.metal" for name in dict.fromkeys((helpers or op, op))))
    uses = _uses(weights.values(), template.values(), [_text(file) for file in (*headers[1:], f"{op}.metal")])
    header = "".join(_shortened(_text(file), uses) for file in headers) + "".join(lines)
    body = _shortened(_text(f"{op}.metal"), uses)
    _check_writes(op, body, inputs, writes)
    if back_end is mx.fast.cuda_kernel:
        # CUDA's word for a threadgroup's array differs from its word for a pointer to one, which is none.
        body = re.sub(r"^(\s*)threadgroup (?=\w+ \w+\[)", r"\1__shared__ ", body, flags=re.MULTILINE)
        body, header = _included(op, body), _included(op, _text("cuda_prelude.h") + header)
        # MLX knows a compiled text by itself alone, and a machine may have GPUs of two kinds.
        header = f"// {architecture()}\n{header}"
    # MLX keeps a compiled kernel by its name and its template alone.
    name = f"{op}_{hashlib.sha256((header + body).encode()).hexdigest()[:12]}"
    kernel = back_end(name=name, input_names=names, output_names=list(outputs), source=body, header=header)
    return Launch(
        op,
        name,
        tuple(inputs),
        tuple(writes),
        dict(weights),
        dict(defines or {}),
        kernel,
        list(template.items()),
        (threadgroups[0] * threads, threadgroups[1], threadgroups[2]),
        (threads, 1, 1),
        [shape for shape, _ in outputs.values()],
        [dtype for _, dtype in outputs.values()],
    )


def depth(cols: int, lanes: int, most: int) -> int:
    """How many chunks of a row each of its lanes loads in one go: at most `most`, and so that no turn is half empty."""
    turns = -(-cols // (8 * lanes))
    return max(d for d in range(1, most + 1) if turns % d == 0)


def _check_writes(op: str, body: str, inputs: Sequence[str], writes: Sequence[str]) -> None:
    line = re.match("// writes: (.*)\n", body)
    in_text = [name.strip() for name in line[1].split(",")] if line else []
    if set(in_text) != set(writes):
        why = f"writes {', '.join(writes) or 'no input'}; the first line of {op}.metal: {', '.join(in_text) or 'none'}"
        raise KernelRefusedError(op, why)
    if unknown := set(writes) - set(inputs):
        raise KernelRefusedError(op, f"writes {', '.join(sorted(unknown))}; its inputs: {', '.join(inputs)}")


def _included(op: str, text: str) -> str:
    """A line that includes the text from the user's cache folder; the text itself where nothing can be written.

    For each launch MLX's CUDA back end hashes the whole text of the kernel, which took longer than all else for our
    40 KB (bench/LOG.md). NVRTC reads the file when it compiles.
    """
    name = f"{op}_{hashlib.sha256(text.encode()).hexdigest()[:12]}.h"
    file = cache_folder() / "cuda" / name
    if re.search(r'["\\\n]', str(file)):
        return text
    try:
        if not _holds(file, text.encode()):
            write_whole(file, text.encode())
    except OSError:
        return text
    return f'#include "{file}"\n'


def _holds(file: Path, content: bytes) -> bool:
    try:
        return read_own(file) == content
    except OSError:
        return False


@cache
def _text(name: str) -> str:
    """Of a file; nothing where there is none, as an op need not have a header of its own."""
    file = HERE / name
    return file.read_text() if file.exists() else ""


def _uses(weights: Iterable[Kind], template: Iterable[int | bool | mx.Dtype], own: Iterable[str]) -> set[str]:
    """What a launch has of that for which texts have sections: quants.h.metal says which names there are.

    own: the op's texts.
    """
    uses = {"uint8_t" for value in template if value == mx.uint8}
    uses |= {"turns" for text in own if "load_turn<" in text}
    for kind_name, _ in weights:
        uses.add("weights")
        if quant := QUANT_TYPES.get(kind_name):
            uses |= {"quants", _struct_name(quant), "Iq4Nl" if kind_name == "IQ4_NL" else f"Linear<{quant.bits}>"}
        else:
            uses.add("Dense")
    return uses


def _shortened(text: str, uses: set[str]) -> str:
    """The text without comments, indentation, and sections for nothing of what the launch uses.

    Line breaks stay, so that the lines that a compiler names are those of the file, and so does the line of what is
    written. For each launch MLX looks a kernel up by its whole text (bench/LOG.md).
    """
    short, wanted = list[str](), True
    for line in text.split("\n"):
        if heading := re.match(r"// ---- (?:for ([^:]*?)(?:: .*)? -+$)?", line):
            parts = (heading[1] or "").split(" and ")
            wanted = heading[1] is None or not any(uses.isdisjoint(part.split()) for part in parts)
        if line.startswith("// writes: ") and not short:
            short.append(line)
        else:
            short.append(" ".join(line.partition("//")[0].split()) if wanted else "")
    return "\n".join(short)


def _struct(kind_name: str, cols: int) -> tuple[str, dict[str, str]]:
    """The text's type for a weight with rows of `cols` values, and its planes in order, with their types."""
    if kind_name in _DENSE_TEXT:
        return f"Dense<{_DENSE_TEXT[kind_name]}, {cols}>", {"values": _DENSE_TEXT[kind_name]}
    quant = QUANT_TYPES[kind_name]
    code = "Iq4Nl" if kind_name == "IQ4_NL" else f"Linear<{quant.bits}, {quant.zero}>"
    plane_types = {"quants": "uint32_t", "scales": "float16_t"}
    if quant.has_mins:
        plane_types["mins"] = "float16_t"
    if quant.is_super:
        plane_types["sub_scales"] = "uint8_t" if quant.has_mins else "int8_t"
    return f"{_struct_name(quant)}<{code}, {cols}>", plane_types


def _struct_name(quant: QuantType) -> str:
    return ("Super" if quant.is_super else "Scaled") + ("Min" if quant.has_mins else "")
