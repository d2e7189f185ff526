"""One-token faults in the kernels' texts: which of them does a small part of the table see?

    nice python -m parity_tests.mutate                    writes parity_tests/mutate.md
    nice python -m parity_tests.mutate --only FILE        replaces what it says of this text; for several --only again
    nice python -m parity_tests.mutate --unexplained      plants again what survived without a reason

Every mutant is one token of one file of `kernels/*.metal` replaced: an operator, a comparison, a constant, min for max,
an index by 0, a size by 1, a barrier by one of its simdgroup. It runs through the executor with those of CASES whose
code contains its line, until one fails. Mutants that clang or the lint refuses are counted apart: they could not be
shipped. What survives is listed, with the reason where REASONS has one; exit code 1 where it has none, or where fewer
than 97 of 100 that compile are caught.

Launch shapes are set here, not taken from the modules, so that rows and turns are more than one in every loop.
"""

import argparse
import hashlib
import importlib
import multiprocessing
import os
import re
import shutil
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from importlib.metadata import version
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any
from unittest import mock

from rich.progress import Progress

HERE = Path(__file__).resolve().parent
TEXTS = HERE.parent / "kernels"
RESULT = HERE / "mutate.md"
LEAST = 0.97
PATIENCE = 120.0  # seconds for one mutant; the slowest good one takes two
LIFE = 150  # mutants of one worker: every library that it has loaded stays in its memory

SHAPES = {
    "qmv": {"ROWS": 2, "SIMDGROUPS": 2, "DEPTH": 2},
    "experts_gate_up": {"ROWS": 2, "SIMDGROUPS": 2, "DEPTH": 2},
    "experts_down": {"ROWS": 2, "MAX_SIMDGROUPS": 3, "DEPTH": 2},
    "mla_decode": {"MERGE_ROWS": 2, "MERGE_SIMDGROUPS": 2, "MATRIX_THREADGROUPS": 6, "MATRIX_AHEAD": 3},
    "expand": {"SIMDGROUPS": 2},
}

# What a survivor changes, where that is no fault: text (a pattern), pattern in "line before -> line after", why.
_DEAD = "a load whose value nobody uses, which clang drops; `chunk` is checked again before it is used"
_EXTRA = "a row past the last is computed as the last one again and not written"
_CHECKED = "one more, past the last, where a check that stays is false"
_PAST = "one more, past the end of an array of the thread, which clang drops, or overwritten by what is next"
_PADDING = "padding, which nobody reads"
_TWO = "two neighbours of a row, which are of the same head: x and y are the same"
_PAIR_OF_HEADS = "three matrices of heads have room at most, so that only the first two are a pair: t is 0"
_NO_DIMENSION = "a matrix past k_pe, whose queries are 0, and zeros in it"
REASONS = [
    (r"(qmv|experts_\w+)\.h|mla_merge", r"has_chunk<.* -> .*has_chunk<.*, DEPTH (\+ (32|LANES)|\* 33)>", _DEAD),
    (r"qmv", r"-> .*\b33 / LANES", "33 / LANES is 32 / LANES"),
    (r"qmv\.h", r"^if \(NORMED\) \{ -> if \(1\)", _DEAD.split(";")[0]),
    (r"qmv\.h", r"-> if \(NORMED_TOO && (0u <|row <=)", "a row past the last has no columns left"),
    (r"qmv\.h", r"share = .* -> .*(rows \+ 1|\* rows)", "other shares, which still are all columns, each once"),
    (r"qmv\.h", r"-> .*min\(\(row - 1\) \* share", "the first row writes all columns, the others none"),
    (
        r"experts_gate_up\.metal",
        r"-> if \(slot >= uint\(1\)",
        "for a routed slot `shared_first` wraps past SHARED_WIDTH",
    ),
    (r"mla_merge", r"PER_LANE = .* -> .*(\+ 32\)|\* 32)", "room for more splits, which are checked one by one"),
    (
        r"mla_merge",
        r"-> factors.*(totals\[0\]|\? 1\.0f)",
        "a split without rows has a total of 0, sums of 0 and exp2(-INFINITY)",
    ),
    (r"mla_decode\.h", r"-> .*& 0xffff0001u", "the lower half of a rounded bfloat16 is 0"),
    (r"mla_decode\.metal", r"-> .*\b33 / (HEADS_AT_ONCE|SCORES)", "33 over a power of 2 is 32 over it"),
    (r"mla_decode\.metal", r"-> .*begin - rows_of_split", "the first split takes all rows, the others none"),
    (r"mla_merge", r"DEPTH = .* ->|d <= DEPTH", "chunks past the last, which are checked one by one"),
    (r"mla_merge", r"-> for \(uint begin = 0; begin (<=|< uint\(LATENT \* 2)", "a round more, which writes nothing"),
    (
        r"mla_decode\.metal",
        r"-> (sums.*float2\(.*1\.0f|float total = 1\.0f)",
        "multiplied by exp2(-INFINITY), 0, before it is used",
    ),
    (r"mla_decode\.metal", r"-> if \(simd_any\(larger >= largest", "scaled down by 1"),
    (r"quants", r"-> .*0xffff0001u", "the lowest bit of float32, where bfloat16 has eight"),
    (r"quants", r"-> .*field<(5, 12|9, 8), ZERO>\(high\)", "the word was shifted: that bit is 0"),
    (r"quants", r"i < 3;.* -> .*i (< 4|<= 3);", "one word more than is used, which clang drops"),
    (r"quants", r"i < 4;.* -> .*i (< 5|<= 4);", "two values more than are used, which clang drops"),
    (
        r"(qmv|experts_\w+)\.h|mla_merge",
        r"-> for \(int r = 0; r <= ROWS",
        "one past an array of structs, whose address clang's check lets be formed; nobody reads it",
    ),
    (
        r"quants",
        r"-> inline Raw load_own\(Super(Min)?<CODE, 0>",
        "then `load` does it, which asks for scales that nobody uses; test_kernels_traffic.py sees that",
    ),
    (r"quants", r"-> .*own, 1\.0f\);", "a chunk without minima has no use for it"),
    (r"mla_merge", r"-> .*, 1, lane\);", "1 / 32 is 0"),
    (r"quants", r"LANES == 32\) \{ ->", "the other branch gives the same sum"),
    (r"experts_gate_up\.h", r"-> .*i <= PER_LANE", "experts past the last are not left"),
    (r"experts_gate_up\.h", r"-> .*: 0xfffffffeu", "still more than any expert"),
    (r"experts_gate_up", r"-> .*\(total - 1e-20f\)", "1e-20 shows only in a sum of 0"),
    (
        r"experts_gate_up",
        r"-> if \(HAS_BIAS && (0u <|expert <=)",
        "the choice of an expert that is none is overwritten",
    ),
    (r"experts_gate_up", r"-> .*isinf\(choice\)", "a NaN of x86 has its sign set, and comes last anyhow"),
    (r"experts_gate_up", r"-> .*choice\) : 1u;|-> .*\? 1u : left", "still less than any choice"),
    (r"experts_gate_up", r"-> uint expert = 1;", "overwritten in the first round"),
    (r"experts_gate_up", r"-> if \(writes \|\| uint\(0\) <= slot", "rounds that the slot does not need"),
    (r"expand", r"-> uint4 words = uint4\(1u\);", "each of the four is overwritten"),
    # mla_merge
    (r"mla_merge", r"GROUPS = .* -> .*2 \+ FOURS", "one group either way: a half is not reached"),
    (r"mla_merge", r"AT_ONCE = .* ->", "splits past the last are checked one by one, however many at once"),
    (r"mla_merge", r"-> .*float2\(-INFINITY, 1\.0f\)", "its factor is exp2(-INFINITY), 0"),
    (r"mla_merge", r"-> for \(int i = 0; i <= PER_LANE", _CHECKED),
    (
        r"mla_merge",
        r"-> const uint group = 0 == 1",
        "with one group, threads past the latent: what they add up is not written",
    ),
    (
        r"mla_merge",
        r"-> .*min\(four, uint\((0 - 1|FOURS \+ 1)\)\)",
        "a load of a thread past the latent, which clang drops",
    ),
    # mla_decode
    (
        r"mla_decode\.h",
        r"-> return (1 % 64 == 0|DIMENSIONS % 64 == 1)",
        "each pair is checked, also where all are held",
    ),
    (r"mla_decode\.h", r"-> VALUES = \(LATENT \+ 64\)|-> PAIRS = VALUES \+ \(ROPE \+ 64\)", _CHECKED),
    (
        r"mla_decode\.h",
        r"-> .*holds<(LATENT \+ )?ROPE>\(0, ",
        "asked of no pair past the last, where the number counts",
    ),
    (r"mla_decode\.h", r"-> for \(int p = 0; p <= (rows\.|R::)PAIRS", _PAST),
    (r"mla_decode\.h", r"-> .*\(LATENT \+ ROPE\) % 64 == 1", "the bound is taken also where no lane is past it"),
    (
        r"mla_decode\.h",
        r"-> for \(int i = 4; i <= rows\.SCALE_AT",
        "the scale's word, which is written after, or a pair past k_pe",
    ),
    (r"mla_decode\.h", r"-> if \(lane % 2 (!= 0|== 1)\)", "of two lanes with the same scale either may write it"),
    (r"mla_decode\.h", r"-> return a > b \|\| isnan", "of two equal values either; none is negative"),
    (r"mla_decode\.h", r"-> .*127\.0f\), 1\.0f\)", "the upper half of the scale's word, which nobody reads"),
    (r"mla_decode\.h", r"-> pack\(rows, values, 0u, words\)", "`pack` does not use the lane"),
    (
        r"mla_decode\.metal",
        r"-> if \(next \+ uint\(ROWS_AT_ONCE\) (< min\(end, cached|<= min\((0u, cached|end, 0u))\)",
        "the other branch loads the same rows, each checked",
    ),
    (r"mla_decode\.metal", r"-> for \(int p = 0; p <= VALUES", _CHECKED),
    (r"mla_(decode|matrix)\.metal", r"-> .*float4\(.*, (1\.0f, 0\.0f|0\.0f, 1\.0f)\);", _PADDING),
    # mla_matrix
    (r"mla_matrix\.h", r"-> for \(int k = 0; k <= (LATENT|ROPE)_TILES", _PAST),
    (r"mla_matrix", r"-> .*: 1u;", _NO_DIMENSION + " or not: 1u is too little to count, and its weight is 0"),
    (r"mla_matrix\.metal", r"-> constexpr int ROWS = 33", "33 / 8 is 32 / 8"),
    (
        r"mla_matrix\.metal",
        r"tiles_of_split = .* -> .*- 2\) \* ",
        "larger shares: some splits have no rows, as before",
    ),
    (r"mla_matrix\.metal", r"-> .*split == splits - 2", "another split takes the tail, after its own rows"),
    (r"mla_matrix\.metal", r"-> .*numbers\.thread_elements\(\)\)\.y", "the neighbour, with the same row and pair"),
    (
        r"mla_matrix\.metal",
        r"-> for \(int i = 0; i (<= \(|< .*(\* 8 \+|\* 2 \+ THREADS - 1|\+ THREADS \+ 1))",
        "heads past the last, which are checked one by one",
    ),
    (r"mla_matrix\.metal", r"-> .*THREADS - 2\) / THREADS", "heads and dimensions are whole eights: one is never left"),
    (r"mla_matrix\.metal", r"-> for \(int k = 0; k <= DIMENSION_TILES", _PAST),
    (
        r"mla_matrix\.metal",
        r"-> (total\[j\] = 1|sums\[t\]\[k\] = .*\(1)\.0f",
        "multiplied by exp2(-INFINITY), 0, before it is used",
    ),
    (r"mla_matrix\.metal", r"-> if \(0u < blocks\)", "the split with the tail has no other rows"),
    (
        r"mla_matrix\.metal",
        r"^threadgroup_barrier\(mem_flags::mem_threadgroup\); ->",
        "the split with the tail has no other rows: nothing was read since the barrier before",
    ),
    (r"mla_matrix\.metal", r"-> for \(int i = 0; i <= CachedRows::WORDS", _CHECKED),
    (r"mla_matrix\.metal", r"-> .*pair <= uint\(LATENT / 2\)", "a whole share is before it: it stays in its place"),
    (
        r"mla_matrix\.metal",
        r"-> (Sums upper = .*\(1|float score = 1)\.0f",
        "softmax does not change when all scores grow alike",
    ),
    (r"mla_matrix\.metal", r"-> if \(simd_any\(two\.y|-> pair\.(x \*= two\.y|y \*= two\.x)", _TWO),
    (r"mla_matrix\.metal", r"-> if \(simd_any\(two\.x != 2", "scaled down by 1"),
    (
        r"mla_matrix\.metal",
        r"-> (for \(int t = 0; t \+ 1 < TILES; t (= 2|\+= 3)|multiply_two\(.*(sums|weight)\[0\])",
        _PAIR_OF_HEADS,
    ),
]

# --- mutants


@dataclass(frozen=True)
class Mutant:
    file: str
    line: int  # from 1
    before: str  # the line, stripped
    after: str
    text: str = ""  # the whole file

    def __str__(self) -> str:
        return f"{self.file}:{self.line} `{self.before}` -> `{self.after}`"


_TOKEN = re.compile(
    r"//[^\n]*"
    r"|(?P<float>\d+\.\d*(?:[eE][+-]?\d+)?f|\d+[eE][+-]?\d+f)"
    r"|(?P<int>0[xX][0-9a-fA-F]+u?|\d+u?)\b"
    r"|(?P<word>[A-Za-z_]\w*)"
    r"|(?P<operator>(?<= )(?:<<|>>|<=|>=|==|!=|&&|\|\||\+=|-=|\*=|/=|\|=|[-+*/%<>&|])(?=[ \n])"
    r"|(?<=[\[( ])[-!](?=[\w(]))"
    r"|\S"
)
_OPERATORS = {
    "+": ["-"],
    "-": ["+"],
    "*": ["+"],
    "/": ["*"],
    "%": ["/"],
    "<<": [">>"],
    ">>": ["<<"],
    "&": ["|"],
    "|": ["&"],
    "&&": ["||"],
    "||": ["&&"],
    "<": ["<="],
    ">": [">="],
    "<=": ["<"],
    ">=": [">"],
    "==": ["!="],
    "!=": ["=="],
    "+=": ["="],
    "-=": ["+="],
    "*=": ["="],
    "/=": ["="],
    "|=": ["="],
}
_UNARY = {"-": [""], "!": [""]}
_WORDS = {
    "min": ["max"],
    "max": ["min"],
    "simd_sum": ["simd_max"],
    "simd_max": ["simd_min"],
    "simd_min": ["simd_max"],
    "simd_any": ["simd_all"],
    "exp": ["exp2"],
    "exp2": ["exp"],
    "rsqrt": ["sqrt"],
    "isnan": ["isinf"],
    "true": ["false"],
    "false": ["true"],
    "INFINITY": ["0.0f"],
    "threadgroup_barrier": ["simdgroup_barrier", "(void)mem_flags"],
    "mem_threadgroup": ["mem_none"],
    "ifdef": ["ifndef"],
    "x": ["y"],
    "y": ["x"],
    "z": ["y"],
}


# Beginnings of lines; a shared array that is longer than it need be is no fault, and a shorter one is another mutant's.
_SKIPPED = ("#pragma", "#ifndef", "#define H", "#endif", "template", "threadgroup float")


def mutants_of(file: str, text: str) -> Iterator[Mutant]:
    """Every mutant of a file, in the order of its text."""
    # Names of whole numbers that are variables, and (in capitals) those that templates and launches set.
    variables = set(re.findall(r"\b(?:uint|int|ushort)\s+(\w+)\s*[=,;)]", text)) - {"ROWS"}
    for match in _TOKEN.finditer(text):
        start, end = match.span()
        line_start = text.rfind("\n", 0, start) + 1
        line = text[line_start : text.find("\n", end)]
        if line.startswith(_SKIPPED) or match[0].startswith("//"):
            continue
        for new in _replacements(match, text, variables):
            whole = text[:start] + new + text[end:]
            after = whole[line_start : whole.find("\n", start + len(new))]
            yield Mutant(file, text.count("\n", 0, start) + 1, line.strip(), after.strip(), whole)


def _replacements(match: re.Match[str], text: str, variables: set[str]) -> Sequence[str]:
    token, start, end = match[0], *match.span()
    if match["operator"]:
        unary = token in _UNARY and text[end] != " "
        return _UNARY[token] if unary else _OPERATORS.get(token, [])
    if match["float"]:
        if text[:start].endswith(("T(", "STORED(", "float16_t(")):
            return []  # chooses an overload
        return ["1.0f"] if float(token[:-1]) == 0 else [f"{float(token[:-1]) + 1!r}f"]
    before, behind = text[:start].rstrip(), text[end:].lstrip()
    if match["int"]:
        digits = token.rstrip("u")
        suffix, value = token[len(digits) :], int(digits, 0)
        if re.search(r"(?:\blane(?: % uint\(\w+\))? ==|decltype\([^;\n]*)$", before):
            return []  # lanes that have the same value, of which any may write it; a type
        # One more, but for the length of an array, where that would be no fault.
        is_length = before.endswith("[") and re.match(r"\](?:\[[^]]*\])*;", behind)
        changed = value - 1 if is_length or value + 1 == 1 << 32 else value + 1
        return [(hex(changed) if digits.startswith("0x") else str(changed)) + suffix]
    if not match["word"]:
        return []
    if token in _WORDS:
        component = token in "xyz"
        return _WORDS[token] if component == (before.endswith(".") and not behind.startswith("(")) else []
    declared = re.search(r"\b(?:uint|int|ushort|float|auto|bool|Eight|Raw|W|T)\s*\*?$", before)
    if declared or before.endswith((".", "++")) or re.match(r"=(?!=)|[-+*/|]=|\+\+|\(|<\w|::", behind):
        return []
    if token in variables:
        return ["0u" if re.search(rf"\buint\s+{token}\b", text) else "0"]
    # Any DEPTH computes the same.
    if re.fullmatch(r"(?!DEPTH)[A-Z][A-Z_]+", token) and not before.endswith(("class", "int", "#ifdef", "#define")):
        return ["1"]
    return []


# --- workers


class Call:
    """A test as a case."""

    def __init__(self, test: Callable[..., None], *arguments: Any) -> None:
        self.test, self.arguments = test, arguments

    def __str__(self) -> str:
        return f"{self.test.__name__} {' '.join(map(str, self.arguments))}"


def cases() -> list[Any]:
    """A small part of the table: every type, dtype and path of the texts, in small launches of several rounds."""
    import mlx.core as mx

    from parity_tests import (
        test_kernels_expand,
        test_kernels_launch,
        test_kernels_mla,
        test_kernels_route,
        test_kernels_traffic,
    )
    from parity_tests.kernel_cases import KINDS, Down, Embed, Expand, GateUp, HeadQmv, Mla, Qmv, Route, block

    half, brain = mx.float16, mx.bfloat16
    return [
        *(Qmv((kind,), (11,), {1: 1000, 32: 992, 256: 1024}[block(kind)], tokens=2) for kind in KINDS),
        *(Qmv((kind,), (9,), 1280) for kind in ("Q4_K", "Q5_K", "Q6_K", "Q5_0")),
        Qmv(("Q4_0", "Q8_0"), (67, 13), 96, norm=True, tokens=3),
        Qmv(("Q5_1",), (35,), 288, norm=True, residual=True, tokens=2),
        Qmv(("Q4_0",), (19,), 1024, dtype=brain, residual=True, tokens=2),
        Qmv(("Q4_1",), (19,), 1024, dtype=half, tokens=2),
        Qmv(("F32",), (12,), 520, normed_too=True, tokens=2),
        Qmv(("Q8_0",), (70,), 64, normed_too=True, tokens=2),
        Qmv(("F32",), (9,), 64, normed_too=True),
        Qmv(("Q4_0",), (8,), 1056),
        Qmv(("Q4_0",), (8,), 544, tokens=2),
        HeadQmv("Q5_0", 3, 35, 192, tokens=2),
        HeadQmv("Q4_0", 3, 9, 512, tokens=2, merges=True),
        GateUp("Q4_0", 35, 2, 11, 992, "Q5_1", 18, tokens=2),
        GateUp("Q4_0", 8, 2, 8, 1056, "Q4_0", 8),
        GateUp("Q8_0", 9, 3, 8, 1024, tokens=2),
        GateUp("F16", 8, 4, 9, 288, "Q5_0", 18, tokens=1),
        Down("Q4_0", 6, 4, 992, 9, "Q5_1", 1984, tokens=2),
        Down("Q4_0", 3, 2, 1056, 8, "Q4_0", 1056),
        Down("Q8_0", 6, 3, 1024, 8, residual=False, ids="outside", tokens=2),
        Down("Q4_K", 6, 2, 256, 9, "Q6_K", 256, tokens=1),
        Route(48, 4, tokens=3),
        Route(160, 6, "softmax", False, None, tokens=2),
        Route(200, 1, "softmax", bias=None, logits="far", tokens=2),
        Route(256, 8, "softmax", logits="ties", tokens=3),
        Route(64, 7, logits="ties", bias=None, tokens=3),
        Route(8, 8, bias=-4.0, tokens=2),
        Route(64, 4, bias=-4.0, logits="nan", tokens=3),
        Route(48, 4, bias=None, logits="nan", tokens=3),
        Mla(5, 70, tokens=3),
        Mla(3, 150, 96, 34, tokens=2, dtype=half),
        Mla(4, 45, 128, 64, dtype=brain),
        Mla(5, 7, 136, 62, tokens=2, room=2100),
        Mla(5, 70, 96, 34, tokens=3, packed=True),
        Mla(2, 37, 512, 72, dtype=half, packed=True),
        Mla(1, 2050, 32, 32, room=0),
        Mla(2, 20, 96, 64),  # rows that end within the pairs of a lane, and k_pe that does not
        Mla(1, 9, 32, 16),
        Mla(4, 40, before=24, tokens=2),
        Mla(2, 20, 480, 66, dtype=half, tokens=2, packed=True),
        Mla(3, 20, 64, 14, tokens=2, packed=True),  # the next row stands right behind the scales
        Mla(3, 20, 32, 6, tokens=2, packed=True),
        # By matrices: of heads one, two and three, of latents one to nine in a simdgroup; two splits, three and six.
        Mla(17, 31, 64, 8, tokens=2, dtype=brain, room=2048),
        Mla(9, 45, 64, 72, tokens=3, dtype=brain, room=2048),
        Mla(9, 245, 64, 72, tokens=4, dtype=half, room=2048, before=24),
        Mla(8, 65, 512, 8, dtype=half, room=2048),
        Mla(3, 22, 320, 8, tokens=8, dtype=brain, room=2048),
        Mla(12, 150, 576, 16, tokens=2, dtype=brain, room=16384),
        Mla(17, 300, 128, 8, dtype=half, room=16384),
        Mla(2, 33, 264, 16, tokens=2, kind="F32", values=33),
        Mla(1, 9, 272, 16, kind="F32", values=9),
        Mla(1, 9, 456, 8, kind="F16", values=9),
        Mla(1, 9, 256, 8, kind="Q5_K", values=9),
        Mla(1, 9, 256, 8, kind="Q6_K", values=9),
        Mla(3, 20, 96, 16, kind="Q8_0", values=31, dtype=brain),
        Mla(2, 620, 256, 64, room=640),  # splits in two turns
        Embed("Q4_K", 17, 512, tokens=3),
        Embed("Q5_K", 17, 512, tokens=3),
        Embed("Q6_K", 17, 512, tokens=3),
        Embed("F16", 9, 1032, tokens=4, outside=True),
        Embed("F32", 9, 520, tokens=2),
        Embed("Q4_1", 16, 64, tokens=2, dtype=half),
        Expand("Q4_K", (17, 256)),
        Expand("Q6_K", (18, 256), half),
        Expand("Q5_1", (3, 7, 256)),
        Expand("Q8_0", (24, 64)),
        Call(test_kernels_expand.test_a_tile_has_the_values_of_its_expert, "Q4_1", [4, 1, 1, 3, 4, 3, 1, 4, 4]),
        Call(test_kernels_expand.test_a_tile_of_no_expert_is_left_as_it_is),
        *(Call(test_kernels_mla.test_one_row_that_wins_is_the_result, *at) for at in test_kernels_mla.FAR),
        *(
            Call(test_kernels_mla.test_the_best_of_scores_far_below_zero_is_the_result, *at)
            for at in test_kernels_mla.FAR
        ),
        Call(test_kernels_route.test_neighbouring_floats_are_told_apart),
        *(
            Call(test_kernels_mla.test_heads_do_not_share_a_largest_score, *at)
            for at in [(mx.float32, 1e-5, 5), (brain, 2**-8, 5), (brain, 2**-8, 17)]
        ),
        Call(test_kernels_mla.test_rows_are_written_in_place_and_nothing_else_is, Mla(4, 37, tokens=2)),
        Call(
            test_kernels_mla.test_rows_are_written_in_place_and_nothing_else_is,
            Mla(4, 37, tokens=2, dtype=half, room=2048),
        ),
        Call(test_kernels_mla.test_new_rows_in_8_bits_are_those_of_the_twin, 5, (96, 10), brain),
        Call(test_kernels_mla.test_new_rows_in_8_bits_are_those_of_the_twin, 5, (512, 64), half),
        Call(test_kernels_mla.test_what_is_not_finite_in_8_bits_stays_with_the_queries_that_see_it, float("inf")),
        Call(test_kernels_launch.test_any_launch_shape_computes_the_same, Mla(2, 20), {"MERGE_SIMDGROUPS": 1}),
        *(
            Call(test_kernels_launch.test_any_launch_shape_computes_the_same, *s)
            for s in [*test_kernels_launch.SHAPES[-5:], *test_kernels_launch.TURNS]
        ),
        *(Call(test_kernels_traffic.test_every_quant_is_loaded_once, case) for case in test_kernels_traffic.RAGGED),
        *(Call(test_kernels_traffic.test_attention_does_nothing_twice, *case) for case in test_kernels_traffic.ONCE),
    ]


def work(connection: Connection, cache: str) -> None:
    """Takes mutants until None, and answers each with what became of it and how."""
    os.environ["XDG_CACHE_HOME"] = cache
    worker = Worker()
    connection.send("ready")
    while (mutant := connection.recv()) is not None:
        connection.send(worker.judge(mutant))


class Worker:
    def __init__(self) -> None:
        import mlx.core as mx

        from kernels import launcher
        from parity_tests.kernel_cases import verify
        from parity_tests.msl import KernelError, compiler

        mx.set_default_device(mx.cpu)
        self.launcher, self.verify, self.KernelError = launcher, verify, KernelError
        self.texts = Path(tempfile.mkdtemp(dir=os.environ["XDG_CACHE_HOME"]))
        for file in (*TEXTS.glob("*.metal"), *TEXTS.glob("*.h")):
            shutil.copy(file, self.texts)
        launcher.HERE = self.texts
        for op, shape in SHAPES.items():
            for name, value in shape.items():
                assert hasattr(module(op), name), f"kernels/{op}.py has no {name}"
                setattr(module(op), name, value)
        self.cases = cases()
        self.lines = []  # of each case: (file, line) that it has code of
        for case in self.cases:
            with mock.patch.object(compiler, "type_check", Spy(compiler.type_check)) as spy:
                self.run(case)
            self.lines.append({place for llvm in spy.made for place in places(llvm)})
        self.kept = set(compiler.cache_folder().iterdir())
        self.cache = compiler.cache_folder()

    def run(self, case: Any) -> None:
        self.launcher._text.cache_clear()
        for op in (*self.launcher.OPS, *self.launcher.PROMPT_OPS):
            for name in ("_launch", "_launches"):
                if hasattr(module(op), name):
                    getattr(module(op), name).cache_clear()
        if isinstance(case, Call):
            case.test(*map(fresh, case.arguments))
        else:
            self.verify(fresh(case))

    def judge(self, mutant: Mutant) -> tuple[str, str]:
        # Beside the line, as clang makes no code of a condition that is known to be false.
        places = {(mutant.file, line) for line in range(mutant.line - 2, mutant.line + 3)}
        covered = [(case, lines) for case, lines in zip(self.cases, self.lines, strict=True) if lines & places]
        covered.sort(key=lambda entry: (mutant.file, mutant.line) not in entry[1])
        target = self.texts / mutant.file
        good = target.read_text()
        target.write_text(mutant.text)
        try:
            # A line without code of its own, such as a macro or a declaration: any case that has the file.
            for case, _ in covered or [
                (case, lines)
                for case, lines in zip(self.cases, self.lines, strict=True)
                if any(file == mutant.file for file, _ in lines)
            ]:
                if outcome := self.fails(case):
                    return outcome, str(case)
            return "survived", ""
        finally:
            target.write_text(good)
            for file in set(self.cache.iterdir()) - self.kept:
                file.unlink(missing_ok=True)

    def fails(self, case: Any) -> str:
        try:
            self.run(case)
        except self.KernelError as error:
            return "executor" if re.search(r"\(\w+ order\)$|gives other bits", str(error)) else "refused"
        except AssertionError:
            return "values"
        return ""


def fresh(case: Any) -> Any:
    """With a cache of its own: an earlier run has left the new rows in that of the case."""
    return replace(case) if getattr(case, "op", "") == "mla_decode" else case


def module(op: str) -> Any:
    return importlib.import_module(f"kernels.{op}")


class Spy:
    """A function that remembers what it gave."""

    def __init__(self, function: Any) -> None:
        self.function, self.made = function, []

    def __call__(self, *arguments: Any) -> Any:
        self.made.append(self.function(*arguments))
        return self.made[-1]


def places(llvm: Path) -> Iterator[tuple[str, int]]:
    """(file, line) of every instruction that clang made of a kernel's text."""
    text = llvm.read_text()
    names = dict(re.findall(r'^!(\d+) = !DIFile\(filename: "([^"]*)"', text, re.M))
    scopes = dict(re.findall(r"^!(\d+) = (?:distinct )?!DI(?:Subprogram|LexicalBlock\w*)\(.*?file: !(\d+)", text, re.M))
    shared = (TEXTS / "quants.h.metal").read_text().count("\n")
    for line, scope in re.findall(r"= (?:distinct )?!DILocation\(line: (\d+),.*?scope: !(\d+)", text):
        name = names.get(scopes.get(scope, ""), "")
        op = re.sub(r"_[0-9a-f]{12}\..*", "", name)
        if name.endswith(".h.metal"):  # the launcher puts the shared text before the op's own
            own = int(line) > shared
            yield (f"{op}.h.metal", int(line) - shared) if own else ("quants.h.metal", int(line))
        elif name.endswith(".metal"):
            yield f"{op}.metal", int(line)


# --- the run


class Slot:
    """A worker process, started anew when it hangs, dies or has lived long enough."""

    def __init__(self, cache: Path) -> None:
        self.cache = cache
        cache.mkdir()
        self.start()

    def start(self) -> None:
        context = multiprocessing.get_context("spawn")
        self.connection, theirs = context.Pipe()
        self.process = context.Process(target=work, args=(theirs, str(self.cache)), daemon=True)
        self.process.start()
        theirs.close()
        self.judged = 0
        if self.answer() != "ready":
            raise SystemExit("error: without a fault the cases do not pass; run pytest parity_tests/test_kernels_*.py")

    def judge(self, mutant: Mutant) -> tuple[str, str]:
        if self.judged == LIFE:
            self.stop()
            self.start()
        self.judged += 1
        self.connection.send(mutant)
        answer = self.answer()
        if isinstance(answer, tuple):
            return answer
        self.stop()
        self.start()
        return "crash", answer

    def answer(self) -> Any:
        try:
            return self.connection.recv() if self.connection.poll(PATIENCE) else "hangs"
        except EOFError:
            return "dies"

    def stop(self) -> None:
        self.process.kill()
        self.process.join()


def judge_all(mutants: Sequence[Mutant], processes: int) -> list[tuple[str, str]]:
    """What became of each: 'refused', 'executor', 'values', 'crash' or 'survived'; and the case that saw it."""
    outcomes: list[tuple[str, str]] = [("", "")] * len(mutants)
    left = iter(range(len(mutants)))
    lock = threading.Lock()
    with tempfile.TemporaryDirectory() as folder, Progress() as progress:
        task = progress.add_task("mutants", total=len(mutants))

        def serve(number: int) -> None:
            slot = Slot(Path(folder) / str(number))
            try:
                while True:
                    with lock:
                        at = next(left, None)
                    if at is None:
                        return
                    outcomes[at] = slot.judge(mutants[at])
                    progress.advance(task)
            finally:
                slot.stop()

        with ThreadPoolExecutor(processes) as pool:
            for done in [pool.submit(serve, n) for n in range(processes)]:
                done.result()
    return outcomes


def reason(mutant: Mutant) -> str:
    change = f"{mutant.before} -> {mutant.after}"
    return next(
        (why for file, pattern, why in REASONS if re.match(file, mutant.file) and re.search(pattern, change)), ""
    )


COLUMNS = ("refused", "executor", "values", "crash", "survived")


@dataclass
class Result:
    """What mutate.md says. head: a line of each run. rows: by file, as many as COLUMNS."""

    head: list[str]
    rows: dict[str, list[int]]
    survivors: list[Mutant]

    @classmethod
    def read(cls, text: str) -> "Result":
        head, body = text.split("\n\n| text", 1)
        rows = re.findall(r"^\| (\S+\.metal) \| \d+ ((?:\| \d+ )+)\|", body, re.M)
        survivors = re.findall(r"^- (\S+):(\d+) `(.*)` -> `(.*)`: ", body, re.M)
        return cls(
            head.split("\n\n")[1:],
            {file: [int(n) for n in row.split("|")[1:]] for file, row in rows},
            [Mutant(file, int(line), before, after) for file, line, before, after in survivors],
        )

    def replace(self, mutants: Sequence[Mutant], outcomes: Sequence[tuple[str, str]], whole_files: bool) -> None:
        """With what became of the mutants, which are all of their files or some that had survived."""
        again = {str(m) for m in mutants}
        files = {m.file for m in mutants}
        self.survivors = [m for m in self.survivors if str(m) not in again and not (whole_files and m.file in files)]
        self.survivors += [m for m, (o, _) in zip(mutants, outcomes, strict=True) if o == "survived"]
        self.survivors.sort(key=lambda m: (m.file, m.line))
        for file in files:
            counts = Counter(o for m, (o, _) in zip(mutants, outcomes, strict=True) if m.file == file)
            seen = [0] * 4 if whole_files else self.rows[file][:4]
            self.rows[file] = [
                *(n + counts[column] for n, column in zip(seen, COLUMNS, strict=False)),
                sum(m.file == file for m in self.survivors),
            ]

    @property
    def all(self) -> list[int]:
        return [sum(column) for column in zip(*self.rows.values(), strict=True)]

    def __str__(self) -> str:
        lines = ["# Faults planted in the kernels' texts", ""]
        for line in self.head:
            lines += [line, ""]
        lines += [
            "| text | one-token mutants | refused by clang or lint | stopped by the executor | wrong values "
            "| crash or hang | survived | caught of those that compile |",
            "|---|---:|---:|---:|---:|---:|---:|---:|",
        ]
        for file, row in [*sorted(self.rows.items()), ("all", self.all)]:
            lines.append(f"| {file} | {sum(row)} | {' | '.join(map(str, row))} | {caught(row):.1%} |")
        lines += ["", "## What survived", "", *(f"- {m}: {reason(m) or 'NOT EXPLAINED'}" for m in self.survivors)]
        return "\n".join(lines) + "\n"


def caught(row: Sequence[int]) -> float:
    _, *seen, survived = row
    return sum(seen) / max(1, sum(seen) + survived)


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m parity_tests.mutate", description=__doc__.splitlines()[0])
    parser.add_argument("--processes", type=int, default=2, metavar="N")
    parser.add_argument(
        "--only",
        action="append",
        default=[],
        metavar="FILE",
        help="mutants of this text, and of others that are named so too; of all else what was found stays",
    )
    parser.add_argument(
        "--unexplained",
        action="store_true",
        help="only what survived without a reason, where cases were added; what was caught stays counted so",
    )
    args = parser.parse_args()
    files = sorted(TEXTS.glob("*.metal"))
    if unknown := set(args.only) - {file.name for file in files}:
        parser.error(f"--only {' '.join(sorted(unknown))}: no text of kernels/")
    if args.processes < 1:
        parser.error("--processes must be 1 or more")
    mutants = [m for f in files if f.name in (args.only or [f.name]) for m in mutants_of(f.name, f.read_text())]
    digest = hashlib.sha256(b"".join(f.read_bytes() for f in files)).hexdigest()[:12]
    result = Result([], {}, [])
    if args.only or args.unexplained:
        before = RESULT.read_text()
        if f"texts `{digest}`" not in before:
            raise SystemExit(f"error: {RESULT.relative_to(HERE.parent)} is of other texts; a whole run is needed")
        result = Result.read(before)
    if args.unexplained:
        wanted = {str(m) for m in result.survivors if not reason(m)}
        mutants = [m for m in mutants if str(m) in wanted]
    if mutants:
        start = time.monotonic()
        outcomes = judge_all(mutants, args.processes)
        result.replace(mutants, outcomes, whole_files=not args.unexplained)
        command = ["python -m parity_tests.mutate", *["--unexplained"] * args.unexplained]
        command += [f"--only {file}" for file in args.only]
        result.head.append(
            f"`{' '.join(command)}`: {len(mutants):,} mutants, {args.processes} processes, "
            f"{(time.monotonic() - start) / 60:.0f} minutes, MLX {version('mlx')}; texts `{digest}`."
            + " What was caught before is counted as it was."
            * args.unexplained
        )
    RESULT.write_text(str(result))
    unexplained = sum(not reason(m) for m in result.survivors)
    print(f"wrote {RESULT.relative_to(HERE.parent)}")
    print(f"{caught(result.all):.2%} of {sum(result.all[1:]):,} caught; {unexplained} survivors without a reason")
    return int(unexplained > 0 or caught(result.all) < LEAST)


if __name__ == "__main__":
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        sys.exit(130)
