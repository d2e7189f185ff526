"""What Apple's compiler refuses, or CUDA reads differently, and clang with the shim accepts.

Two looks. `lint_text` reads the author's text with patterns; it knows the small dialect that our kernels are written
in and no more: a type that is neither built in, nor a template parameter, nor a struct of the same text is not
recognised, and neither is a declaration spread by macros. `lint_llvm` reads what clang made of the unit: casts
between address spaces and comparisons of vectors are plain there, whatever the text looked like.
"""

import re
from collections.abc import Iterator

from parity_tests.msl.source import Unit, shared_arrays, without_comments

_SPACES = re.compile(r"\b(device|constant|threadgroup|thread)\b")
_SCALARS = "float half bfloat int uint short ushort char uchar long ulong bool"
_TYPES = [
    *(t + n for t in _SCALARS.split() for n in ("", "2", "3", "4")),
    *(f"{u}int{n}_t" for u in ("", "u") for n in (8, 16, 32, 64)),
    *("float16_t", "bfloat16_t", "size_t", "auto", "void"),
]
# word or pattern: why it is refused
_BANNED = {
    r"\[[&=\w, ]*\]\s*\([^()]*\)\s*(?:mutable\s*)?(?:->\s*\w+\s*)?\{": "lambdas are not supported",
    r"\bgoto\b": "goto is not supported",
    r"\bstatic\b": "static variables are not supported",
    r"\b(?:new|delete)\b": "dynamic memory is not supported",
    r"\b(?:try|catch|throw|noexcept|typeid|dynamic_cast|virtual|thread_local|asm|alignas|printf)\b": "not in Metal",
    r"\bstd\s*::": "there is no namespace std in Metal",
    r"\b__\w+": "names with two underscores belong to the compiler",
    r"\b(?:msl_\w+|MSL_\w+|shim)\b": "a name of the test's own shim",
    r"#\s*include\b": "no file can be included at run time",
    r"\b(?:vertex|fragment|sampler|texture|matrix|quad|access|array|restrict|complex|imaginary|and|or|xor|not"
    r"|bitand|bitor|compl)\b(?!\s*::)": "a reserved name in Metal",
    r"(?<![\w.])(?:\d+\.\d*(?:[eE][+-]?\d+)?|\.\d+(?:[eE][+-]?\d+)?|\d+[eE][+-]?\d+)(?![\w.])": (
        "a literal without f or h: float in Metal, double in CUDA"
    ),
    r"[^\x00-\x7f]": "MLX accepts ASCII only",
}


def lint_text(unit: Unit) -> list[str]:
    """Complaints as 'file:line: text', in the order of the text."""
    known = _TYPES + re.findall(r"\b(?:typename|class|struct)\s+(\w+)", unit.check)
    found = []
    for text, label, in_kernel in ((unit.header, "h.metal", False), (unit.body, "metal", True)):
        bare = without_comments(text)
        hits = [(m.start(), f"{why}: {m[0].strip()!r}") for p, why in _BANNED.items() for m in re.finditer(p, bare)]
        hits += _unqualified(bare, known)
        if in_kernel:
            hits += [
                (m.start(), f"threadgroup variable {m[1]!r} cannot have an initialiser")
                for m in shared_arrays(text)
                if m[3] != ";"
            ]
            hits += [
                (m.start(), "in CUDA all lanes must read this together: not within braces")
                for m in re.finditer(r"\bsimdgroup_index_in_threadgroup\b", bare)
                if bare.count("{", 0, m.start()) != bare.count("}", 0, m.start())
            ]
        else:
            hits += [(m.start(), f"threadgroup variable {m[1]!r} outside a kernel") for m in shared_arrays(text)]
            hits += _program_scope(bare)
            hits += _recursion(bare)
        for start, why in sorted(hits):
            found.append(f"{unit.name}.{label}:{bare.count(chr(10), 0, start) + 1}: {why}")
    return found


def _unqualified(bare: str, known: list[str]) -> Iterator[tuple[int, str]]:
    """Pointers and references whose address space is not written; `thread` too must be."""
    for m in re.finditer(rf"\b(?:{'|'.join(known)})\s*(?:const\s*)?(?:\*|&(?!&))", bare):
        declarator = re.split(r"[;{}(,]", bare[: m.start()])[-1]
        if not _SPACES.search(declarator):
            yield m.start(), f"pointer or reference without an explicit address space: {m[0]!r}"


def _functions(bare: str) -> Iterator[tuple[str, int, int, int]]:
    """Functions of the header: name, and where its head, its body and its end are."""
    for m in re.finditer(r"\b(\w+)\s*\(", bare):
        if bare.count("{", 0, m.start()) != bare.count("}", 0, m.start()):
            continue
        body = re.compile(r"[^;{]*\{").match(bare, m.end())
        if body is None:
            continue
        depth, end = 1, body.end()
        while depth and end < len(bare):
            depth += {"{": 1, "}": -1}.get(bare[end], 0)
            end += 1
        yield m[1], m.start(), body.end(), end


def _recursion(bare: str) -> Iterator[tuple[int, str]]:
    for name, _, body, end in _functions(bare):
        if call := re.search(rf"\b{name}\s*\(", bare[body:end]):
            yield body + call.start(), f"recursive call of {name!r}"


def _program_scope(bare: str) -> Iterator[tuple[int, str]]:
    """Variables outside functions must be `constant`."""
    outside, last = list(bare), 0
    for _, head, _, end in _functions(bare):
        if head >= last:  # blank the function, and end its statement
            outside[head:end] = [c if c == "\n" else " " for c in bare[head:end]]
            outside[end - 1] = "}"
            last = end
    for m in re.finditer(r"\b(?:struct|enum)\s*\w*\s*\{[^{}]*(?:\{[^{}]*\}[^{}]*)*\}", bare):  # members
        outside[m.start() : m.end() - 1] = " " * (m.end() - 1 - m.start())
    for m in re.finditer(r"(?:^|[;}])([^;{}#]*?)\b(\w+)\s*(?:\[[^\]]*\]\s*)*(?:=|;|\{)", "".join(outside)):
        words = re.sub(r"template\s*<[^>]*>", "", m[1]).split()
        if words and not {"constant", "struct", "using", "typedef", "enum", "namespace"} & set(words):
            yield m.start(2), f"program-scope variable {m[2]!r} must be in the constant address space"


def lint_llvm(text: str) -> list[str]:
    """Complaints about the unit as clang understood it (LLVM's text, unoptimised, with line tables)."""
    nodes = dict(re.findall(r"^!(\d+) = (?:distinct )?!(.*)$", text, re.M))
    checks = {
        r"\baddrspacecast\b": "a cast between address spaces",
        r"= [fi]cmp (?:\w+ )+<\d+ x": "a comparison of vectors: a bool vector in Metal, none in CUDA",
    }
    found = []
    for pattern, why in checks.items():
        for m in re.finditer(rf"^  .*{pattern}.*!dbg !(\d+)", text, re.M):
            where = _place(nodes, m[1])
            if ".metal" in where:
                found.append(f"{where}: {why}")
    return sorted(set(found))


def _place(nodes: dict[str, str], number: str) -> str:
    """file:line of a debug location."""
    line = re.search(r"line: (\d+)", nodes[number])
    scope = number
    while following := re.search(r"scope: !(\d+)", nodes[scope]):
        scope = following[1]
        if file := re.search(r"file: !(\d+)", nodes[scope]):
            name = re.search(r'filename: "([^"]*)"', nodes[file[1]])
            return f"{name[1] if name else '?'}:{line[1] if line else '?'}"
    return "?"
