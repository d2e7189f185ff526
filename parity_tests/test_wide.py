"""A prompt in 16 bits: the weights' values and the results are rounded once each, and nobody sees a later row."""

import mlx.core as mx
import numpy as np
import pytest

from glm_mlx import checkup
from glm_mlx.batch import Batch
from glm_mlx.cache import KvBits
from glm_mlx.engine import PREFILL_CHUNK, WIDE_CHUNK, Engine, prefill_chunk
from glm_mlx.load import load_model
from glm_mlx.make_tiny import GLM_FLASH
from glm_mlx.model_cases import prompt_cases
from glm_mlx.sampling import SamplingParams
from kernels import wide
from kernels.check import Result
from kernels.check import check as check_kernel
from kernels.mla_decode import attend_ops
from kernels.planes import QuantizedTensor
from kernels.qmv import head_qmv_ops, qmv_ops
from kernels.rows import RowFormat
from kernels.tiles import tiles_shape
from parity_tests.budgets import check
from parity_tests.compare import compare_layers, memory_held, to_numpy
from parity_tests.conftest import MakeModel
from parity_tests.test_doctor import with_kernels
from parity_tests.test_layers import assert_taps, tokens
from parity_tests.test_ops import LATENT, attention_by_hand, queries_and_rows
from parity_tests.test_quants import EVERY, weight
from parity_tests.variants import VARIANTS

MANY = wide.LEAST_TOKENS


@pytest.fixture
def on_cuda(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a GPU, as far as this module is concerned."""
    monkeypatch.setattr(wide, "_on_cuda", lambda: True)


def test_only_many_tokens_in_16_bits_on_cuda_come_here(monkeypatch: pytest.MonkeyPatch) -> None:
    for on_cuda in (False, True):
        monkeypatch.setattr(wide, "_on_cuda", lambda on_cuda=on_cuda: on_cuda)
        assert wide.applies(MANY, mx.bfloat16) == on_cuda
        assert wide.applies(MANY, mx.float16) == on_cuda
        assert not wide.applies(MANY - 1, mx.bfloat16)
        assert not wide.applies(MANY, mx.float32)
        few, far = wide.FEW_TOKENS, wide.FAR_ROWS
        for most, rows in ((few, 0), (few // 2, far), (few // 4, 3 * far)):
            assert wide.are_few(most, rows, mx.bfloat16) == wide.are_few(1, rows, mx.float16) == on_cuda
            assert not wide.are_few(most + 1, rows, mx.bfloat16)
            assert not wide.are_few(most, rows, mx.float32)


@pytest.mark.parametrize("dtype", [mx.bfloat16, mx.float16])
@pytest.mark.parametrize("kind", EVERY)
def test_a_value_of_a_weight_is_rounded_once(kind: str, dtype: mx.Dtype) -> None:
    w, values = weight(kind, (64, 512), 1)
    want = to_numpy(mx.array(values.astype(np.float32)).astype(dtype))
    assert (to_numpy(wide.expand(w, dtype)) == want).all()


@pytest.mark.parametrize("dtype", [mx.bfloat16, mx.float16])
@pytest.mark.parametrize("kind", EVERY)
def test_products_in_16_bits_agree_with_float64(kind: str, dtype: mx.Dtype, on_cuda: None) -> None:
    w, values = weight(kind, (96, 512), 2)
    x = mx.random.normal((2, MANY, 512), key=mx.random.key(0)).astype(dtype)
    got = qmv_ops(x, w)
    assert got.dtype == dtype
    check("matmul, 16-bit", to_numpy(got), to_numpy(x) @ values.T, f"{kind}, {dtype}")


def test_every_head_has_its_own_matrix(on_cuda: None) -> None:
    w, values = weight("Q4_0", (3, 40, 64), 3)
    x = mx.random.normal((2, 3, MANY, 64), key=mx.random.key(1)).astype(mx.bfloat16)
    check("matmul, 16-bit", to_numpy(head_qmv_ops(x, w)), to_numpy(x) @ values.swapaxes(-1, -2), "heads")


def attention_errors(q: np.ndarray, rows: np.ndarray, offset: int, where: str) -> None:
    """Both as a bfloat16 model holds them."""
    q16, rows16 = (mx.array(a).astype(mx.bfloat16) for a in (q, rows))
    got = wide.attend(q16[..., :LATENT], q16[..., LATENT:], rows16, 0.25)
    assert got.dtype == mx.bfloat16
    want = [attention_by_hand(*one, offset) for one in zip(to_numpy(q16), to_numpy(rows16), strict=True)]
    check("attention, 16-bit", to_numpy(got), want, where)


@pytest.mark.parametrize(("length", "offset", "at_once"), [(64, 0, 64), (65, 7, 32), (70, 130, 1), (96, 3, 32)])
def test_attention_agrees_with_float64_and_sees_no_later_row(
    length: int, offset: int, at_once: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(wide, "queries_at_once", lambda heads, rows: at_once)
    q, rows = queries_and_rows(2, length, offset + length)
    attention_errors(q, rows, offset, f"{length} queries at {offset}, {at_once} at once")


@pytest.mark.parametrize("at_once", [16_384, 96, 40])
def test_rows_in_8_bits_are_those_that_are_stored(at_once: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """A value is the product of a quant and a float16, which float16 rounds as it would the exact value."""
    monkeypatch.setattr(wide, "UNPACKED", at_once)
    q, values = queries_and_rows(1, 64, 96)
    packed = RowFormat(LATENT, values.shape[-1] - LATENT, mx.uint8)
    rows = packed.store(mx.array(values))
    assert (packed.load(rows, mx.float16) == packed.load(rows).astype(mx.float16)).all()
    q16 = mx.array(q).astype(mx.bfloat16)
    got = wide.attend(q16[..., :LATENT], q16[..., LATENT:], rows, 0.25)
    want = [attention_by_hand(*one, 32) for one in zip(to_numpy(q16), to_numpy(packed.load(rows)), strict=True)]
    check("attention, 16-bit", to_numpy(got), want, "rows in 8 bits")


def test_scores_of_some_tens_stay_near_float64() -> None:
    """In bfloat16 they would not: it tells 64 from 64.5 only."""
    q, rows = queries_and_rows(1, 64, 80)
    attention_errors(3 * q, 3 * rows, 16, "large scores")


@pytest.mark.parametrize("rows", [1, 511, 512, 16_384, 202_752])
@pytest.mark.parametrize("heads", [1, 20, 80])
def test_scores_stay_within_their_bound(heads: int, rows: int) -> None:
    count = wide.queries_at_once(heads, rows)
    assert 1 <= count <= wide.QUERIES
    assert heads * count * rows <= wide.SCORES
    assert count < wide.ALIGNED or count % wide.ALIGNED == 0


def test_a_result_that_is_started_waits_for_the_oldest_of_many_and_no_other(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[tuple[str, int]] = []
    results = [mx.array([i]) for i in range(wide.UNDER_WAY + 2)]
    monkeypatch.setattr(wide, "_started", [])
    for name in ("async_eval", "eval"):
        monkeypatch.setattr(mx, name, lambda x, name=name: calls.append((name, results.index(x))))
    for result in results:
        assert wide.start(result) is result
    last = wide.UNDER_WAY + 1
    handed_over = [("async_eval", i) for i in range(last)]
    assert calls == [*handed_over, ("eval", 0), ("async_eval", last), ("eval", 1)]


def test_the_host_waits_where_a_prompt_holds_more_than_it_may(monkeypatch: pytest.MonkeyPatch) -> None:
    """MLX frees late, at worst in the middle of the next turns."""
    held = 1000
    active = iter([held + wide.SCRATCH, held + wide.SCRATCH + 1, held + wide.SCRATCH + 1, held])
    waits: list[str] = []
    monkeypatch.setattr(mx, "get_active_memory", lambda: next(active))
    monkeypatch.setattr(mx, "synchronize", lambda: waits.append("synchronize"))
    monkeypatch.setattr(wide.time, "sleep", lambda seconds: waits.append("sleep"))
    monkeypatch.setattr(wide, "FREEING", 60)
    monkeypatch.setattr(wide, "_started", [])
    with wide.within(held):
        wide.start(mx.array([0]))
        assert (waits, len(wide._started)) == ([], 1)
        wide.start(mx.array([1]))
        assert (waits, len(wide._started)) == (["synchronize", "sleep"], 0)
    monkeypatch.setattr(mx, "get_active_memory", lambda: 1 << 60)
    wide.start(mx.array([2]))
    assert len(waits) == 2


@pytest.mark.parametrize("sequences", [None, 3])
def test_what_a_prompt_may_hold_is_counted_from_its_cache(
    sequences: int | None, model_file: MakeModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The cache, of all sequences, grows within the prompt, and what it takes is none of the scratch."""
    given: list[int] = []
    within = wide.within
    monkeypatch.setattr(wide, "within", lambda held: given.append(held) or within(held))
    model = load_model(model_file(VARIANTS["GLM Q4_0, output Q6_K"]), mx.float32).model
    reader = Engine(model, chunk=32) if sequences is None else Batch(model, sequences, chunk=32)
    for prompt in (tokens(40), tokens(300)):
        before, grown = memory_held(), reader.cache.nbytes
        if isinstance(reader, Engine):
            list(reader.generate(prompt, SamplingParams(temperature=0), 1))
        else:
            reader([prompt] * len(reader.cache.offsets))
        assert abs(given.pop() - before - (reader.cache.nbytes - grown)) < 1 << 16


def test_a_layer_has_the_experts_of_a_few_tiles_at_a_time_beside_the_next(
    model_file: MakeModel, on_cuda: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is expanded for experts is started, in turn, and nothing that is large lies between two turns."""
    started: list[tuple[int, ...]] = []
    monkeypatch.setattr(wide, "TILES", 4)
    monkeypatch.setattr(wide, "start", lambda result: started.append(tuple(result.shape)) or result)
    loaded = load_model(model_file(VARIANTS["GLM Q4_0, output Q6_K"]), mx.bfloat16)
    cfg, count = loaded.config, MANY
    loaded.model.hidden_states(mx.array([tokens(count)]) % cfg.vocab_size, loaded.model.new_cache())
    tiles, rows = tiles_shape(count * cfg.num_experts_per_tok, cfg.num_experts)
    d, f = cfg.hidden_size, cfg.moe_intermediate_size
    attention = [(1, count, cfg.kv_lora_rank), (1, cfg.num_heads, count, cfg.kv_lora_rank)]  # values, results
    layer = (1, count, d)
    turns = [min(4, tiles - begin) for begin in range(0, tiles, 4)]
    experts = [(some, rows, width) for some in turns for width in (f, d)]
    moe = [(tiles, rows, d), *experts, (count, cfg.num_experts_per_tok, d)]
    assert len(turns) > 1
    assert started == [*attention, layer, *[*attention, *moe, layer] * (cfg.num_layers - cfg.first_k_dense)]


@pytest.mark.parametrize("name", ["GLM Q4_0, output Q6_K", "GLM Unsloth Q4_0", "DeepSeek-V2-Lite"])
def test_a_prompt_in_16_bits_stays_near_the_reference(name: str, model_file: MakeModel, on_cuda: None) -> None:
    errors = list(compare_layers(model_file(VARIANTS[name]), tokens(MANY + 6), dtype=mx.bfloat16))
    assert_taps(errors, f"{name}, wide")


def test_a_prompt_in_16_bits_stays_near_the_reference_at_full_width(model_file: MakeModel, on_cuda: None) -> None:
    """Layer by layer, with tiles of every expert."""
    errors = list(compare_layers(model_file(GLM_FLASH), tokens(MANY), dtype=mx.bfloat16))
    assert_taps(errors, "full width, wide")


def test_a_prompt_in_16_bits_is_as_near_to_float32_in_any_chunks(model_file: MakeModel, on_cuda: None) -> None:
    """On both sides of where expanding begins, and with an end by steps of eight tokens."""
    file, prompt = model_file(VARIANTS["GLM Q4_0, output Q6_K"]), tokens(250)
    exact = Engine(load_model(file, mx.float32).model)._prefill(prompt, lambda *_: None)
    model = load_model(file, mx.bfloat16).model
    for chunk in (MANY - 1, MANY, MANY + 1, 200, len(prompt)):
        parts = list[int]()
        logits = Engine(model, chunk=chunk)._prefill(prompt, lambda done, _, parts=parts: parts.append(done))
        assert parts[1] == chunk
        if chunk < len(prompt):
            assert parts[-2] == len(prompt) - 1, "the last ones one by one"
        check("logits, 16-bit", to_numpy(logits), to_numpy(exact), f"chunks of {chunk}")


def test_attention_of_a_prompt_takes_no_more_memory_for_more_queries(
    on_cuda: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The scores of a few queries at a time, of the turns under way, where all of them would be 16 times as many."""
    monkeypatch.setattr(wide, "QUERIES", 32)
    q, rows = (mx.array(a).astype(mx.bfloat16) for a in queries_and_rows(1, 512, 4096))
    mx.eval(q, rows)
    taken = []
    for _ in range(3):  # MLX frees late
        held = mx.get_active_memory()
        mx.reset_peak_memory()
        mx.eval(attend_ops(q[..., :LATENT], q[..., LATENT:], rows, 0.25))
        taken.append(mx.get_peak_memory() - held)
    scores = 2 * 3 * 32 * 4096
    copies = 2 * (2 * rows.size + 3 * q.size)  # keys and values in float16, queries and results
    assert scores < min(taken) <= (wide.UNDER_WAY + 1) * scores + copies


def test_scores_are_masked_where_they_are(on_cpu: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """MLX changes them in place, and makes probabilities of them there, or a turn would have them twice or thrice."""
    monkeypatch.setattr(wide, "start", lambda result: result)
    length, count = 64, 16_384
    q, rows = (mx.array(a).astype(mx.bfloat16) for a in queries_and_rows(1, length, count))
    scores = 2 * q.shape[1] * length * count
    mx.eval(q, rows)
    held = memory_held()
    mx.eval(wide.attend(q[..., :LATENT], q[..., LATENT:], rows, 0.25))
    keys_and_values = 2 * 2 * rows.size
    assert 0.9 * scores < mx.get_peak_memory() - held - keys_and_values < 1.5 * scores


def test_every_type_of_a_model_is_checked_before_it_is_expanded(
    model_file: MakeModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(wide, "_on_cuda", lambda: False)
    loaded = load_model(model_file(VARIANTS["GLM Unsloth Q4_0"]), mx.bfloat16)
    assert prompt_cases(loaded.model) == []
    monkeypatch.setattr(wide, "_on_cuda", lambda: True)
    cases = prompt_cases(loaded.model)
    found = {w.type.name for w in loaded.weights.values() if isinstance(w, QuantizedTensor)}
    assert sorted(case.types for case in cases) == sorted((name,) for name in found)
    with with_kernels() as launches:
        assert [check_kernel(case, timed=False) for case in cases] == [Result(True, True)] * len(cases)
    assert launches == ["expand"] * len(cases)
    assert {case.dtype for case in cases} == {"bfloat16"}


def test_a_prompt_is_read_in_larger_chunks_there(model_file: MakeModel, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(wide, "_on_cuda", lambda: False)
    model = load_model(model_file(VARIANTS["GLM Q4_0, output Q6_K"]), mx.bfloat16).model
    assert Engine(model).chunk == prefill_chunk(mx.bfloat16) == PREFILL_CHUNK
    monkeypatch.setattr(wide, "_on_cuda", lambda: True)
    assert Engine(model).chunk == prefill_chunk(mx.bfloat16) == WIDE_CHUNK
    assert prefill_chunk(mx.float32) == PREFILL_CHUNK


@pytest.mark.parametrize("kv_bits", [16, 8])
@pytest.mark.parametrize("context", [512, 2048, 32_768, 202_752])
def test_the_plan_has_less_than_a_gigabyte_and_a_half_of_scratch(
    context: int, kv_bits: KvBits, monkeypatch: pytest.MonkeyPatch
) -> None:
    """For GLM-4.7-Flash: the experts of 32 tiles, 201 MB, of five turns, and the rows of all tiles."""
    monkeypatch.setattr(wide, "_on_cuda", lambda: True)
    monkeypatch.setattr(checkup, "activation_dtype", lambda: mx.bfloat16)
    scratch = checkup.glm_flash_memory(context, kv_bits).scratch
    assert 5 * 2 * 32 * 1536 * 2048 < scratch <= 1.45e9
