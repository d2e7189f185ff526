"""A kernel that Apple's compiler made, as a unit for the executor: out of a metallib, into assembly for this processor.

A metallib holds AIR: LLVM bitcode with address spaces, calls of air.* functions, and metadata that say what each
argument is. A stock clang reads it, and compiles it once the address spaces are gone; the air.* functions are the
shim's functions of the same names.
"""

import hashlib
import re
import struct
import tempfile
from collections.abc import Iterator

from parity_tests.msl import compiler
from parity_tests.msl.apple_kernels import Case
from parity_tests.msl.capture import KernelError
from parity_tests.msl.source import HERE, Unit

_ids = re.search(r"struct ThreadIds \{.*?\n\};", (HERE / "simt.cpp").read_text(), re.S)
assert _ids is not None
IDS = _ids[0]
ENTRY = 'extern "C" __attribute__((no_sanitize("coverage"))) void msl_entry(void* const* buffers, const ThreadIds* ids)'


class Metallib:
    """The functions of a metallib by name: a header with the places of its sections, then a list of tagged records."""

    def __init__(self, data: bytes) -> None:
        if data[:4] != b"MTLB":
            raise KernelError("not a metallib: it does not begin with MTLB")
        self.data = data
        try:
            self.places = dict(self._functions())
        except (struct.error, KeyError, UnicodeDecodeError) as error:
            raise KernelError("a damaged metallib: its list of functions does not read") from error

    def _functions(self) -> Iterator[tuple[str, tuple[int, int]]]:
        """Name, offset and size of each function's bitcode."""
        functions, code = struct.unpack_from("<Q", self.data, 24)[0], struct.unpack_from("<Q", self.data, 72)[0]
        (count,) = struct.unpack_from("<I", self.data, functions)
        record = functions + 4
        for _ in range(count):
            tags, at = {}, record + 4
            while (tag := self.data[at : at + 4]) != b"ENDT":
                (size,) = struct.unpack_from("<H", self.data, at + 4)
                tags[tag] = self.data[at + 6 : at + 6 + size]
                at += 6 + size
            (offset,), (size,) = struct.unpack_from("<Q", tags[b"OFFT"], 16), struct.unpack("<Q", tags[b"MDSZ"])
            yield tags[b"NAME"].rstrip(b"\0").decode(), (code + offset, size)
            record += struct.unpack_from("<I", self.data, record)[0]

    def llvm(self, name: str) -> str:
        """LLVM's text of a function."""
        if name not in self.places:
            raise KernelError(f"{name}: not in this metallib, which has {len(self.places)} functions")
        offset, size = self.places[name]
        bitcode = self.data[offset : offset + size]
        with tempfile.NamedTemporaryFile(suffix=".bc") as file:
            file.write(bitcode)
            file.flush()
            read = ["-x", "ir", "-w", "-S", "-emit-llvm", "-O0", "-Xclang", "-disable-llvm-passes", file.name]
            key = f"apple {hashlib.sha256(bitcode).hexdigest()}"
            return compiler._make(key, ".ll", [*compiler.compiler().clang, *read], name).read_text()


_FLOATS = ("float", "half", "bfloat", "float4", "half4", "bfloat4")
_C = {n: n for n in (*_FLOATS, "void")} | {"i1": "bool", "i8": "char", "i16": "short", "i32": "int", "i64": "long"}


def _intrinsic(number: int, result: str, name: str, parameters: str) -> str:
    """C++ for a function of AIR, by the shim's function of the same name."""
    types = [p.split()[0] for p in parameters.split(",") if p.strip()]
    # A caller in AIR does not extend small integers, which a callee in C++ expects: take an int, and cut it here.
    passed = ", ".join(f"{'int' if t in ('i1', 'i8', 'i16') else _C[t]} a{i}" for i, t in enumerate(types))
    sign = "u" if ".u." in name else ""
    values = [f"({'u' if t == 'i16' and 'shuffle' in name else sign}{_C[t]})a{i}" for i, t in enumerate(types)]
    function = name.split(".")[1]
    match function:
        case "wg" | "simdgroup":
            value = f"{'threadgroup' if function == 'wg' else function}_barrier((mem_flags)a0)"
        case "convert":  # air.convert.<kind>.<to>.<kind>.<from>
            _, _, kind, _, source, _ = name.split(".")
            to, given = (f"{'u' if k == 'u' else ''}{_C[t]}" for k, t in ((kind, result), (source, types[0])))
            value = f"{to}(a0)" if to.endswith("4") else f"({to})({given})a0"
        case "is_uniform":  # asserts that the lanes agree
            value = "true"
        case "normalize_function_constant_predicate":
            value = "a0 != 0"
        case _:
            space = "fast" if function.startswith("fast_") else ""
            value = f"metal::{space}{space and '::'}{function.removeprefix('fast_')}({', '.join(values)})"
    declaration = f"{_C[result]} air_{number}({passed})"
    returned = value if result == "void" else f"return {value}"
    return f'extern "C" {declaration} __asm__("{name}");\n{declaration} {{ {returned}; }}\n'


def apple_unit(case: Case, llvm: str, mode: str) -> Unit:
    """Apple's bitcode as assembly for this processor in a C++ unit that has the air.* functions and the call."""
    plain = re.sub(r"<4 x (\w+)>", r"\g<1>4", llvm)
    declarations = re.findall(r"^declare (?:\w+ )*?(\w+) @(air\.[\w.]+)\((.*?)\)", plain, re.M)
    intrinsics = [_intrinsic(i, *d) for i, d in enumerate(declarations)]
    # Threadgroup variables go where the runtime looks for them; other code may change them at a barrier.
    text = re.sub(
        r"= internal (?:unnamed_addr )?addrspace\(3\) global (.*) undef(,.*)",
        r'= hidden global \1 undef, section "msl_shared"\2',
        llvm,
    )
    text = re.sub(
        r"(@\S+\.MTL_FC_INIT_(\d+)_\w+ = .*)externally_initialized constant (\w+) undef, section \"[^\"]*\"",
        lambda m: f"{m[1]}constant {m[3]} {case.constants.get(int(m[2]), 0)}",
        text,
    )
    text = re.sub(r" addrspace\(\d\)", "", text).replace("addrspacecast", "bitcast")
    text = re.sub(r"(@llvm\.mem\w+(?:\.inline)?)\.p\d(\.p\d)?", lambda m: m[1] + ".p0" + (".p0" if m[2] else ""), text)
    lines = [x for x in text.splitlines() if not (x.startswith("declare") and "@llvm." in x)]  # LLVM knows them
    optimise = ["-O2"] if mode == "fast" else ["-O1", "-fno-vectorize", "-fno-slp-vectorize"]
    optimise += [] if mode == "fast" else ["-fsanitize-coverage=edge,no-prune,trace-loads,trace-stores"]
    command = [*compiler.compiler().clang, "-x", "ir", "-w", "-S", "-fPIC", compiler._TARGET, *optimise]
    assembly = compiler._make(f"apple {command} {lines}", ".s", command, case.name, "\n".join(lines)).read_text()
    assembly = re.sub(r"(?<!\w)\.L", ".Lapple_", assembly)  # the unit around it has local labels of the same names

    definition = re.search(rf"^define .*@{case.name}\((.*)\) ", llvm, re.M)
    nodes = dict(re.findall(r"^(!\d+) = (?:distinct )?!\{(.*)\}$", llvm, re.M))
    meanings = nodes[nodes[re.findall(r"^!air.kernel = !\{(!\d+)\}", llvm, re.M)[0]].split(", ")[2]].split(", ")
    assert definition is not None
    types = [x.split()[0] for x in re.sub(r"<(\d) x i32>", r"uint\1", definition[1]).split(", ")]
    arguments = []
    for kind, meaning in zip(types, (nodes[m] for m in meanings), strict=True):
        if location := re.search(r'"air.location_index", i32 (\d+)', meaning):
            arguments.append(f"buffers[{location[1]}]")
        else:
            arguments.append(thread_attribute(kind.replace("i32", "uint"), meaning.split('"')[1].removeprefix("air.")))
    parameters = ", ".join({"ptr": "void*", "i32": "uint"}.get(t, t) for t in types)
    parts = [
        *("#include <metal_stdlib>", "using namespace metal;", *intrinsics, IDS),
        f'extern "C" void {case.name}({parameters});\n{ENTRY} {{ {case.name}({", ".join(arguments)}); }}',
        f'asm(R"apple(\n{assembly}\n)apple");',
    ]
    return unit_of(case, "\n".join(parts))


def thread_attribute(kind: str, name: str) -> str:
    """A thread attribute as a uint, uint2 or uint3; a kernel may ask for the first of three components alone."""
    three = re.search(rf"\b{name}\[3\]", IDS) is not None
    values = [f"ids->{name}" + (f"[{i}]" if three else "") for i in range(int(kind[4:] or 1))]
    return f"{kind}{{{', '.join(values)}}}"


def unit_of(case: Case, text: str) -> Unit:
    return Unit(case.name, "", "", [f"buffer {i}" for i in range(len(case.buffers))], "", text)


def made_by(llvm: str) -> str:
    """What the bitcode says of its maker."""
    nodes = dict(re.findall(r"^(!\d+) = !\{(.*)\}$", llvm, re.M))
    named = dict(re.findall(r"^!([\w.]+) = !\{(.*)\}$", llvm, re.M))
    apple, air, language = (
        [x.strip('!"').removeprefix("i32 ") for x in nodes[named[n]].split(", ")]
        for n in ("llvm.ident", "air.version", "air.language_version")
    )
    options = [nodes[n].strip('!"').removeprefix("air.compile.") for n in named["air.compile_options"].split(", ")]
    return f"{apple[0]}, AIR {'.'.join(air)}, {language[0]} {'.'.join(language[1:3])}, {', '.join(options)}"
