"""Whatever is given as a model: it runs, or one line says what is wrong with it, and nothing else happens.

In process the only exception is InputError, found before any weights are read; on the command line the exit code is 2.
"""

import math
import os
import random
import re
import socket
import struct
import subprocess
import sys
import time
import tracemalloc
from collections.abc import Callable, Iterator, Mapping
from contextlib import nullcontext
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, TypeVar

import mlx.core as mx
import pytest
from gguf.constants import GGMLQuantizationType

from glm_mlx import command, gguf, make_tiny, memory, weights
from glm_mlx.config import Config
from glm_mlx.engine import PREFILL_CHUNK, Engine
from glm_mlx.errors import InputError
from glm_mlx.gguf import MAX_HEADER, GGUFFile
from glm_mlx.load import Loaded, load_model, open_model
from glm_mlx.make_tiny import TinySpec
from glm_mlx.memory import plan_memory
from glm_mlx.model import Model
from glm_mlx.sampling import SamplingParams
from glm_mlx.tokenizer import Tokenizer
from kernels.planes import QUANT_TYPES
from parity_tests import check_file
from parity_tests.fuzz import (
    ARRAY,
    BOOL,
    F32,
    F64,
    I32,
    SMALL,
    SPECS,
    STRING,
    U8,
    U16,
    U32,
    U64,
    File,
    Tensor,
    array,
    changed,
    damaged_header,
    make_small,
    string,
    time_limit,
    value,
)
from reference.config import read_config
from reference.gguf_file import GgufFile

LIMIT = 5.0  # seconds for one file; the slowest takes 0.1 on a busy core
KEY = "deepseek2."
Make = Callable[[str], File]
T = TypeVar("T")


@pytest.fixture(scope="session")
def good(tmp_path_factory: pytest.TempPathFactory) -> Make:
    """A function from a name in SPECS to that file in parts, a fresh copy each time."""
    folder = tmp_path_factory.mktemp("good")
    files: dict[str, File] = {}

    def make(name: str) -> File:
        if name not in files:
            files[name] = File.read(make_small(folder / f"{name}.gguf", SPECS[name]))
        return files[name].copy()

    return make


def checked(error: InputError) -> str:
    """The text of an error, which is one printable line: what is wrong, a semicolon, what to do."""
    message = str(error)
    assert message.isprintable(), ascii(message)
    assert "; " in message
    assert len(message) < 5000
    return message


def attempt(action: Callable[[], T]) -> T | str:
    """What an action gives, or the text with which it refuses."""
    with time_limit(LIMIT):
        try:
            return action()
        except InputError as error:
            return checked(error)


def open_or_refuse(path: Path) -> Loaded | str:
    return attempt(lambda: load_model(path))


def refusal(path: Path) -> str:
    outcome = open_or_refuse(path)
    assert isinstance(outcome, str), f"{path} was opened"
    return outcome


def generate_two(loaded: Loaded) -> None:
    """Two tokens after three: every array of the model is used. It may say that a context is too short, or that random
    bytes read as weights came to no numbers.
    """
    steps = attempt(lambda: list(Engine(loaded.model).generate([1, 2, 3], SamplingParams(temperature=0.0), 2)))
    said = ("the model's context", "the model's logits are not numbers")
    assert any(text in steps for text in said) if isinstance(steps, str) else 1 <= len(steps) <= 2


# What is no model at all


def nothing(folder: Path, file: File) -> Path:
    return folder / "absent.gguf"


def a_folder(folder: Path, file: File) -> Path:
    return folder


def below_a_file(folder: Path, file: File) -> Path:
    return file.write(folder / "file.gguf") / "model.gguf"


def a_name_too_long(folder: Path, file: File) -> Path:
    return folder / ("x" * 300)


def a_null_character(folder: Path, file: File) -> Path:
    return folder / "a\0b.gguf"


def a_link_to_itself(folder: Path, file: File) -> Path:
    link = folder / "link.gguf"
    link.symlink_to(link)
    return link


def a_pipe(folder: Path, file: File) -> Path:
    os.mkfifo(folder / "pipe.gguf")
    return folder / "pipe.gguf"


def a_socket(folder: Path, file: File) -> Path:
    before = Path.cwd()
    os.chdir(folder)  # the address of a socket holds a hundred characters, less than pytest's folders need
    try:
        with socket.socket(socket.AF_UNIX) as server:
            server.bind("socket.gguf")
    finally:
        os.chdir(before)
    return folder / "socket.gguf"


def two_lines(folder: Path, file: File) -> Path:
    return folder / "two\nlines\x1b[31m\u2028.gguf"


def bytes_of(content: bytes) -> Callable[[Path, File], Path]:
    def write(folder: Path, file: File) -> Path:
        path = folder / "file.gguf"
        path.write_bytes(content)
        return path

    return write


def with_start(magic: bytes = b"GGUF", version: bytes = struct.pack("<I", 3)) -> Callable[[Path, File], Path]:
    def write(folder: Path, file: File) -> Path:
        file.magic, file.version = magic, version
        return file.write(folder / "file.gguf")

    return write


NO_MODEL = {
    "no such file": (nothing, "no such file: "),
    "a folder": (a_folder, "is a folder; give the .gguf file in it"),
    "a path below a file": (below_a_file, "Not a directory"),
    "a name too long": (a_name_too_long, "name too long"),
    "a null character in the path": (a_null_character, "embedded null"),
    "a link to itself": (a_link_to_itself, "symbolic links"),
    "a pipe that nobody writes to": (a_pipe, "is a pipe or a device"),
    "a socket": (a_socket, "is a pipe or a device"),
    "/dev/null": (lambda folder, file: Path(os.devnull), "is a pipe or a device"),
    "/dev/zero": (lambda folder, file: Path("/dev/zero"), "is a pipe or a device"),
    "two lines in the path": (two_lines, r"no such file: .*/two\nlines\x1b[31m\u2028.gguf"),
    "an empty file": (bytes_of(b""), "is empty"),
    "one byte": (bytes_of(b"G"), "is not a GGUF file: it begins with b'G'"),
    "only the magic": (bytes_of(b"GGUF"), "the version at byte 4 needs 4 bytes, 0 are left"),
    "text": (bytes_of(b"Once upon a time"), "is not a GGUF file: it begins with b'Once'"),
    "a page of an error": (bytes_of(b"<!DOCTYPE html>"), "is not a GGUF file: it begins with b'<!DO'"),
    "zeros": (bytes_of(bytes(4096)), r"is not a GGUF file: it begins with b'\x00\x00\x00\x00'"),
    "a pointer of git-LFS": (
        bytes_of(b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 16953\n"),
        "is a pointer of git-LFS, .*; run 'git lfs pull' there, or download the file itself",
    ),
    "GGML, the older format": (with_start(magic=b"ggjt"), "is not a GGUF file: it begins with b'ggjt'"),
    "version 0": (with_start(version=bytes(4)), "has GGUF version 0"),
    "version 1": (with_start(version=struct.pack("<I", 1)), "has GGUF version 1"),
    "version 4": (with_start(version=struct.pack("<I", 4)), "has GGUF version 4"),
    "big-endian": (with_start(version=struct.pack(">I", 3)), "is big-endian"),
}


@pytest.mark.parametrize("case", NO_MODEL)
def test_what_is_no_model_is_named_as_what_it_is(case: str, good: Make, tmp_path: Path) -> None:
    make, said = NO_MODEL[case]
    message = refusal(make(tmp_path, good("GLM")))
    assert all(part in message for part in said.split(".*"))


# What is cut off


def test_a_file_cut_anywhere_is_refused(good: Make, tmp_path: Path) -> None:
    """200 seeded places and both sides of every border. Only the padding behind the last tensor can go unseen."""
    file, path = good("GLM"), tmp_path / "cut.gguf"
    whole, last = file.whole(), max(file.tensors, key=lambda tensor: tensor.offset)
    header, data = len(file.header()), len(whole) - len(file.data)
    needed = data + last.offset + last.nbytes
    rng = random.Random(0)
    cuts = {rng.randrange(header) for _ in range(100)} | {rng.randrange(header, needed) for _ in range(100)}
    cuts |= {at + side for at, _ in file.spots() for side in (0, 1)} | set(range(33)) | {header - 1, header, data}
    cuts |= {data + tensor.offset + side for tensor in file.tensors for side in (-1, 0, 1)} | {needed - 1}
    assert len([cut for cut in cuts if cut < needed]) > 1000
    for cut in sorted(cuts):
        path.unlink(missing_ok=True)
        path.write_bytes(whole[:cut])
        message = refusal(path)
        assert any(word in message for word in ("is empty", "is not a GGUF", "ends inside its header", "truncated"))
    for cut in range(needed, len(whole) + 1):
        path.unlink(missing_ok=True)
        path.write_bytes(whole[:cut])
        assert isinstance(open_or_refuse(path), Loaded)


@pytest.mark.parametrize("left", [0.5, 0.0])
def test_a_file_that_shrinks_after_it_was_opened_is_one_line(left: float, good: Make, tmp_path: Path) -> None:
    """Shrink it as rsync --inplace does. Mapped, it would end the process with SIGBUS, here that of the tests."""
    path = good("GLM").write(tmp_path / "file.gguf")
    opened, size = open_model(path), path.stat().st_size
    os.truncate(path, int(left * size))
    said = attempt(opened.load)
    assert isinstance(said, str)
    assert f"{path} became shorter while it was read: it had {size:,} bytes, now it ends at " in said


def test_a_header_that_shrinks_while_it_is_read_is_one_line(
    good: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, key_values = good("GLM").write(tmp_path / "file.gguf"), gguf._key_values

    def shrink(*rest: Any) -> Iterator[tuple[str, Any]]:
        os.truncate(path, 100)
        return key_values(*rest)

    monkeypatch.setattr(gguf, "_key_values", shrink)
    monkeypatch.setattr(gguf, "PIECE", 64)
    assert "became shorter while it was read" in refusal(path)


# What the keys say

REQUIRED = [
    "general.architecture",
    KEY + "block_count",
    KEY + "context_length",
    KEY + "embedding_length",
    KEY + "feed_forward_length",
    KEY + "attention.head_count",
    KEY + "attention.kv_lora_rank",
    KEY + "attention.layer_norm_rms_epsilon",
    KEY + "rope.dimension_count",
    KEY + "expert_used_count",
    KEY + "expert_feed_forward_length",
    "tokenizer.ggml.model",
    "tokenizer.ggml.pre",
    "tokenizer.ggml.tokens",
    "tokenizer.ggml.token_type",
    "tokenizer.ggml.merges",
    "tokenizer.ggml.eos_token_id",
]
REQUIRED_IN_OLD_FILES = [  # they have no *_mla, and YaRN has a length of its own
    KEY + "attention.key_length",
    KEY + "attention.value_length",
    KEY + "rope.scaling.factor",
    KEY + "rope.scaling.original_context_length",
    KEY + "rope.scaling.yarn_log_multiplier",
]
SEEN_IN_THE_TENSORS = {  # these have a default, with which the tensors do not agree; the message names one of them
    KEY + "attention.q_lora_rank": r"attn_q\.weight",
    KEY + "attention.key_length_mla": r"attn_q_b\.weight",
    KEY + "attention.value_length_mla": r"attn_v_b\.weight",
    KEY + "expert_count": "expert_used_count",
    KEY + "expert_shared_count": "ffn_.*_shexp",
    KEY + "leading_dense_block_count": "ffn_gate_inp|ffn_.*_exps|exp_probs_b",
    KEY + "nextn_predict_layers": r"blk\.2\.",
}
WITH_A_DEFAULT = [
    "general.name",
    KEY + "attention.head_count_kv",
    KEY + "vocab_size",
    KEY + "rope.freq_base",
    KEY + "rope.scaling.type",
    KEY + "expert_weights_scale",
    KEY + "expert_weights_norm",
    KEY + "expert_gating_func",
    "tokenizer.ggml.bos_token_id",
    "tokenizer.ggml.padding_token_id",
    "tokenizer.ggml.eot_token_id",
    "tokenizer.ggml.eom_token_id",
    "tokenizer.ggml.add_bos_token",
    "tokenizer.chat_template",
]


@pytest.mark.parametrize("name", SPECS)
def test_a_missing_key_is_named(name: str, good: Make, tmp_path: Path) -> None:
    """Each key that the file has is taken away: needed ones are named, the others have a default that is known here."""
    required = REQUIRED + REQUIRED_IN_OLD_FILES * (name == "old")
    keys = [key for key, _ in good(name).keys]
    assert set(required) <= set(keys)
    for key in keys:
        path = good(name).put(key, None).write(tmp_path / "file.gguf")
        if key in required:
            assert key in refusal(path)
        elif key in SEEN_IN_THE_TENSORS:
            assert re.search(SEEN_IN_THE_TENSORS[key], refusal(path))
        else:
            unused = {KEY + "attention.key_length", KEY + "attention.value_length"} if name != "old" else set()
            assert key in {*WITH_A_DEFAULT, *unused}
            generate_two(load_model(path))


@pytest.mark.parametrize("architecture", ["llama", "glm4moe", "deepseek", "Deepseek2", "", "a\nb", "x" * 10_000])
def test_a_wrong_architecture_is_named(architecture: str, good: Make, tmp_path: Path) -> None:
    """With those that can be run. A long name is cut."""
    message = refusal(
        good("GLM").put("general.architecture", value(STRING, architecture)).write(tmp_path / "file.gguf")
    )
    assert "general.architecture" in message
    assert "deepseek2" in message
    assert ascii(architecture)[1:9] in message
    assert len(message) < 200


NONSENSE: list[Any] = [
    *(math.nan, math.inf, -math.inf, -1, -1.0, 0, 0.0, 1, 2, 3, 7, 0.5, 1e-300, 1e300, 1e-30, 1e30),
    *(1 << 15, 1 << 31, (1 << 32) - 1, 1 << 63, (1 << 64) - 1, -(1 << 63)),
    *(True, False, "", "x", "1", "yarn", "a\nb\x1b[2J", "x" * 100_000, [], [1], [0.5] * 3, ["x"], ["x"] * 100_000),
]
CONFIG_KEYS = [
    *(key for key in (*REQUIRED, *REQUIRED_IN_OLD_FILES, *SEEN_IN_THE_TENSORS, *WITH_A_DEFAULT) if "token" not in key),
    *(KEY + key for key in ("expert_group_count", "expert_group_used_count", "rope.scaling.yarn_beta_fast")),
    *(KEY + "rope.scaling.yarn_beta_slow", "general.name"),
    *(f"general.sampling.{key}" for key in ("temp", "top_p", "top_k", "min_p")),
]
UNREAD = {KEY + "attention.head_count_kv", KEY + "vocab_size"}


def plan(gguf: GGUFFile) -> tuple[Config, Any]:
    cfg = Config.from_metadata(gguf.metadata, gguf.tensors)
    pairs = weights.plan(gguf, cfg)
    plan_memory(cfg, weights.tensors_of(pairs), mx.float32, PREFILL_CHUNK).check("the file")
    return cfg, pairs


@pytest.mark.parametrize("name", ["GLM", "old"])
def test_nonsense_in_a_key_is_named_or_harmless(name: str, good: Make, tmp_path: Path) -> None:
    """Every key of the configuration takes every odd value: an InputError with the key or a tensor, or it runs.

    What is not even a positive whole number is never taken for one, so there the key itself is named.
    """
    path = good(name).write(tmp_path / "file.gguf")
    loaded, ran, named = load_model(path), 0, 0
    gguf, plain = loaded.gguf, dict(loaded.gguf.metadata)
    for key in CONFIG_KEYS:
        for given in NONSENSE:
            gguf.metadata = {**plain, key: given}
            planned = attempt(lambda: plan(gguf))
            if isinstance(planned, str):
                assert len(planned) < 500
                could_be = type(given) is int and given >= 0
                assert (
                    given == "yarn"
                    or key in planned
                    or (could_be and re.search("tensor|expert|block_count|head size", planned))
                )
                named += key in planned
            elif given != plain.get(key) and key not in UNREAD:
                ran += 1
                cfg, pairs = planned
                assert isinstance(cfg.name, str)
                model = Model(cfg, weights.load(gguf, cfg, pairs), loaded.model.dtype)
                generate_two(replace(loaded, config=cfg, model=model))
    assert named > 500
    assert ran > 30


NEVER: dict[str, list[Any]] = {  # what a key of an otherwise good GLM file must not be
    KEY + "block_count": [0, 1, -1, 1 << 31, 2.0, True, "3"],  # 1: the MTP layer alone
    KEY + "nextn_predict_layers": [3, 4, -1, 0.0],
    KEY + "context_length": [0, -1, 1 << 31, 1 << 64, 4096.0],
    KEY + "expert_group_count": [2, 8, -1, "1"],
    KEY + "expert_group_used_count": [2, 4],
    KEY + "rope.dimension_count": [0, 1, 7, 9, 40, 42, 1 << 31],  # 40 is the head size
    KEY + "expert_used_count": [0, 5, 1 << 30],  # of 4 experts
    KEY + "expert_feed_forward_length": [0],
    KEY + "expert_gating_func": [3, 4, -1, True, "sigmoid"],
    KEY + "expert_weights_norm": [0, 1, "true", 1.0],
    KEY + "expert_weights_scale": [-0.5, math.nan, math.inf, 1e7, True],
    KEY + "attention.layer_norm_rms_epsilon": [0, -1e-5, 1e-20, 1.5, math.nan, math.inf, False],
    KEY + "rope.freq_base": [0, 1.0, -1e6, math.nan, math.inf, 1e13],
    KEY + "rope.scaling.type": ["linear", "longrope", "", 1],
    KEY + "rope.scaling.attn_factor": [0, 0.5, 1.2, math.nan, "1"],
    KEY + "rope.scaling.yarn_attn_factor": [0.5],
    KEY + "rope.scaling.yarn_ext_factor": [0.0],
    KEY + "rope.scale_linear": [4.0],
    "tokenizer.ggml.tokens": [[], 5, "abc"],
}
NEVER_IN_YARN: dict[str, list[Any]] = {
    KEY + "rope.scaling.factor": [0, 0.5, -1, math.nan, math.inf, 1e7],
    KEY + "rope.scaling.original_context_length": [0, -1, 4096.0],
    KEY + "rope.scaling.yarn_log_multiplier": [-0.1, 11, math.nan],
    KEY + "rope.scaling.attn_factor": [0.5, 1.2],
    KEY + "rope.scaling.yarn_beta_fast": [0, -1, math.nan, 1e300],
    KEY + "rope.scaling.yarn_beta_slow": [0, -1, math.nan, 1e300],
}


@pytest.mark.parametrize("key", {**NEVER, **NEVER_IN_YARN})
def test_a_value_out_of_its_range_is_named(key: str, good: Make, tmp_path: Path) -> None:
    """With the key and the value, before a tensor is looked at."""
    gguf = GGUFFile(good("old" if key in NEVER_IN_YARN else "GLM").write(tmp_path / "file.gguf"))
    for given in (NEVER | NEVER_IN_YARN)[key]:
        metadata = {**gguf.metadata, key: given}
        message = attempt(lambda metadata=metadata: Config.from_metadata(metadata, gguf.tensors))
        assert isinstance(message, str), f"{key} = {given!r} was taken"
        assert f"{key} = {given!r} " in message or "block_count = 3 leaves no layer" in message


@pytest.mark.parametrize("key", [key for key in (*REQUIRED, *WITH_A_DEFAULT) if key.startswith("tokenizer.ggml")])
def test_nonsense_in_a_key_of_the_vocabulary_is_named_or_harmless(key: str, good: Make, tmp_path: Path) -> None:
    metadata = GGUFFile(good("GLM").write(tmp_path / "file.gguf")).metadata
    for given in NONSENSE:
        text = attempt(lambda given=given: round_trip({**metadata, key: given}))
        if text == "hi":
            assert key.endswith(("_token_id", "add_bos_token", "merges"))
        else:
            assert key in text or isinstance(given, list)  # whose length another key contradicts


def round_trip(metadata: Mapping[str, Any]) -> str:
    tokenizer = Tokenizer(metadata)
    return tokenizer.decode(tokenizer.encode("hi"))


@pytest.mark.parametrize(
    "alignment",
    [
        *(
            value(U32, 0),
            value(U32, 3),
            value(U32, 33),
            value(U32, (1 << 32) - 1),
            value(I32, -32),
            value(U64, 1 << 40),
        ),
        *(value(F32, 32.0), value(BOOL, True), value(STRING, "32"), array(U32, 1, struct.pack("<I", 32))),
    ],
)
def test_a_bad_alignment_is_refused(alignment: bytes, good: Make, tmp_path: Path) -> None:
    """A power of two that is too large makes the tensors lie outside the file."""
    message = refusal(good("GLM").put("general.alignment", alignment).write(tmp_path / "file.gguf"))
    assert "general.alignment" in message or "truncated" in message


@pytest.mark.parametrize("alignment", [1, 2, 8, 64, 4096])
def test_any_good_alignment_gives_the_same_weights(alignment: int, good: Make, tmp_path: Path) -> None:
    before = load_model(good("GLM").write(tmp_path / "32.gguf"))
    after = load_model(good("GLM").aligned(alignment).write(tmp_path / "other.gguf"))
    for name, weight in before.weights.items():
        for plane, other in zip(planes(weight), planes(after.weights[name]), strict=True):
            assert bool((plane == other).all()), name


def planes(weight: Any) -> tuple[Any, ...]:
    return getattr(weight, "planes", (weight,))


def test_version_2_is_read_as_version_3(good: Make, tmp_path: Path) -> None:
    file = good("GLM")
    file.version = struct.pack("<I", 2)
    generate_two(load_model(file.write(tmp_path / "file.gguf")))


def test_a_key_that_stands_twice_is_named(good: Make, tmp_path: Path) -> None:
    file = good("GLM")
    file.keys.append((KEY + "block_count", value(U32, 2)))
    assert f"holds the key '{KEY}block_count' twice" in refusal(file.write(tmp_path / "file.gguf"))


@pytest.mark.parametrize("kind", [13, 14, 255, (1 << 32) - 1])
def test_an_unknown_value_type_is_named(kind: int, good: Make, tmp_path: Path) -> None:
    """As the type of a value, and of an array's items."""
    for packed in (struct.pack("<IQ", kind, 0), struct.pack("<IIQ", ARRAY, kind, 1)):
        message = refusal(good("GLM").put("odd.key", packed).write(tmp_path / "file.gguf"))
        assert f"odd.key has the unknown value type {kind}" in message


@pytest.mark.parametrize("depth", [2, 3, 10_000, 1_000_000])
def test_an_array_of_arrays_is_refused(depth: int, good: Make, tmp_path: Path) -> None:
    """However deep: there is no recursion that could run out of stack."""
    packed = struct.pack("<I", ARRAY) + struct.pack("<IQ", ARRAY, 1) * depth
    assert "odd.key is an array of arrays" in refusal(good("GLM").put("odd.key", packed).write(tmp_path / "file.gguf"))


# What the tensors are


def may_be_missing(tensor: str) -> bool:
    """Tied embeddings, routers without a bias, and the MTP layer, which is not read."""
    return tensor == "output.weight" or tensor.endswith("exp_probs_b.bias") or tensor.startswith("blk.2.")


@pytest.mark.parametrize("name", SPECS)
def test_a_missing_tensor_is_named(name: str, good: Make, tmp_path: Path) -> None:
    """A file that had kv_b or gate_up in one tensor is asked for its two parts, the usual form."""
    usual = {"attn_kv_b": "attn_k_b", "ffn_gate_up_exps": "ffn_gate_exps"}
    for i, tensor in enumerate(good(name).tensors):
        file = good(name)
        del file.tensors[i]
        path = file.with_zeros().write(tmp_path / "file.gguf")
        if may_be_missing(tensor.name):
            generate_two(load_model(path))
        else:
            asked = tensor.name
            for whole, part in usual.items():
                asked = asked.replace(whole, part)
            assert f"has no tensor {asked};" in refusal(path)


@pytest.mark.parametrize("name", SPECS)
def test_a_shape_that_contradicts_the_metadata_is_named(name: str, good: Make, tmp_path: Path) -> None:
    """One row more, 32 columns more, rows and columns swapped, one dimension more; whole files, only one shape off."""
    changes: list[Callable[[list[int]], list[int]]] = [
        lambda dims: [*dims[:-1], dims[-1] + 32],
        lambda dims: [dims[0] + 32, *dims[1:]],
        lambda dims: [dims[0] * 2, *dims[1:-1], dims[-1] // 2],
        lambda dims: dims[::-1],
        lambda dims: [*dims, 1],
    ]
    seen = 0
    for i, tensor in enumerate(good(name).tensors):
        for change in changes:
            file = good(name)
            file.tensors[i].dims = change(tensor.dims)
            if tensor.name.startswith("blk.2.") or file.tensors[i].dims == tensor.dims:
                continue
            assert f"tensor {tensor.name} has the shape" in refusal(file.with_zeros().write(tmp_path / "file.gguf"))
            seen += 1
    assert seen > 80


@pytest.mark.parametrize("name", SPECS)
def test_a_tensor_without_a_place_is_named(name: str, good: Make, tmp_path: Path) -> None:
    """To leave one out without a word would run another model: a bias, a layer too many, a misspelt optional tensor."""
    for extra in ("blk.0.attn_output.bias", "blk.7.attn_norm.weight", "rope_freqs.weight", "outputt.weight", "blk.é"):
        file = good(name)
        norm = file.tensor("output_norm.weight")
        file.tensors.append(Tensor(extra, list(norm.dims), norm.type, 0))
        assert f"holds the tensor {extra}, which has no place" in refusal(file.with_zeros().write(tmp_path / "f.gguf"))


def test_k_b_and_v_b_beside_kv_b_are_known(good: Make, tmp_path: Path) -> None:
    """Some files hold both forms of the same weights."""
    file = good("old")
    for name in ("blk.0.attn_k_b.weight", "blk.1.attn_v_b.weight"):
        file.tensors.append(Tensor(name, [32, 64, 2], int(GGMLQuantizationType.Q4_0), 0))
    generate_two(load_model(file.with_zeros().write(tmp_path / "file.gguf")))


def test_a_layer_less_than_the_file_holds_is_refused(good: Make, tmp_path: Path) -> None:
    """A damaged block_count must not become a shorter model."""
    path = good("fused").put(KEY + "block_count", value(U32, 1)).write(tmp_path / "file.gguf")
    assert "holds the tensor blk.1." in refusal(path)


def test_a_digit_string_in_a_name_is_only_a_name(good: Make, tmp_path: Path) -> None:
    """Python reads no number of more than 4300 digits, and raises ValueError."""
    file = good("GLM")
    file.tensors[-1].name = "blk." + "9" * 5000 + ".attn_norm.weight"
    assert "tensor blk.99" in refusal(file.write(tmp_path / "file.gguf"))


WIDE = TinySpec(**SMALL | {"hidden_size": 256, "layers": 1, "first_k_dense": 0})
READ = {*weights.DENSE_TYPES, *QUANT_TYPES, *weights.EXPANDED_TYPES}


@pytest.mark.parametrize("kind", GGMLQuantizationType, ids=lambda kind: kind.name)
def test_every_known_type_is_read_or_named(kind: GGMLQuantizationType, tmp_path: Path) -> None:
    """As the type of a matrix; as that of a vector only the types with whole numbers per value are."""
    path = make_small(tmp_path / "wide.gguf", WIDE)
    for name in ("blk.0.attn_q_a.weight", "output_norm.weight"):
        file = File.read(path)
        file.tensor(name).type = int(kind)
        file.with_zeros().write(tmp_path / "file.gguf")
        if kind.name in (READ if "attn" in name else weights.DENSE_TYPES):
            generate_two(load_model(tmp_path / "file.gguf"))
        else:
            assert f"tensor {name} has the type {kind.name}, which can't be read here" in refusal(
                tmp_path / "file.gguf"
            )


@pytest.mark.parametrize("given", [None, 0.0])
def test_yarn_without_its_multiplier_is_refused_by_name(given: float | None, good: Make, tmp_path: Path) -> None:
    """0 too: llama.cpp cannot tell it from a missing key. Programs then differ by more than the logits themselves."""
    key = KEY + "rope.scaling.yarn_log_multiplier"
    path = good("old").put(key, given if given is None else value(F32, given)).write(tmp_path / "file.gguf")
    assert f"{key} is {'missing' if given is None else '0'} beside rope.scaling.type = 'yarn'" in refusal(path)
    with pytest.raises(ValueError, match=r"rope\.scaling\.yarn_log_multiplier"):
        read_config(GgufFile(path))


def test_the_reference_refuses_a_factor_that_it_does_not_apply(good: Make, tmp_path: Path) -> None:
    key = KEY + "rope.scaling.attn_factor"
    for factor in (1.0, 1.2):
        file = GgufFile(good("old").put(key, value(F32, factor)).write(tmp_path / f"{factor}.gguf"))
        with nullcontext() if factor == 1 else pytest.raises(ValueError, match="attn_factor"):
            read_config(file)


@pytest.mark.parametrize(
    ("key", "given"),
    [
        ("expert_group_count", 8),
        ("expert_group_used_count", 4),
        ("rope.scaling.type", "linear"),
        ("rope.scaling.type", "longrope"),
        ("rope.scaling.attn_factor", 1.2),
        ("expert_gating_func", 3),
    ],
)
def test_what_is_only_not_supported_is_not_called_damaged(key: str, given: Any, good: Make, tmp_path: Path) -> None:
    gguf = GGUFFile(good("GLM").write(tmp_path / "file.gguf"))
    metadata = {**gguf.metadata, KEY + key: given}
    message = attempt(lambda: Config.from_metadata(metadata, gguf.tensors))
    assert isinstance(message, str)
    assert f"{KEY}{key} = {given!r} " in message
    assert "damaged" not in message
    assert message.endswith("; use a file without it: GLM-4.7-Flash and DeepSeek-V2-Lite need none")


@pytest.mark.parametrize(
    ("number", "said"),
    [
        (139, "the type IQ4_K of ik_llama.cpp"),
        (144, "the type IQ4_KS of ik_llama.cpp"),
        (4, "the type Q4_2, which llama.cpp has given up"),
        (31, "the type Q4_0_4_4, which llama.cpp has given up"),
    ],
)
def test_a_type_of_a_fork_or_of_the_past_is_called_by_its_name(
    number: int, said: str, good: Make, tmp_path: Path
) -> None:
    file = good("GLM")
    file.tensor("output.weight").type = number
    message = refusal(file.write(tmp_path / "file.gguf"))
    assert f"tensor output.weight has {said}; use a " in message
    assert "damaged" not in message


@pytest.mark.parametrize("kind", [36, 99, 255, 1 << 31, (1 << 32) - 1])
def test_an_unknown_quant_type_is_named(kind: int, good: Make, tmp_path: Path) -> None:
    file = good("GLM")
    file.tensor("output.weight").type = kind
    assert f"tensor output.weight has the unknown quant type {kind}; " in refusal(file.write(tmp_path / "file.gguf"))


@pytest.mark.parametrize("n_dims", [0, 5, 255, (1 << 32) - 1])
def test_a_wrong_number_of_dimensions_is_named(n_dims: int, good: Make, tmp_path: Path) -> None:
    file = good("GLM")
    file.tensors[3].n_dims = n_dims
    message = refusal(file.write(tmp_path / "file.gguf"))
    assert f"tensor {file.tensors[3].name} has {n_dims} dimensions, not 1 to 4" in message


@pytest.mark.parametrize(
    "dims",
    [
        [0],
        [32, 0],
        [31],
        [33, 4],
        [1 << 63],
        [32, 1 << 63],
        [1 << 32, 1 << 32],
        [1 << 32] * 4,
        [(1 << 64) - 32],
        [32, (1 << 59) + 1],
    ],
    ids=str,
)
def test_a_size_that_cannot_be_is_refused(dims: list[int], good: Make, tmp_path: Path) -> None:
    """No values, part of a block, and products that are 0 or small in 64 bits. The last tensor is one of those that
    are not loaded, so that nothing behind the reader sees it.
    """
    for i in (0, -1):
        file = good("GLM")
        tensor = file.tensors[i]
        tensor.dims, tensor.type = dims, int(GGMLQuantizationType.Q4_0)
        assert f"tensor {tensor.name} " in refusal(file.write(tmp_path / "file.gguf"))


@pytest.mark.parametrize("step", [-32, -1, 1, 32, 1 << 31, 1 << 40, (1 << 63) - 64, 1 << 63], ids=str)
def test_a_tensor_that_is_not_behind_the_one_before_is_named(step: int, good: Make, tmp_path: Path) -> None:
    """In the file or out of it. As in llama.cpp: a wrong offset that lies in the file would give wrong weights."""
    for i in (1, 20, -1):
        file = good("GLM")
        file.tensors[i].offset += step
        message = refusal(file.write(tmp_path / "file.gguf"))
        assert f"tensor {file.tensors[i].name} begins at byte {file.tensors[i].offset:,} of the data" in message


def test_tensor_data_out_of_the_file_are_refused(good: Make, tmp_path: Path) -> None:
    """The last tensor grows by a row: its place is right, its end is not in the file."""
    file = good("fused")
    file.data = file.data[: file.tensors[-1].offset + file.tensors[-1].nbytes]
    file.tensors[-1].dims[-1] += 1
    message = refusal(file.write(tmp_path / "file.gguf"))
    assert f"is truncated or damaged: tensor {file.tensors[-1].name} needs bytes" in message


def test_a_tensor_that_stands_twice_is_named(good: Make, tmp_path: Path) -> None:
    file = good("GLM")
    file.tensors.append(file.copy().tensors[5])
    message = refusal(file.with_zeros().write(tmp_path / "file.gguf"))
    assert f"holds the tensor {file.tensors[5].name} twice" in message


def sampler(file: File, folder: Path) -> tuple[SamplingParams, tuple[str, ...]]:
    """Sampling as a file advises where the user says nothing, and what is said about its metadata."""
    gguf = GGUFFile(file.write(folder / "file.gguf"))
    cfg = Config.from_metadata(gguf.metadata, gguf.tensors)
    return SamplingParams(**asdict(cfg.sampling)), cfg.notes


@pytest.mark.parametrize(
    ("key", "given", "name", "meant"),
    [
        ("top_k", value(I32, -1), "top_k", 0),
        ("temp", value(F32, 1e-5), "temperature", 0.0),
        ("temp", value(F32, 200.0), "temperature", 200.0),
    ],
)
def test_advice_on_sampling_is_taken_as_it_is_meant(
    key: str, given: bytes, name: str, meant: float, good: Make, tmp_path: Path
) -> None:
    params, notes = sampler(good("GLM").put(f"general.sampling.{key}", given), tmp_path)
    assert (getattr(params, name), notes) == (meant, ())


@pytest.mark.parametrize(
    ("key", "given", "default"),
    [
        *(("temp", bad, "1") for bad in (-0.1, 1001.0, math.nan, math.inf, "1", True)),
        *(("top_p", bad, "0.95") for bad in (0.0, -0.1, 1.01, math.nan, True, [])),
        *(("top_k", bad, "0") for bad in (1 << 40, math.nan, "40")),
        *(("min_p", bad, "0") for bad in (-0.1, 1.01, math.nan)),
    ],
)
def test_advice_on_sampling_out_of_range_is_ignored_and_said(
    key: str, given: Any, default: str, good: Make, tmp_path: Path
) -> None:
    gguf = GGUFFile(good("GLM").write(tmp_path / "file.gguf"))
    plain, _ = sampler(good("GLM"), tmp_path)
    cfg = Config.from_metadata({**gguf.metadata, f"general.sampling.{key}": given}, gguf.tensors)
    assert SamplingParams(**asdict(cfg.sampling)) == plain
    (note,) = cfg.notes
    assert f"general.sampling.{key} = {given!r}, which is not " in note
    assert note.endswith(f"; the default is {default} instead")


def test_softmax_beside_a_selection_bias_is_said_once(good: Make, tmp_path: Path) -> None:
    """The file's word holds; with 0, which is no word, the bias says sigmoid, as the reference reads it."""
    key = KEY + "expert_gating_func"
    for number, gating, count in ((1, "softmax", 1), (2, "sigmoid", 0), (0, "sigmoid", 0)):
        path = good("GLM").put(key, value(U32, number)).write(tmp_path / "file.gguf")
        opened = open_model(path)
        assert (opened.config.gating, len(opened.notes)) == (gating, count)
        assert read_config(GgufFile(path)).scoring_func == gating
        if count:
            assert re.search(rf"{key} = 1 means softmax.*exp_probs_b.*sigmoid.*right for GLM", opened.notes[0])


# Counts and sizes that would take all memory


def test_more_tensors_or_keys_than_any_model_has_are_refused_at_once(good: Make, tmp_path: Path) -> None:
    """Half a million tensors took 8 seconds."""
    file = good("GLM")
    many = [replace(file.tensors[0], name=f"t{i}") for i in range(40_000)]
    for changes, said in (
        ({"tensors": many, "keys": file.keys}, "claims 40,000 tensors, and no model has more than 32,768"),
        ({"keys": [(f"k{i}", value(U8, 0)) for i in range(40_000)]}, "claims 40,000 keys"),
    ):
        path = replace(file, **changes).write(tmp_path / "file.gguf")
        start = time.process_time()
        assert said in refusal(path)
        assert time.process_time() - start < 1


HUGE = [1 << 31, 1 << 40, 1 << 47, 1 << 61, (1 << 62) + 1, 1 << 63, (1 << 64) - 1]


def claims(file: File, count: int) -> Iterator[File]:
    """Files in which each kind of count or length is this one."""
    for name in ("tensor_count", "key_count"):
        claim = file.copy()
        setattr(claim, name, count)
        yield claim
    for kind in (U8, BOOL, U16, F32, F64, U64, STRING, ARRAY):
        yield file.copy().put("odd.key", array(kind, count))
        yield file.copy().put("tokenizer.ggml.tokens", array(kind, count))
        yield replace(file.copy().put("odd.key", array(kind, count)), tensors=[], tensor_count=60, data=bytes(1 << 16))
    yield file.copy().put("odd.key", struct.pack("<IQ", STRING, count))
    yield file.copy().put("odd.key", array(STRING, 2, string("x") + struct.pack("<Q", count)))
    header = file.header()
    for length_at in (24, header.index(string("output_norm.weight"))):  # of the first key, of a tensor's name
        claim = file.copy()
        damaged = header[:length_at] + struct.pack("<Q", count) + header[length_at + 8 :]
        claim.keys, claim.tensors = [], []
        claim.magic, claim.version, claim.data = damaged + claim.data, b"", b""
        yield claim


@pytest.mark.parametrize("count", HUGE, ids=str)
def test_a_huge_count_takes_no_memory_and_no_time(count: int, good: Make, tmp_path: Path) -> None:
    """Nothing over the file's own size is ever allocated, whatever its header claims."""
    for claim in claims(good("GLM"), count):
        path = claim.write(tmp_path / "file.gguf")
        assert refused_within(path, nbytes=path.stat().st_size, seconds=1.0)


@pytest.mark.parametrize("count", [MAX_HEADER, 1 << 28, 1 << 30, 1 << 33])
def test_a_count_that_fits_the_file_but_no_header_is_refused(count: int, good: Make, tmp_path: Path) -> None:
    """A model of 17 GB has room for any list, and one flipped bit in a count asks for one.

    The file has holes, and zeros read as any number of empty strings.
    """
    for claim in claims(good("GLM"), count):
        path = claim.write(tmp_path / "file.gguf")
        os.truncate(path, 1 << 37)
        assert refused_within(path, nbytes=1 << 17, seconds=1.0)


def refused_within(path: Path, nbytes: int, seconds: float) -> bool:
    tracemalloc.start()
    start = time.process_time()
    try:
        refusal(path)
        assert time.process_time() - start < seconds
        assert tracemalloc.get_traced_memory()[1] < nbytes
    finally:
        tracemalloc.stop()
    return True


# Split files


@pytest.fixture
def parts(tmp_path: Path) -> list[Path]:
    make_small(tmp_path / "model.gguf", SPECS["GLM"], split_max_tensors=20)
    return sorted(tmp_path.glob("model-*.gguf"))


def test_a_split_file_is_opened_by_its_first_part(parts: list[Path]) -> None:
    assert len(parts) == 3
    generate_two(load_model(parts[0]))


def test_parts_joined_with_cat_are_told_from_a_damaged_file(parts: list[Path], tmp_path: Path) -> None:
    joined = tmp_path / "joined.gguf"
    joined.write_bytes(b"".join(part.read_bytes() for part in parts))
    message = refusal(joined)
    assert "has a second GGUF file behind the first, as parts joined with cat have; give the first of the" in message
    assert "llama-gguf-split --merge" in message


@pytest.mark.parametrize("no", [1, 2])
def test_a_missing_part_is_named(no: int, parts: list[Path]) -> None:
    parts[no].unlink()
    assert f"no such file: {parts[no]}" in refusal(parts[0])


@pytest.mark.parametrize("no", [1, 2])
def test_a_later_part_given_first_names_the_first(no: int, parts: list[Path]) -> None:
    message = refusal(parts[no])
    assert f"is part {no + 1} of 3; give model-00001-of-00003.gguf" in message


@pytest.mark.parametrize(
    "name", ["other.gguf", "model-00001-of-00002.gguf", "model-1-of-3.gguf", "model-00001-of-00003"]
)
def test_a_part_under_another_name_is_told_its_own(name: str, parts: list[Path]) -> None:
    path = parts[0].rename(parts[0].with_name(name))
    assert "is not named NAME-00001-of-00003.gguf; give the parts their original names" in refusal(path)


@pytest.mark.parametrize(
    "total", [value(U16, 0), value(I32, -1), value(U64, 1 << 63), value(STRING, "61"), value(F32, 1)]
)
def test_a_wrong_tensor_count_of_the_set_is_named(total: bytes, parts: list[Path]) -> None:
    File.read(parts[0]).put("split.tensors.count", total).write(parts[0])
    assert "the 3 parts hold" in refusal(parts[0])


@pytest.mark.parametrize(("source", "target"), [(0, 1), (0, 2), (1, 2), (2, 1), (1, 0), (2, 0)])
def test_a_part_in_the_place_of_another_is_named(source: int, target: int, parts: list[Path]) -> None:
    """Also a first part in the place of the second, which would claim the others again."""
    content = parts[source].read_bytes()
    parts[target].unlink()
    parts[target].write_bytes(content)
    message = refusal(parts[0])
    assert f"{parts[target]} should be part {target + 1} of 3, but its header says split.no {source}" in message


def test_a_part_of_another_set_is_named(parts: list[Path]) -> None:
    File.read(parts[1]).put("split.count", value(U16, 4)).write(parts[1])
    assert "should be part 2 of 3, but its header says split.no 1 (from 0) of 4" in refusal(parts[0])


def test_a_part_without_its_number_is_named(parts: list[Path]) -> None:
    File.read(parts[2]).put("split.no", None).write(parts[2])
    assert "should be part 3 of 3, but its header says split.no None" in refusal(parts[0])


def test_a_whole_model_in_the_place_of_a_part_is_named(parts: list[Path], good: Make) -> None:
    good("GLM").write(parts[1])
    assert "should be part 2 of 3, but its header says split.no None" in refusal(parts[0])


@pytest.mark.parametrize(
    "count", [value(STRING, "3"), value(BOOL, True), value(F32, 3.0), value(I32, -3), array(U8, 0)]
)
def test_a_part_count_that_is_no_count_is_named(count: bytes, parts: list[Path]) -> None:
    File.read(parts[0]).put("split.count", count).write(parts[0])
    assert "split.count is" in refusal(parts[0])


@pytest.mark.parametrize("count", [4, 99999, 100_000, 1 << 63])
def test_a_part_count_that_is_too_high_ends_at_the_first_missing_part(count: int, parts: list[Path]) -> None:
    path = parts[0].with_name(f"model-00001-of-{count:05}.gguf")
    message = refusal(File.read(parts[0]).put("split.count", value(U64, count)).write(path))
    # Names have five digits, so a higher count has no name that fits it.
    assert (f"no such file: {path.with_name('model-00002')}" if count < 100_000 else "is not named") in message


# What does not fit the machine


def larger_than_the_machine(folder: Path, file: File) -> Path:
    """A valid header over 650 GB of nothing: experts of two billion rows. The file is one large hole."""
    width = (1 << 31) - 64
    file.put(KEY + "expert_feed_forward_length", value(U32, width))
    for tensor in file.tensors:
        if tensor.name.startswith("blk.1.ffn_") and "gate_inp" not in tensor.name and "norm" not in tensor.name:
            tensor.dims[0 if "down" in tensor.name else 1] = width
    size = file.lay_out()
    file.data = b""
    path = file.write(folder / "large.gguf")
    os.truncate(path, path.stat().st_size + size)
    return path


def test_a_model_larger_than_the_machine_is_refused_before_it_is_read(good: Make, tmp_path: Path) -> None:
    """The message says what it needs and what there is."""
    path = larger_than_the_machine(tmp_path, good("GLM"))
    available = memory.available_memory()
    found = re.search(r"needs ([\d.]+) GB of memory, this machine has ([\d.]+) GB to give; ", refusal(path))
    assert found
    assert 500 < float(found[1]) < path.stat().st_size / 1e9
    assert float(found[2]) == pytest.approx(available / 1e9, rel=0.5)


def test_a_model_may_take_all_the_memory_there_is_and_no_byte_more(
    good: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of memory for weights, cache and scratch. Too much is refused before it is read, with what would fit."""
    path = good("GLM").write(tmp_path / "file.gguf")
    loaded = load_model(path)
    held = sum(plane.nbytes for weight in loaded.weights.values() for plane in planes(weight))
    most, least = loaded.config.context_length, min(memory.LEAST_CONTEXT, loaded.config.context_length)
    assert (loaded.memory.weights, loaded.memory.context) == (held, most)
    machine(monkeypatch, loaded.memory.total)
    assert load_model(path).memory.context == most
    monkeypatch.setattr(weights, "load", None)
    machine(monkeypatch, loaded.memory.total - 1)
    refused = attempt(lambda: load_model(path, context=most))
    fits = re.search(rf"context of {most:,} tokens needs .*; --context (\d+) would fit", str(refused))
    assert fits
    assert open_model(path).memory.context == open_model(path).memory.largest >= int(fits[1])
    assert open_model(path, context=int(fits[1])).memory.fits
    assert least <= int(fits[1]) < most
    machine(monkeypatch, open_model(path, context=least).memory.total - 1)
    assert "close other programs or take a smaller quantisation" in refusal(path)
    machine(monkeypatch, held - 1)
    assert "close other programs or take a smaller quantisation" in refusal(path)


def machine(monkeypatch: pytest.MonkeyPatch, room: int) -> None:
    """From now on there is so much memory."""
    monkeypatch.setattr(memory, "machine_memory", lambda: (room, "a test"))


# Ten thousand seeded faults

SHARDS, CASES = 10, 1000
DIFFERENT = re.compile(r"'[^']*'|[0-9]+")


@pytest.mark.parametrize("shard", range(SHARDS))
def test_a_mutated_file_runs_or_is_refused(shard: int, good: Make, tmp_path: Path) -> None:
    """Half have a damaged header, half are well formed and say something else. Two of those that open in each shard,
    and those whose configuration changed, also generate.
    """
    rng, path = random.Random(shard), tmp_path / "file.gguf"
    name = list(SPECS)[shard % len(SPECS)]
    plain = good(name)
    config = load_model(plain.write(path)).config
    refusals, opened, ran = set(), 0, 0
    for case in range(CASES):
        if case % 2:
            changed(plain, rng).write(path)
        else:
            plain.write(path, damaged_header(plain, rng))
        try:
            outcome = open_or_refuse(path)
            if isinstance(outcome, Loaded):
                opened += 1
                if ran < 2 or (outcome.config != config and ran < 12):
                    ran += 1
                    generate_two(outcome)
            else:
                refusals.add(DIFFERENT.sub("", outcome.replace(str(path), "")))
        except BaseException as error:
            raise AssertionError(f"shard {shard}, case {case} of {name}") from error
    assert len(refusals) > 100  # no one check hides the others
    assert opened > 100
    assert ran == 12


# On the command line

COMMANDS = {
    **{case: NO_MODEL[case] for case in ("no such file", "a folder", "a pipe that nobody writes to", "an empty file")},
    **{case: NO_MODEL[case] for case in ("a path below a file", "two lines in the path", "text", "version 1")},
    "a wrong architecture": (
        lambda folder, file: file.put("general.architecture", value(STRING, "llama")).write(folder / "file.gguf"),
        "general.architecture = 'llama'",
    ),
    "a missing tensor": (
        lambda folder, file: [file.tensors.pop(0), file.with_zeros().write(folder / "file.gguf")][1],
        "has no tensor token_embd.weight",
    ),
    "too large": (larger_than_the_machine, "GB of memory"),
    "nobody's home folder": (lambda folder, file: Path("~nobody-here/x.gguf"), "no such file.*x.gguf"),
    "a name too long for the system": (lambda folder, file: folder / f"{'x' * 300}.gguf", "cannot read"),
}


@pytest.mark.parametrize("case", COMMANDS)
def test_the_command_says_one_line_and_exits_with_2(case: str, good: Make, tmp_path: Path) -> None:
    """Nothing on standard output, one line on standard error, no new file."""
    make, said = COMMANDS[case]
    path = make(tmp_path, good("GLM"))
    before = sorted(tmp_path.iterdir())
    done = subprocess.run(
        [sys.executable, "-m", "glm_mlx.generate", "--model", str(path), "-p", "hi"],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[1])},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        timeout=60,
    )
    assert done.stdout == b""
    assert done.returncode == 2
    line = done.stderr.decode()
    assert line.startswith("error: ")
    assert len(line.splitlines()) == 1
    assert all(part in line for part in said.split(".*"))
    assert sorted(tmp_path.iterdir()) == before


def one_error(capfd: pytest.CaptureFixture[str]) -> str:
    out, err = capfd.readouterr()
    assert out == ""
    assert len(err.splitlines()) == 1, err
    assert err.startswith("error: ")
    assert "; " in err
    assert len(err) < 300
    return err


@pytest.mark.parametrize(
    ("option", "text", "says"),
    [
        ("--seed", "-1", "--seed: '-1' is not a whole number from 0"),
        ("--tokens", "0", "--tokens: '0' is not a whole number from 1"),
        ("--tokens", "1e15", "'1e15'"),
        ("--tokens", str(10**15), "tokens is 1000000000000000; it must be 1 to "),
        ("--tokens", "9" * 5000, "'999"),
        ("--layers", "9" * 5000, "its layers are 0 to "),
        ("--layers", "0,-1", "'-1' in --layers"),
        ("--layers", "0,", "'' in --layers"),
    ],
    ids=lambda text: text[:12],
)
def test_the_comparison_with_the_reference_refuses_what_cannot_be(
    option: str, text: str, says: str, good: Make, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    file = good("GLM").with_zeros().write(tmp_path / "file.gguf")
    try:
        code = check_file.main(["--model", str(file), f"{option}={text}"])
    except SystemExit as left:
        code = left.code
    assert code == 2
    assert says in one_error(capfd)


def test_a_tensor_that_the_reference_would_miss_is_named(
    good: Make, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    file = good("GLM")
    gone = file.tensor("token_embd.weight")  # which the reference reads before the product
    file.tensors.remove(gone)
    path = file.with_zeros().write(tmp_path / "file.gguf")
    assert check_file.main(["--model", str(path)]) == 2
    assert f"has no tensor {gone.name}" in one_error(capfd)


def test_the_reference_has_the_defaults_that_the_product_has(good: Make, tmp_path: Path) -> None:
    """Absorbed sizes count only where the true ones are missing; llama.cpp does not ask for these keys either."""
    file = good("GLM").put(KEY + "attention.key_length", None).put(KEY + "attention.value_length", None)
    path = file.put(KEY + "rope.freq_base", None).with_zeros().write(tmp_path / "file.gguf")
    theirs, gguf = read_config(GgufFile(path)), GGUFFile(path)
    ours = Config.from_metadata(gguf.metadata, gguf.tensors)
    assert theirs.rope_theta == ours.rope_theta == 10_000
    assert (theirs.qk_head_dim, theirs.v_head_dim) == (ours.qk_head_dim, ours.v_head_dim)


@pytest.mark.parametrize("arguments", [["--seed", "-1"], ["--seed", "9" * 5000], ["--type", "Q9"], ["--override", "x"]])
def test_a_tiny_model_that_cannot_be_made_is_one_line(
    arguments: list[str], tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "argv", ["make_tiny", str(tmp_path / "x.gguf"), *arguments])
    with pytest.raises(SystemExit, match="2"):
        command.run(make_tiny.main)
    one_error(capfd)
    assert not list(tmp_path.iterdir())


def test_a_tiny_model_that_cannot_be_written_is_one_line(
    capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "argv", ["make_tiny", "/nonexistent/x.gguf"])
    assert command.run(make_tiny.main) == 2
    assert "cannot write /nonexistent/x.gguf: No such file" in one_error(capfd)
