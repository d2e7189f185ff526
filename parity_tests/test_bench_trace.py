"""The trace of a token: calls and bytes are the model's, kernels go to the calls that launched them."""

import json
import subprocess
import sys
import types
from argparse import Namespace
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest

import glm_mlx.model
import kernels.qmv
from bench import calls, commits, frame, gpu_time, script, subject, synthetic, trace
from bench.calls import Call, Place
from bench.gpu_time import Kernel, Timeline
from glm_mlx.model import decode_bytes
from kernels import launcher

ROOT = Path(__file__).parents[1]
COPY = {"gb_s": 2.0, "bytes": 1, "seconds": {}, "by": "wall time"}
SHORT = ["--depth", "40", "--count", "3"]


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without seconds of copying."""
    monkeypatch.setattr(frame, "copy_bandwidth", lambda: {**COPY})


@cache
def small() -> subject.Subject:
    return subject.open_subject(Namespace(model=None, synthetic=None, layers=None, mix="q4_0", kv_bits=16))


@cache
def recorded() -> list[Call]:
    return calls.record(small().model, small().weights, 40)


def launched() -> list[tuple[Call, str]]:
    return [(call, launch.op) for call in recorded() for launch, _ in call.launches]


def test_help_says_what_the_script_does() -> None:
    done = subprocess.run(
        [sys.executable, "bench/trace.py", "-h"], cwd=ROOT, capture_output=True, text=True, timeout=120
    )
    assert (done.returncode, done.stderr) == (0, "")
    for words in ("Where the time of one decoded token goes", "examples:", "--json FILE", "--with-source OP"):
        assert words in done.stdout


@pytest.mark.usefixtures("quick")
def test_a_token_of_the_small_model(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "out.json"
    assert trace.main([*SHORT, "--json", str(path)]) == 0
    report = json.loads(path.read_text())
    for phases in report["phases"].values():
        assert {name: len(samples) for name, samples in phases.items()} == dict.fromkeys(
            ("build", "dispatch", "wait", "whole", "host"), 5 + 3
        )
        for build, dispatch, wait, whole, host in zip(*phases.values(), strict=True):
            assert build + dispatch + wait == pytest.approx(whole)
            assert 0 < host < whole
    assert report["ops_by"] == "ops evaluated one by one"
    assert [row["layer"] for row in report["layers"]] == [None, *range(6), None, None]
    assert [row["part"] for row in report["layers"] if row["layer"] is None] == ["embedding", "head", "sampling"]
    entries = report["entries"]
    assert {len(entry["seconds"]) for entry in entries} == {trace.OWN_EVALUATIONS}
    assert min(min(entry["seconds"]) for entry in entries) > 0
    between = [tuple(entry["place"].values()) for entry in entries if entry["op"] == "between ops"]
    assert between == [
        *[("embedding", None)],
        *((part, i) for i in range(6) for part in ("attention", "feed-forward")),
        *[("head", None)],
    ]
    everything = sum(sum(entry["seconds"]) for entry in entries)
    assert sum(sum(row["samples"]) for row in report["ops"]) == pytest.approx(everything)
    assert sum(sum(row["samples"]) for row in report["layers"]) == pytest.approx(everything)
    found = {(row["op"], row["on"]): row for row in report["ops"]}
    gate_up = found["qmv_all", "gate_proj + up_proj"]
    assert (gate_up["calls"], gate_up["type"]) == (1, "Q4_0")
    assert found["qmv", "o_proj"]["calls"] == 6
    assert found["qmv_all", "q_a_proj + kv_a_proj"]["type"] == "Q4_0 + Q8_0"
    assert found["attend", "-"]["bytes"] == 6 * 41 * 160 * 4
    fixed, per_row = decode_bytes(small().config, small().weights, small().model.row_format)
    norms = 6 * 128 * 4  # read with the rows
    assert sum(row["bytes"] for row in report["ops"]) == pytest.approx(fixed + 41 * per_row, abs=norms)
    assert report["limit"]["by"] == "device"
    assert report["parity"]["path"] == "twins"
    table = capsys.readouterr().out
    assert "the device, which is this CPU, is the limit" in table
    assert "reckoned by MLX's limits" in table


@pytest.mark.parametrize(("ahead", "order"), [(True, [0, 0, 1, 2, 3]), (False, [0, 1, 2, 3, 3])])
def test_a_token_alone_is_waited_for_and_in_decode_the_one_before(ahead: bool, order: list[int]) -> None:
    waited: list[int] = []

    class Token:
        def __init__(self, number: int):
            self.number = number

        def __getitem__(self, index: object) -> mx.array:
            return mx.zeros((1, 1))

        def __int__(self) -> int:
            waited.append(self.number)
            return self.number

    numbers = iter(range(9))

    def sampler(logits: object) -> Any:
        return types.SimpleNamespace(token=Token(next(numbers)), arrays=list)

    engine = types.SimpleNamespace(model=small().model, _forward=lambda tokens: tokens[:, 0])
    phases = trace.Phases()
    trace.decode(engine, sampler, 3, ahead, phases)  # type: ignore[arg-type]
    assert waited == order
    assert len(phases.whole) == 3


def test_a_walk_computes_the_models_logits() -> None:
    model, places = small().model, list[Place]()
    caches = [model.new_cache() for _ in range(2)]
    for one in caches:
        synthetic.fill_cache(one, 40)
    token = mx.array([[7]], mx.int32)
    got = calls.walk(model, token, caches[0], places.append)
    assert mx.array_equal(got, model.logits(model.hidden_states(token, caches[1]))[:, 0])
    layers = [Place(part, i) for i in range(6) for part in ("attention", "feed-forward")]
    assert places == [Place("embedding"), *layers, Place("head")]
    assert caches[0].offset == 40


def test_bytes_of_the_calls_are_those_of_a_token() -> None:
    fixed, per_row = decode_bytes(small().config, small().weights, small().model.row_format)
    assert sum(call.nbytes for call in recorded()) == fixed + 41 * per_row


def test_every_call_launches_what_its_op_says_and_knows_its_layer() -> None:
    found = recorded()
    assert all(call.launches for call in found if call.op != "swiglu")
    for i in range(6):
        own = [call for call in found if call.place == Place("attention", i)]
        names = " ".join(name for call in own for name in call.weights)
        assert names == "q_a_proj kv_a_proj q_b_proj k_b v_b o_proj"
    assert found[0].place == Place("embedding")
    assert (found[-1].place, found[-1].weights, found[-1].types) == (Place("head"), ("lm_head",), ("Q6_K",))
    assert launcher.back_end("qmv") is None  # nothing is left of the recording
    assert vars(glm_mlx.model)["qmv"] is kernels.qmv.qmv


def end_of(own: list[tuple[Call, str]], layer: int) -> int:
    """The number of the last launch of a layer."""
    return max(i for i, (call, _) in enumerate(own) if call.place.layer == layer)


def timeline(own: list[tuple[Call, str]], tokens: int) -> Timeline:
    """Kernel n takes 1 + n % 7 seconds; MLX runs one of its own behind the last of layer 0, and one at the end."""
    kernels: list[Kernel] = []

    def run(name: str) -> None:
        kernels.append(Kernel(name, len(kernels), 1 + len(kernels) % 7))

    for _ in range(tokens):
        for i, (_, op) in enumerate(own):
            run(f"custom_kernel_{op}_0123456789ab__bfloat16_t_256")
            if i == end_of(own, 0):
                run("void mlx::core::cu::copy_g<float, (int)3>(float const*, float*)")
        run("void mlx::core::cu::(anonymous namespace)::arg_reduce_general<T>(int)")
    return Timeline(kernels, 9 * tokens)


def test_kernels_of_the_gpu_go_to_the_calls_that_launched_them() -> None:
    own, notes = launched(), list[str]()
    seen = timeline(own, 3)
    entries = trace.attribute(seen, recorded(), 3, notes)
    assert notes == []
    assert sum(sum(entry.seconds) for entry in entries.values()) == pytest.approx(seen.busy_seconds)
    assert sum(entry.launches for entry in entries.values()) == pytest.approx(len(own) + 2)
    a_token, of_mlx = len(own) + 2, end_of(own, 0) + 1
    copy = entries.of(Place("feed-forward", 0), "MLX: copy_g")
    assert [copy.calls, copy.launches] == pytest.approx([1, 1])
    assert copy.seconds == [1 + (token * a_token + of_mlx) % 7 for token in range(3)]
    assert len(entries.of(Place("sampling"), "MLX: arg_reduce_general").seconds) == 3
    for layer in range(6):  # a layer has the seconds of the kernels from its first to its last, token by token
        first = min(i for i, (call, _) in enumerate(own) if call.place.layer == layer) + (layer > 0)
        last = end_of(own, layer) + 1  # MLX's own is one more
        mine = [entry for entry in entries.values() if entry.place.layer == layer]
        for token in range(3):
            spent = sum(1 + (token * a_token + n) % 7 for n in range(first, last + 1))
            assert sum(entry.seconds[token] for entry in mine) == spent


def test_kernels_in_another_order_are_given_to_no_layer() -> None:
    own, notes = launched(), list[str]()
    swapped = [own[1], own[0], *own[2:]] if own[0][1] != own[1][1] else [own[-1], *own[:-1]]
    entries = trace.attribute(timeline(swapped, 2), recorded(), 2, notes)
    assert [place for place, *_ in entries] == [Place("token")] * len(entries)
    assert sum(sum(entry.seconds) for entry in entries.values()) == pytest.approx(timeline(swapped, 2).busy_seconds / 2)
    assert len(notes) == 1
    assert "not by layers" in notes[0]


@pytest.mark.parametrize(
    ("name", "short"),
    [
        ("void mlx::core::cu::copy_g<float, int>(float const*)", "copy_g"),
        ("CompiledSigmoidMultiply_float", "CompiledSigmoidMultiply_float"),
        ("Memcpy DtoD (Device -> Device)", "DtoD"),
        ("(anonymous namespace)::a<b>(c)", "a"),
        ("<>", "<>"),
    ],
)
def test_names_of_kernels_are_short(name: str, short: str) -> None:
    assert trace.short_name(name) == short


@pytest.mark.parametrize(
    ("host", "gpu", "by", "words"),
    [
        (0.97, 0.22, "host", "the host works for 97%, the GPU for 22%"),
        (0.40, 0.95, "device", "the host works for 40%, the GPU for 95%"),
        (0.85, 0.99, "device", "is the limit"),
        (0.50, 0.50, "neither", "wait for one another"),
        (0.97, None, "host", "fewer launches do"),
        (0.30, None, "device", "the rest it waits"),
    ],
)
def test_the_limit_is_who_works_all_the_time(host: float, gpu: float | None, by: str, words: str) -> None:
    phases = trace.Phases(whole=[9.0] * 5 + [0.01] * 3, host=[9.0] * 5 + [0.01 * host] * 3)
    found = trace.Found({"as in decode": phases}, busy_seconds=None if gpu is None else 0.01 * gpu)
    limit = trace.limiting(found)
    assert limit is not None
    assert limit["by"] == by
    assert words in limit["text"]
    assert "of a token's 10.00 ms" in limit["text"]


def test_commits_by_operations_and_by_elements() -> None:
    small_array, large = mx.zeros((4,)), mx.zeros((1 << 20,))
    by_ops, by_elements = (commits.Limits("a device", *numbers, True) for numbers in ((3, 99), (99, 2)))
    few = [[small_array]]
    assert [commits.commits(few * n, by_ops) for n in (0, 1, 3, 4, 5, 8, 9)] == [0, 1, 1, 1, 2, 2, 3]
    # The same array counts once in a commit on Metal, and each time on CUDA.
    assert commits.commits([[large]] * 9, by_elements) == 1
    assert commits.commits([[large]] * 9, replace(by_elements, once=False)) == 3
    others = [[mx.zeros((1 << 20,))] for _ in range(3)]
    assert commits.commits(others * 3, by_elements) == 3


def test_limits_come_from_the_device_and_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    assert commits.limits() is None  # a CPU
    monkeypatch.delenv("MLX_MAX_OPS_PER_BUFFER", raising=False)
    info = {"architecture": "applegpu_g14s", "compute_capability_major": 9, "compute_capability_minor": 0}
    monkeypatch.setattr(mx, "device_info", lambda: info)
    monkeypatch.setattr(commits, "back_end", lambda: "metal")
    assert commits.limits() == commits.Limits("Apple Max and Ultra", 50, 50, True)
    monkeypatch.setenv("MLX_MAX_OPS_PER_BUFFER", "7")
    monkeypatch.setenv("MLX_MAX_MB_PER_BUFFER", "x")
    assert commits.limits() == commits.Limits("Apple Max and Ultra", 7, 50, True)
    monkeypatch.setattr(commits, "back_end", lambda: "cuda")
    assert commits.limits() == commits.Limits("NVIDIA H100 and later", 7, 1000, False)
    info["compute_capability_major"] = 7
    assert commits.limits() == commits.Limits("NVIDIA", 7, 100, False)


@pytest.mark.parametrize("op", launcher.OPS)
def test_the_source_of_every_op_can_be_read(op: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert trace.main(["--with-source", op]) == 0
    text = capsys.readouterr().out
    assert text.startswith(f"// {op} (")
    lines = (launcher.HERE / f"{op}.metal").read_text().splitlines()
    assert "\n".join(" ".join(line.partition("//")[0].split()) for line in lines) in text
    assert "bfloat16_t" in text.rstrip().splitlines()[-1]  # the template arguments, as on a GPU
    assert "[[kernel]] void custom_kernel_" in text


def test_the_source_is_that_of_the_cache_that_was_asked_for(capsys: pytest.CaptureFixture[str]) -> None:
    texts = []
    for bits in ("16", "8"):
        assert trace.main(["--with-source", "mla_decode", "--kv-bits", bits]) == 0
        texts.append(capsys.readouterr().out)
    assert ["uint8_t" in text.rstrip().splitlines()[-1] for text in texts] == [False, True]


def test_the_source_is_that_of_the_launch_that_was_asked_for(capsys: pytest.CaptureFixture[str]) -> None:
    assert trace.main(["--with-source", "qmv:lm_head"]) == 0
    done = capsys.readouterr()
    assert "on lm_head: grid (" in done.out.splitlines()[0]
    assert "Super<Linear<6, 32>, 256>" in done.out
    assert "o_proj" in done.err
    assert script.run(lambda: trace.main(["--with-source", "qmv:nothing"])) == 2
    error = capsys.readouterr().err
    assert "a token of this model makes no launch of qmv:nothing; its launches are of " in error
    assert error.count("\n") == 1


class Event:
    def __init__(self, name: str, start: float, device_time: float, device: str = "CUDA"):
        self.name, self.device_time, self.device_type = name, device_time, f"DeviceType.{device}"
        self.time_range = types.SimpleNamespace(start=start)


def test_the_gpus_timeline_holds_kernels_and_graphs(monkeypatch: pytest.MonkeyPatch) -> None:
    """PyTorch's profiler is stood in for: what is taken from it must not change its meaning."""
    events = [
        Event("cudaGraphLaunch", 1, 0, "CPU"),
        Event("second", 40, 5),
        Event("first", 30, 2),
        Event("Context Sync", 50, 0),
        Event("cudaGraphLaunch", 60, 0, "CPU"),
        Event("cudaEventRecord", 61, 0, "CPU"),
    ]
    asked: list[object] = []

    class Profile:
        def __init__(self, use_cpu: bool, use_device: str, use_kineto: bool):
            assert (use_cpu, use_device, use_kineto) == (False, "cuda", True)

        def __enter__(self) -> "Profile":
            asked.append("on")
            return self

        def __exit__(self, *_: object) -> None:
            asked.append("off")

        @property
        def function_events(self) -> list[Event]:
            return events

    modules = [types.ModuleType(name) for name in ("torch", "torch.autograd", "torch.autograd.profiler")]
    vars(modules[-1]).update(profile=Profile)
    for module in modules:
        monkeypatch.setitem(sys.modules, module.__name__, module)
    found = gpu_time.record(lambda: asked.append("work"))
    assert asked == ["on", "work", "off"]
    assert [kernel.name for kernel in found.kernels] == ["first", "second"]
    assert [kernel.seconds for kernel in found.kernels] == pytest.approx([2e-6, 5e-6])
    assert found.commits == 2
    assert gpu_time.busy_seconds(lambda: None) == pytest.approx(7e-6)


@pytest.mark.usefixtures("quick")
def test_where_the_gpu_tells_its_time_ops_and_limit_are_by_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu_time, "available", lambda: True)
    worked: list[object] = []

    def seen(work: Any) -> Timeline:
        worked.append(work())
        return timeline(launched(), trace.GPU_TOKENS)

    monkeypatch.setattr(gpu_time, "record", seen)
    path = tmp_path / "out.json"
    assert trace.main([*SHORT, "--json", str(path)]) == 0
    report = json.loads(path.read_text())
    assert len(worked) == 1
    assert report["ops_by"] == "the GPU's own time, by CUPTI"
    assert report["gpu_kernels_a_token"] == len(launched()) + 2
    assert report["commits"]["counted_a_token"] == 9
    assert {row["layer"] for row in report["layers"]} == {None, *range(6)}
    busy = timeline(launched(), trace.GPU_TOKENS).busy_seconds / trace.GPU_TOKENS
    assert report["gpu_busy_seconds_a_token"] == pytest.approx(busy)
    assert report["limit"]["device_share"] > 1
    assert report["limit"]["by"] == "device"


@pytest.mark.usefixtures("quick")
def test_ctrl_c_keeps_what_was_measured(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def stop(*_: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(trace, "time_calls", stop)
    path = tmp_path / "out.json"
    assert trace.main([*SHORT, "--json", str(path)]) == 130
    report = json.loads(path.read_text())
    assert report["interrupted"] is True
    assert len(report["phases"]["alone"]["whole"]) == 8
    assert (report["ops"], report["layers"]) == ([], [])
    shown = capsys.readouterr().out
    assert "interrupted" in shown
    assert "as in decode" in shown


@pytest.mark.usefixtures("quick")
def test_ctrl_c_before_the_first_token_keeps_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def stop(*_: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(trace, "decode", stop)
    path = tmp_path / "out.json"
    assert trace.main([*SHORT, "--json", str(path)]) == 130
    assert json.loads(path.read_text())["limit"] is None


@pytest.mark.usefixtures("quick")
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--depth", "5000"], "depth 5,000 and more: the model's context ends at 4,096; give less"),
        (["--model", "missing.gguf"], "no such file: missing.gguf"),
        (["--json", "/"], "cannot write /; name another file with --json"),
    ],
)
def test_bad_input_is_one_line(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert script.run(lambda: trace.main(arguments)) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert message in error
    assert error.count("\n") == 1
