"""The memory plan against what MLX measures, and against machines that are described to it."""

import os
import re
import resource
import subprocess
import sys
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import mlx.core as mx
import psutil
import pytest

from glm_mlx import memory
from glm_mlx.cache import KvBits
from glm_mlx.checkup import glm_flash_memory
from glm_mlx.engine import Engine
from glm_mlx.errors import InputError, is_out_of_memory
from glm_mlx.load import load_model, open_model
from glm_mlx.make_tiny import GLM_FLASH, TinySpec
from glm_mlx.memory import plan_memory
from glm_mlx.model import activation_dtype
from glm_mlx.sampling import SamplingParams
from glm_mlx.small import SMALL_MODEL
from glm_mlx.weights import tensors_of
from kernels import mla_decode, wide
from kernels.planes import Weight
from parity_tests.compare import memory_held
from parity_tests.conftest import MakeModel
from parity_tests.variants import VARIANTS

FEW_EXPERTS = replace(GLM_FLASH, num_experts=4, intermediate_size=2048)  # at the real widths
TYPES = ("Q4_0", "Q4_K", "Q6_K", "IQ4_NL")
PROMPTS: dict[str, tuple[TinySpec, int, int]] = {  # file, chunk, tokens before the chunk
    **{f"weights beside, {kind}": (replace(FEW_EXPERTS, type=kind), 8, 0) for kind in (*TYPES, "F16")},
    "hidden values": (replace(FEW_EXPERTS, type="F32"), 16, 0),
    "dense layers": (replace(GLM_FLASH, layers=1, intermediate_size=20480), 32, 0),
    "scores": (TinySpec(num_heads=16, context_length=8192), 128, 4000),
    "blocks": (TinySpec(num_heads=16, context_length=8192), 128, 4000),
    "rows": (TinySpec(kv_lora_rank=512, context_length=8192), 8, 8000),
}


@pytest.mark.parametrize("name", VARIANTS)
def test_the_weights_take_what_the_header_foretells(name: str, model_file: MakeModel) -> None:
    loaded = load_model(model_file(VARIANTS[name]))
    assert loaded.memory.weights == sum(weight.nbytes for weight in loaded.weights.values())


@pytest.mark.parametrize("kv_bits", [8, 16])
@pytest.mark.parametrize("context", [1, 256, 300, 1025])
def test_a_full_cache_takes_what_was_planned(context: int, kv_bits: KvBits, model_file: MakeModel) -> None:
    loaded = load_model(model_file(TinySpec()), context=context, kv_bits=kv_bits)
    engine = Engine(loaded.model, context=loaded.memory.context)
    for rows in range(0, context, 100):  # in steps, so that it grows
        prompt = [1] * min(rows + 100, context)
        engine.cache.expect(0)
        engine._prefill(prompt, lambda done, total: None)
    assert engine.cache.offset == context
    assert engine.cache.nbytes == loaded.memory.cache


@pytest.mark.parametrize(
    ("name", "kv_bits"), [*((name, 16) for name in PROMPTS), *((name, 8) for name in ("blocks", "rows"))]
)
def test_reading_a_prompt_stays_within_the_planned_scratch(
    name: str, kv_bits: KvBits, model_file: MakeModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The last chunk of a prompt: it takes no more than planned, and not so much less that the plan would be idle."""
    if name == "blocks":
        monkeypatch.setattr(mla_decode, "SCORES", 16 * 128 * 512)
    spec, chunk, before = PROMPTS[name]
    loaded = load_model(model_file(spec), kv_bits=kv_bits)
    engine, context = Engine(loaded.model, chunk), before + chunk
    cache = engine.cache
    for layer in range(len(cache.rows)):
        mx.eval(cache.update(layer, mx.random.normal((1, context, cache.format.values))))
    cache.advance(before)
    engine.tokens = [1] * before
    held = memory_held()
    engine._prefill([1] * before + [token % 250 for token in range(2, chunk + 2)], lambda done, total: None)
    taken = mx.get_peak_memory() - held
    tensors = tensors_of(open_model(loaded.gguf.path).tensors)
    planned = plan_memory(loaded.config, tensors, loaded.model.dtype, chunk, context, kv_bits).scratch
    print(f"{name}, {kv_bits} bits: {taken / 1e6:.1f} MB of {planned / 1e6:.1f} MB planned")
    assert taken <= planned <= 2.5 * taken


@pytest.mark.parametrize(("before", "kv_bits"), [(0, 16), (0, 8), (1536, 16), (1536, 8)])
def test_reading_a_prompt_as_on_cuda_stays_within_the_planned_scratch(
    before: int, kv_bits: KvBits, on_cpu: None, model_file: MakeModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At the real widths, with matmuls that only allocate, and turns that are waited for as late as is counted on."""
    begun: list[mx.array] = []

    def start(result: mx.array) -> mx.array:
        mx.async_eval(result)
        begun.append(result)
        if len(begun) == wide.ALIVE:
            mx.eval(begun.pop(0))
        return result

    def made_of(*inputs: mx.array, shape: tuple[int, ...], dtype: mx.Dtype) -> mx.array:
        first = sum((x[(slice(1),) * x.ndim].reshape(1).astype(dtype) for x in inputs), mx.zeros(1, dtype))
        made = mx.zeros(shape, dtype)
        made[(slice(1),) * len(shape)] = first.reshape((1,) * len(shape))
        return made

    def expand(w: Weight, dtype: mx.Dtype, experts: mx.array | None = None) -> mx.array:
        if experts is None:
            return mx.zeros(w.shape, dtype)
        return made_of(experts, shape=(experts.size, *w.shape[1:]), dtype=dtype)

    monkeypatch.setattr(wide, "_on_cuda", lambda: True)
    monkeypatch.setattr(wide, "start", start)
    monkeypatch.setattr(wide, "expand", expand)
    monkeypatch.setattr(wide, "SCORES", 4 << 20)  # for fewer tokens than usual
    monkeypatch.setattr(wide, "TILES", 8)
    monkeypatch.setattr(mx, "matmul", lambda a, b: made_of(a, b, shape=(*a.shape[:-1], b.shape[-1]), dtype=a.dtype))
    chunk, context = 512, before + 512
    loaded = load_model(model_file(FEW_EXPERTS), mx.bfloat16, kv_bits=kv_bits)
    engine = Engine(loaded.model, chunk)
    engine.cache.expect(context)
    for layer in range(len(engine.cache.rows)):
        engine.cache._with_room(layer, 1, context)
    engine.cache.advance(before)
    engine.tokens = [1] * before
    held = memory_held()
    engine._prefill([1] * before + [token % 250 for token in range(2, chunk + 2)], lambda done, total: None)
    taken = mx.get_peak_memory() - held
    tensors = tensors_of(open_model(loaded.gguf.path).tensors)
    planned = plan_memory(loaded.config, tensors, mx.bfloat16, chunk, context, kv_bits).scratch
    print(f"{chunk} behind {before}, {kv_bits} bits: {taken / 1e6:.1f} MB of {planned / 1e6:.1f} MB planned")
    # A CPU frees after each operation what a GPU frees a while after a turn: of the ten expanded matrices of five turns
    # it has two to four. An H200 took 0.91 to 0.93 of the plan for 2,048 and 8,192 tokens.
    assert taken <= planned <= 3 * taken


@pytest.mark.parametrize("room", [3e7, 1e8, 1e12])
def test_auto_is_the_largest_context_that_fits(
    room: float, model_file: MakeModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(memory, "machine_memory", lambda: (int(room), "a test"))
    path = model_file(TinySpec(context_length=100_000))
    plan = open_model(path).memory
    assert plan.fits
    assert plan.context == plan.largest
    assert memory.LEAST_CONTEXT <= plan.context <= 100_000
    assert plan.context == 100_000 or not open_model(path, context=plan.context + 1).memory.fits
    assert (plan.context == 100_000) == (room == 1e12)


@pytest.mark.parametrize("context", [0, -1, 4097])
def test_a_context_that_the_model_does_not_have_is_refused(context: int, model_file: MakeModel) -> None:
    with pytest.raises(InputError, match=f"context is {context:,}; it must be 1 to 4,096, .* made for$"):
        open_model(model_file(TinySpec()), context=context)


def test_a_refusal_names_the_largest_context_that_fits(model_file: MakeModel, monkeypatch: pytest.MonkeyPatch) -> None:
    """However small, and also where more is asked for than the model has."""
    path = model_file(TinySpec())
    needed = {context: open_model(path, context=context).memory.total for context in (100, 1000)}
    for room, context, says in [
        (needed[1000], 5000, r"it must be 1 to 4,096, .*; this machine has room for 9\d\d$"),
        (needed[1000], 4000, r"a context of 4,000 tokens needs .*; --context 9\d\d would fit$"),
        (needed[100], 4000, r"a context of 4,000 tokens needs .*; close .* or .* \(--context \d\d would fit\)$"),
        (1000, 4000, r"\d.gguf needs .* this machine has 1.0 kB to give; close .* smaller quantisation$"),
    ]:
        monkeypatch.setattr(memory, "machine_memory", lambda room=room: (room, "a test"))
        with pytest.raises(InputError, match=says):
            load_model(path, context=context)


def test_advice_fits_although_a_little_less_is_free_by_then(
    model_file: MakeModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Free RAM is never twice the same: what a refusal advises is tried with 4 % less."""
    path = model_file(TinySpec(context_length=100_000))
    room = 300_000_000
    monkeypatch.setattr(memory, "machine_memory", lambda: (room, "a test"))
    with pytest.raises(InputError, match=r"; --context \d+ would fit$") as refused:
        load_model(path, context=100_000)
    advised = int(str(refused.value).split()[-3])
    with pytest.raises(InputError, match=rf"this machine has room for {advised:,}$"):
        open_model(path, context=100_001)
    monkeypatch.setattr(memory, "machine_memory", lambda: (int(0.96 * room), "a test"))
    assert open_model(path, context=advised).memory.fits
    assert open_model(path).memory.largest < 1.1 * advised, "and it is not much less than would fit"


def test_16_bits_take_half_the_cache(model_file: MakeModel) -> None:
    plans = [open_model(model_file(TinySpec()), dtype).memory for dtype in (mx.float32, mx.bfloat16)]
    assert plans[0].cache == 2 * plans[1].cache
    assert plans[0].weights == plans[1].weights


def test_the_longest_context_of_the_real_model_takes_in_8_bits_less_than_32_kb_a_token() -> None:
    plans = [glm_flash_memory(202_752, kv_bits=kv_bits) for kv_bits in (8, 16)]
    assert [plan.cache / 202_752 for plan in plans] == [47 * 672, 47 * 576 * activation_dtype().size]
    assert 47 * 672 < 32_768


# --- MLX's limits


@pytest.mark.parametrize("room", ["plenty", "just enough"])
@pytest.mark.parametrize("error", [None, RuntimeError, KeyboardInterrupt])
def test_limits_hold_within_the_block_and_are_put_back(
    room: str, error: type[BaseException] | None, model_file: MakeModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On Metal, which is only pretended here: no more is wired than there is."""
    limits = {"cache": 11, "wired": 22}

    def setting(name: str) -> Callable[[int], int]:
        def put(value: int) -> int:
            before, limits[name] = limits[name], value
            return before

        return put

    monkeypatch.setattr(mx, "set_cache_limit", setting("cache"))
    monkeypatch.setattr(mx, "set_wired_limit", setting("wired"))
    monkeypatch.setattr(mx.metal, "is_available", lambda: True)
    monkeypatch.setattr(mx, "default_device", lambda: mx.Device(mx.gpu))
    plan = replace(open_model(model_file(TinySpec()), mx.float32).memory, kept=1000)
    plan = replace(plan, available=plan.total if room == "just enough" else 10**12)
    with pytest.raises(error) if error else nullcontext(), plan.limits():
        assert limits == {"cache": 1000 if room == "just enough" else plan.scratch, "wired": plan.total}
        if error:
            raise error
    assert limits == {"cache": 11, "wired": 22}


def test_nothing_is_wired_without_metal(model_file: MakeModel, monkeypatch: pytest.MonkeyPatch) -> None:
    if mx.metal.is_available():
        monkeypatch.setattr(mx, "default_device", lambda: mx.Device(mx.cpu))
    monkeypatch.setattr(mx, "set_wired_limit", None)
    with open_model(model_file(TinySpec()), mx.float32).memory.limits():
        pass


# --- what a machine offers


@pytest.mark.parametrize(
    ("device", "offers"),
    [
        ({"max_recommended_working_set_size": 22, "memory_size": 32}, (22, "Metal's recommended working set")),
        ({"free_memory": 5, "total_memory": 80}, (5, "free memory of the GPU")),
    ],
)
def test_a_gpu_says_what_it_has(device: dict[str, int], offers: object, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mx, "device_info", lambda: device)
    assert memory.machine_memory() == offers


@pytest.mark.parametrize(("room", "least"), [(None, False), (-1, True), (1000, True), (1 << 62, False)])
def test_a_cpu_has_free_ram_or_what_its_container_leaves(
    room: int | None, least: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(mx, "device_info", lambda: {"architecture": "x86_64"})
    monkeypatch.setattr(memory, "_cgroup_room", lambda: room)
    found, source = memory.machine_memory()
    if least:
        assert (found, source) == (max(0, int(room or 0)), "left of this container's memory limit")
    else:
        assert source == "free RAM"
        assert found == pytest.approx(psutil.virtual_memory().available, rel=0.2)


UNDER_A_LIMIT = """
import resource, sys
import psutil
from glm_mlx import generate, session
used = psutil.Process().memory_info()
limit = (used.vms if sys.argv[1] == "RLIMIT_AS" else used.data) + int(sys.argv[2])
resource.setrlimit(getattr(resource, sys.argv[1]), (limit, limit))
sys.exit(generate.main(["hi", "-n", "1", *sys.argv[3:]]))
"""
ON_LINUX = pytest.mark.skipif(sys.platform != "linux", reason="other systems do not enforce these limits")


@ON_LINUX
@pytest.mark.parametrize("kind", ["RLIMIT_AS", "RLIMIT_DATA"])
@pytest.mark.parametrize(("more", "code"), [(2e6, 2), (2e7, 2), (6e7, 2), (1e11, 0)])
def test_a_limit_of_the_process_is_met_by_one_line_and_no_signal(kind: str, more: float, code: int) -> None:
    """MLX on a CPU writes through a null pointer where it gets no memory, and threads need stacks."""
    command = [sys.executable, "-c", UNDER_A_LIMIT, kind, str(int(more)), "-m", str(SMALL_MODEL)]
    done = subprocess.run(command, cwd=Path(__file__).parents[1], capture_output=True, text=True, timeout=60)
    assert done.returncode == code
    if code:
        assert re.fullmatch(r"error: (out of memory: .*|.*\(ulimit\) leaves .* raise ulimit -[vd].*)\n", done.stderr)


@ON_LINUX
@pytest.mark.parametrize(("kind", "of_thread"), [("AS", memory.THREAD_HEAP), ("DATA", 0)])
def test_a_limit_of_the_process_leaves_what_is_not_taken_and_not_to_come(
    kind: str, of_thread: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Stacks of the threads that load the file, and the heap that glibc sets aside for each, count as to come."""
    unlimited = dict.fromkeys((resource.RLIMIT_AS, resource.RLIMIT_DATA), (resource.RLIM_INFINITY,) * 2)
    limits = {**unlimited, resource.RLIMIT_STACK: (1 << 23,) * 2}
    monkeypatch.setattr(resource, "getrlimit", limits.__getitem__)
    monkeypatch.setattr(os, "cpu_count", lambda: 3)
    assert memory._ulimit_rooms() == []
    used = psutil.Process().memory_info()
    taken = used.vms if kind == "AS" else used.data  # by the tests before this one, too
    limits[getattr(resource, f"RLIMIT_{kind}")] = (taken + 10**10,) * 2
    (found,) = memory._ulimit_rooms()
    left = 10**10 - 8 * ((1 << 23) + of_thread) - memory.PROCESS_RESERVE
    assert found[0] == pytest.approx(left, abs=2e7)
    monkeypatch.setattr(mx, "device_info", lambda: {"architecture": "x86_64"})
    limits[getattr(resource, f"RLIMIT_{kind}")] = (10**6,) * 2
    assert memory.machine_memory() == (0, found[1])


@pytest.mark.parametrize("says", ["can't start new thread", "Resource temporarily unavailable"])
def test_a_thread_that_cannot_start_is_a_lack_of_memory(says: str) -> None:
    assert is_out_of_memory(RuntimeError(says))


def group(folder: Path, version: int, limit: object, used: int, files: int) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    names = ("memory.max", "memory.current") if version == 2 else ("memory.limit_in_bytes", "memory.usage_in_bytes")
    total = "" if version == 2 else "total_"
    (folder / names[0]).write_text(f"{limit}\n")
    (folder / names[1]).write_text(f"{used}\n")
    stat = f"anon 5\n{total}inactive_file {files}\n{total}active_file 7\nunevictable 0\n"
    (folder / "memory.stat").write_text(stat)


@pytest.mark.parametrize("version", [1, 2])
def test_the_tightest_group_counts_and_pages_of_files_make_room(version: int, tmp_path: Path) -> None:
    """Version 1 and 2 of Linux's control groups, as their documentation describes the files."""
    top = tmp_path / "mount" if version == 2 else tmp_path / "mount" / "memory"
    (tmp_path / "cgroup").write_text("0::/a/b\n" if version == 2 else "9:name=systemd:/x\n4:cpu,memory:/a/b\n0::/\n")

    def room() -> int | None:
        return memory._cgroup_room(tmp_path / "cgroup", tmp_path / "mount")

    assert room() is None
    group(top, version, "max" if version == 2 else 9223372036854771712, 700, 10)
    assert (room() or 1 << 60) > 1 << 50, "no limit"
    group(top / "a", version, 1000, 700, 93)
    assert room() == 1000 - 700 + 93 + 7
    group(top / "a" / "b", version, 5000, 10, 0)
    assert room() == 400
    group(top / "a" / "b", version, 300, 200, 0)
    assert room() == 107
    assert memory._cgroup_room(tmp_path / "nothing", tmp_path / "mount") is None


# --- no growth

ROUND = 250  # tokens of an answer; then the context is full, and another prompt begins


def test_memory_does_not_grow_with_the_tokens_generated(pytestconfig: pytest.Config) -> None:
    """Answer after answer in a full context, with everything a sampler can remember. By hand: --soak-tokens 100000."""
    params: dict[str, Any] = {"repetition_penalty": 1.1, "frequency_penalty": 0.1, "logprobs": 2, "top_k": 50}
    engine, process = Engine(load_model(SMALL_MODEL).model, context=ROUND + 6), psutil.Process()
    count, seen = 0, list[tuple[int, int, int]]()
    while count < max(4 * ROUND, pytestconfig.getoption("--soak-tokens")):
        prompt = [3 + count // ROUND % 1000, 5, 7, 11, 13, 17]
        count += sum(1 for _ in engine.generate(prompt, SamplingParams(seed=count, **params), ROUND))
        seen.append((memory_held(), mx.get_cache_memory(), process.memory_info().rss))
    settled, last = seen[1], seen[-1]
    print(
        f"after {count:,} tokens (after {2 * ROUND}): active, kept, resident", *map("{:,} ({:,})".format, last, settled)
    )
    assert count == ROUND * len(seen)
    # An array that MLX gives a kept buffer counts with all of that buffer, so an array that moves may add a few bytes.
    # The smallest thing to keep of a token, its id, has four.
    assert last[0] < settled[0] + count - 2 * ROUND, "MLX holds arrays that it did not hold before"
    assert last[1] < settled[1] + (1 << 20)
    assert last[2] < settled[2] + (8 << 20)
