"""Loading: every way a file can be laid out gives the same weights, in bounded memory."""

import json
import os
import re
import subprocess
import sys
import tracemalloc
from dataclasses import replace
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
from gguf import GGUFReader
from gguf.constants import GGMLQuantizationType

from glm_mlx.config import Config
from glm_mlx.errors import InputError
from glm_mlx.gguf import GGUFFile
from glm_mlx.hub import choose_files, resolve
from glm_mlx.load import load_model, open_model
from glm_mlx.make_tiny import GLM_FLASH, TinySpec, make_tiny
from glm_mlx.weights import plan
from kernels.planes import Weight, dequantize_ops
from parity_tests.compare import load_part, memory_held
from parity_tests.conftest import MakeModel
from parity_tests.fuzz import File
from parity_tests.variants import VARIANTS


def values(weight: Weight) -> np.ndarray:
    return np.array(dequantize_ops(weight))


def assert_same_weights(a: dict[str, Weight], b: dict[str, Weight]) -> None:
    assert a.keys() == b.keys()
    for name in a:
        np.testing.assert_array_equal(values(a[name]), values(b[name]), err_msg=name)


@pytest.mark.parametrize("name", VARIANTS)
def test_metadata_and_tensor_positions_are_those_of_gguf_reader(name: str, model_file: MakeModel) -> None:
    """Our header walk against the gguf package's, for every key and tensor."""
    path = model_file(VARIANTS[name])
    ours, theirs = GGUFFile(path), GGUFReader(path)
    for key, field in theirs.fields.items():
        if not key.startswith("GGUF."):
            assert ours.metadata[key] == field.contents(), key
    assert ours.metadata.keys() == {key for key in theirs.fields if not key.startswith("GGUF.")}
    assert list(ours.tensors) == [tensor.name for tensor in theirs.tensors]
    for tensor in theirs.tensors:
        info = ours.tensors[tensor.name]
        assert (info.type, info.offset, info.nbytes) == (tensor.tensor_type, tensor.data_offset, tensor.n_bytes)
        assert info.shape == tuple(int(n) for n in reversed(tensor.shape))
        np.testing.assert_array_equal(ours.raw(tensor.name).reshape(-1), tensor.data.view(np.uint8).reshape(-1))


def test_a_split_file_loads_as_the_whole(tmp_path: Path) -> None:
    spec = TinySpec(seed=5)
    whole, parts = (
        make_tiny(tmp_path / "whole.gguf", spec),
        make_tiny(tmp_path / "parts.gguf", spec, split_max_tensors=9),
    )
    assert re.fullmatch(r"parts-00001-of-0000\d\.gguf", parts.name)
    assert_same_weights(load_part(parts, lambda name: True)[1], load_part(whole, lambda name: True)[1])
    assert load_model(parts).tokenizer.encode("the same") == load_model(whole).tokenizer.encode("the same")


def test_version_2_loads_as_version_3(tmp_path: Path) -> None:
    path = make_tiny(tmp_path / "3.gguf", TinySpec())
    data = bytearray(path.read_bytes())
    assert data[4:8] == b"\x03\0\0\0"
    data[4] = 2
    (tmp_path / "2.gguf").write_bytes(data)
    assert_same_weights(load_part(tmp_path / "2.gguf", lambda n: True)[1], load_part(path, lambda n: True)[1])


def test_the_mtp_layer_stays_readable_and_is_not_run(model_file: MakeModel) -> None:
    path = model_file(TinySpec(mtp=True))
    gguf = GGUFFile(path)
    cfg = Config.from_metadata(gguf.metadata, gguf.tensors)
    assert (cfg.num_layers, cfg.num_mtp_layers) == (3, 1)
    assert gguf.raw("blk.3.nextn.eh_proj.weight").size > 0
    assert all(not info.name.startswith("blk.3.") for _, info in plan(gguf, cfg))


@pytest.mark.parametrize(
    ("spec", "gating"),
    [
        (TinySpec(write_gating=False), "sigmoid"),
        (TinySpec(write_gating=False, gating="softmax"), "softmax"),
        (TinySpec(gating="softmax"), "softmax"),
    ],
)
def test_gating_is_read_or_inferred_from_the_bias(spec: TinySpec, gating: str, model_file: MakeModel) -> None:
    gguf = GGUFFile(model_file(spec))
    assert Config.from_metadata(gguf.metadata, gguf.tensors).gating == gating


def test_ollamas_architecture_name_is_known(model_file: MakeModel) -> None:
    gguf = GGUFFile(model_file(TinySpec()))
    renamed = {key.replace("deepseek2.", "glm4moelite."): value for key, value in gguf.metadata.items()}
    renamed["general.architecture"] = "glm4moelite"
    assert replace(Config.from_metadata(renamed, gguf.tensors), architecture="deepseek2") == Config.from_metadata(
        gguf.metadata, gguf.tensors
    )


def test_sampling_defaults_come_from_the_file_else_from_the_makers(model_file: MakeModel) -> None:
    gguf = GGUFFile(model_file(TinySpec()))
    makers = Config.from_metadata(gguf.metadata, gguf.tensors).sampling
    assert (makers.temperature, makers.top_p, makers.top_k, makers.min_p) == (1.0, 0.95, 0, 0.0)
    said = {**gguf.metadata, "general.sampling.temp": 0.7, "general.sampling.top_p": 1.0, "general.sampling.top_k": 20}
    file = Config.from_metadata(said, gguf.tensors).sampling
    assert (file.temperature, file.top_p, file.top_k) == (0.7, 1.0, 20)


def test_real_dimensions_are_read_as_published(model_file: MakeModel) -> None:
    gguf = GGUFFile(model_file(GLM_FLASH))
    cfg = Config.from_metadata(gguf.metadata, gguf.tensors)
    assert (cfg.qk_head_dim, cfg.qk_nope_head_dim, cfg.qk_rope_head_dim, cfg.v_head_dim) == (256, 192, 64, 256)
    assert (cfg.cache_dim, cfg.softmax_scale, cfg.routed_scaling_factor) == (576, 1 / 16, pytest.approx(1.8))
    assert 47 * cfg.cache_dim * 2 == 54144, "bytes a token in 16 bits"


LOAD_AND_MEASURE = """
import json, pathlib, re, resource, sys
import mlx.core as mx
mx.set_default_device(mx.cpu)
from glm_mlx.load import load_model
loaded = load_model(sys.argv[1])
held, active = sum(w.nbytes for w in loaded.weights.values()), mx.get_active_memory()
status = pathlib.Path("/proc/self/status")  # Linux counts in ru_maxrss what the parent process held at the start
if status.exists():
    peak = 1024 * int(re.search(r"VmHWM:\\s*(\\d+)", status.read_text())[1])
else:
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
print(json.dumps({"peak": peak, "held": held, "active": active}))
"""


def test_loading_holds_no_second_copy(model_file: MakeModel) -> None:
    """Peak memory at most the file's size, 10 % and 200 MB, for a whole process; 480 MB of real shapes."""
    path = model_file(replace(GLM_FLASH, overrides={"ffn": "Q5_K"}))
    size = path.stat().st_size
    assert size > 4e8
    command = [sys.executable, "-c", LOAD_AND_MEASURE, path]
    figures = json.loads(subprocess.run(command, capture_output=True, check=True, cwd=Path(__file__).parents[1]).stdout)
    assert size < figures["peak"] <= 1.1 * size + 200e6
    assert figures["held"] <= figures["active"] <= 1.03 * size


@pytest.mark.parametrize("is_fused", [False, True])
def test_an_expanded_tensor_stands_in_memory_once(is_fused: bool, tmp_path: Path) -> None:
    """On all threads together, in numpy (which tells tracemalloc) and in MLX; also where one tensor becomes two."""
    spec = TinySpec(layers=2, hidden_size=512, num_experts=8, moe_intermediate_size=256, fused_gate_up=is_fused)
    file = File.read(make_tiny(tmp_path / "q4.gguf", spec))
    for tensor in file.tensors:
        if "_exps" in tensor.name:
            tensor.type = int(GGMLQuantizationType.IQ4_XS)
    opened = open_model(file.with_zeros().write(tmp_path / "iq4.gguf"))
    before = memory_held()
    tracemalloc.start()
    try:
        loaded = opened.load()
        _, in_numpy = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    held = mx.get_active_memory() - before
    expanded = sum(w.nbytes for w in loaded.weights.values() if isinstance(w, mx.array) and w.ndim == 3)
    assert expanded == 3 * 8 * 256 * 512 * 4
    assert mx.get_peak_memory() - before < held + 500_000
    assert in_numpy < 2_000_000 + (os.cpu_count() or 1) * 2_000_000 < expanded


@pytest.mark.parametrize("name", ["GLM Q4_0, output Q6_K", "old file: kv_b unsplit, no gating key"])
def test_reading_needs_no_map_and_no_position(name: str, model_file: MakeModel) -> None:
    """Pieces in any order and of any length are those of the whole."""
    gguf = GGUFFile(model_file(VARIANTS[name]))
    rng = np.random.default_rng(0)
    for info in gguf.tensors.values():
        start, stop = sorted(rng.integers(0, info.nbytes + 1, 2).tolist())
        np.testing.assert_array_equal(gguf.read(info.name, start, stop), gguf.raw(info.name).reshape(-1)[start:stop])


def test_an_empty_name_is_no_folder() -> None:
    """As of a variable in a shell that is not set."""
    with pytest.raises(InputError, match="name of the model is empty"):
        resolve("")


def test_hub_names_find_one_quantisation() -> None:
    files = [
        "README.md",
        "mmproj-Q4_0.gguf",
        "M-Q4_0.gguf",
        "M-Q4_K_M.gguf",
        "M-UD-Q4_K_XL.gguf",
        "Q8_0/M-Q8_0-00002-of-00002.gguf",
        "Q8_0/M-Q8_0-00001-of-00002.gguf",
    ]
    assert choose_files(files, "q4_0") == ["M-Q4_0.gguf"]
    assert choose_files(files, "Q4_K_M") == ["M-Q4_K_M.gguf"]
    assert choose_files(files, "Q4_K") == []
    assert choose_files(files, "UD-Q4_K_XL") == ["M-UD-Q4_K_XL.gguf"]
    assert [Path(f).name for f in choose_files(files, "Q8_0")] == [
        "M-Q8_0-00001-of-00002.gguf",
        "M-Q8_0-00002-of-00002.gguf",
    ]
