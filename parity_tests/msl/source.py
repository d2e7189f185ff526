"""From the captured Metal text to a C++ unit for clang.

The text stays as it is but for three things: a threadgroup array becomes a static one in its own section (clang has no
such local variables), MLX's attributed instantiation at the end becomes a plain one, and `#line` names the parts after
the kernel: `<name>.h.metal` (the header), `<name>.signature` (MLX's) and `<name>.metal` (the body).
"""

import re
from dataclasses import dataclass
from pathlib import Path

from parity_tests.msl.capture import MAX_BUFFERS, KernelError, Launch

HERE = Path(__file__).resolve().parent
_SIGNATURE = re.compile(r"(?:template <[^\n]*>\n)?\[\[kernel\]\] void (\w+)\(\n(.*?)\) \{\n", re.S)
_TAIL = re.compile(r"\}\s*template \[\[host_name\(\"\w+\"\)\]\] \[\[kernel\]\] decltype\((\w+<.*>)\) \1;\s*$", re.S)
_BUFFER = re.compile(r"(const )?(?:device|constant) (.+?)([*&]) (\w+) \[\[buffer\((\d+)\)\]\]")
_ATTRIBUTE = re.compile(r"(uint[23]?) (\w+) \[\[\2\]\]")
_SHARED = re.compile(r"\bthreadgroup\s+(?!_)[\w:<>, ]+?\s(\w+)\s*((?:\[[^];]*\]\s*)*)(;|=|\{)")


@dataclass(frozen=True)
class Unit:
    """name: of the kernel. header, body: the author's text. buffers: names, in the order of their numbers.
    check, execute: C++ for the type check (address spaces on) and for the execution (with `msl_entry`)."""

    name: str
    header: str
    body: str
    buffers: list[str]
    check: str
    execute: str

    @property
    def writes(self) -> list[str]:
        """Names of inputs that the kernel may write: its body begins with the line `// writes: a, b`."""
        line = re.match("// writes: (.*)\n", self.body)
        return [name.strip() for name in line[1].split(",")] if line else []


def without_comments(text: str) -> str:
    """The same text with comments and strings blanked; every other character keeps its place."""
    return re.sub(r"//[^\n]*|/\*.*?\*/|\"(?:\\.|[^\"\\\n])*\"", lambda m: re.sub(r"[^\n]", " ", m[0]), text, flags=re.S)


def shared_arrays(text: str) -> list[re.Match[str]]:
    """Declarations of threadgroup variables, no pointers and no parameters; groups: name, sizes, what follows."""
    bare = without_comments(text)
    return [m for m in _SHARED.finditer(bare) if bare.count("(", 0, m.start()) == bare.count(")", 0, m.start())]


def translate(launch: Launch) -> Unit:
    name, text = launch.name, launch.text
    start = _SIGNATURE.search(text)
    if start is None:
        raise KernelError(f"{name}: no kernel in the text that MLX generated:\n{text}")
    tail = _TAIL.search(text, start.end())
    header = text[: start.start()]
    body = text[start.end() : tail.start()] if tail else text[start.end() : text.rindex("}")]
    instance = tail[1] if tail else start[1]
    if "[[buffer(" in body:  # MLX 0.32.4: several outputs, with _shape, _strides or _ndim and no thread attribute
        raise KernelError(f"{name}: MLX generated a broken signature; name a thread attribute in the body:\n{text}")

    arguments: list[str] = []
    buffers: list[str] = []
    for parameter in start[2].split(",\n"):
        if buffer := _BUFFER.fullmatch(parameter.strip()):
            const, kind, by, buffer_name, number = buffer.groups()
            if int(number) != len(buffers):
                raise KernelError(f"{name}: MLX generated a broken signature: buffer {number} is not the next one")
            arguments.append(f"{'*' if by == '&' else ''}({const or ''}{kind}*)buffers[{number}]")
            buffers.append(buffer_name)
        elif attribute := _ATTRIBUTE.fullmatch(parameter.strip()):
            dimensions = int(attribute[1][4:] or 1)
            values = [f"ids->{attribute[2]}" + (f"[{i}]" if dimensions > 1 else "") for i in range(dimensions)]
            arguments.append(f"{attribute[1]}{{{', '.join(values)}}}")
        else:
            raise KernelError(f"{name}: MLX generated a broken signature, at {parameter.strip()!r}")
    if len(buffers) > MAX_BUFFERS:
        raise KernelError(f"{name}: {len(buffers)} buffers; Metal allows {MAX_BUFFERS}")

    pieces, last = [], 0
    for m in shared_arrays(body):
        pieces += [body[last : m.start()], "static MSL_SHARED "]
        last = m.start()
    marked = "".join(pieces) + body[last:]
    unit = "\n".join(
        [
            "#include <metal_stdlib>",
            "using namespace metal;",
            f'#line 1 "{name}.h.metal"',
            header,
            f'#line 1 "{name}.signature"',
            start[0].rstrip("\n"),
            f'#line 1 "{name}.metal"',
            marked,
            "}",
            f'#line 1 "{name}.instance"',
            "",
        ]
    )
    ids = re.search(r"struct ThreadIds \{.*?\n\};", (HERE / "simt.cpp").read_text(), re.S)
    assert ids is not None
    entry = (
        f'{ids[0]}\nextern "C" __attribute__((no_sanitize("coverage")))\n'
        "void msl_entry(void* const* buffers, const ThreadIds* ids) {\n"
        # A call through a volatile pointer is not inlined: code inlined here would lose its checks.
        f"  static decltype(&{instance}) volatile call = &{instance};\n  call({', '.join(arguments)});\n}}\n"
    )
    return Unit(
        name,
        header,
        body,
        buffers,
        unit + (f"template decltype({instance}) {instance};\n" if tail else ""),
        unit + entry,
    )
