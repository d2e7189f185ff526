"""The engine: what it yields, what its cache holds afterwards, and what its figures mean."""

import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest

from glm_mlx.cache import STEP
from glm_mlx.engine import Engine, Step
from glm_mlx.errors import InputError, NotNumbersError
from glm_mlx.exclusive import InUseError
from glm_mlx.gguf import GGUFFile
from glm_mlx.make_tiny import TinySpec
from glm_mlx.model import Model
from glm_mlx.sampling import SamplingParams
from kernels import wide
from parity_tests.compare import load_whole, to_numpy
from parity_tests.conftest import MakeModel
from parity_tests.test_layers import tokens

GREEDY = SamplingParams(temperature=0)


@pytest.fixture(scope="module")
def model(model_file: MakeModel) -> Model:
    return load_whole(model_file(TinySpec(context_length=64)))


def greedy_by_hand(model: Model, prompt: list[int], count: int) -> list[int]:
    """No cache reuse, no look-ahead: the whole sequence again for every token."""
    ids = list(prompt)
    for _ in range(count):
        logits = to_numpy(model.logits(model.hidden_states(mx.array([ids]), model.new_cache())))
        ids.append(int(logits[0, -1].argmax()))
    return ids[len(prompt) :]


def generate(engine: Engine, prompt: list[int], count: int, params: SamplingParams = GREEDY) -> list[int]:
    return [step.token for step in engine.generate(prompt, params, count)]


def test_greedy_tokens_equal_a_run_without_cache_or_look_ahead(model: Model) -> None:
    prompt = tokens(9)
    assert generate(Engine(model, chunk=4), prompt, 12) == greedy_by_hand(model, prompt, 12)


def test_a_traced_step_gives_the_tokens_of_an_eager_one_while_the_cache_grows(model_file: MakeModel) -> None:
    """What a GPU traces once, here run without the tracing: it sees whole arrays and the position as an array."""
    long = load_whole(model_file(TinySpec(context_length=600)))
    eager, traced = Engine(long), Engine(long)
    traced._step = long.step
    for prompt, count in ((tokens(3), 280), (tokens(9), 10)):  # past the first 256 rows; then a cache to cut back
        assert generate(traced, prompt, count) == generate(eager, prompt, count)


@pytest.mark.parametrize("count", [1, 2, 5])
def test_it_yields_as_many_tokens_as_asked(model: Model, count: int) -> None:
    assert len(generate(Engine(model), tokens(3), count)) == count


def test_the_same_seed_gives_the_same_text_and_another_seed_another(model: Model) -> None:
    one, again, other = (generate(Engine(model), tokens(5), 20, SamplingParams(seed=s)) for s in (3, 3, 4))
    assert one == again != other


def test_a_stop_id_is_yielded_and_ends_it(model: Model) -> None:
    prompt = tokens(6)
    free = generate(Engine(model), prompt, 12)
    stop = free[5]
    steps = list(Engine(model).generate(prompt, GREEDY, 12, frozenset([stop])))
    assert [step.token for step in steps] == free[: free.index(stop) + 1]


def test_a_cancelled_answer_leaves_a_cache_that_goes_on_rightly(model: Model) -> None:
    """After a break at any token: the rows in the cache are those of `engine.tokens`, and the next turn is as fresh."""
    for stop_after in (1, 2, 4):
        engine = Engine(model)
        steps: list[Step] = []
        for step in engine.generate(tokens(7), GREEDY, 10):
            steps.append(step)
            if len(steps) == stop_after:
                break
        assert engine.cache.offset == len(engine.tokens) == 7 + stop_after
        following = [*engine.tokens, *tokens(3, seed=5)]
        assert generate(engine, following, 6) == greedy_by_hand(model, following, 6)
        assert engine.stats.cached_tokens == 7 + stop_after


def test_only_what_differs_from_the_last_prompt_is_computed(model: Model) -> None:
    engine, first = Engine(model), tokens(12)
    generate(engine, first, 1)
    for prompt, cached in ((first, 11), (first[:8], 7), ([*first[:5], 1, 2, 3], 5), ([9, 9], 0)):
        assert generate(engine, prompt, 4) == greedy_by_hand(model, prompt, 4)
        assert engine.stats.cached_tokens == cached


def test_prefill_is_reported_chunk_by_chunk(model: Model) -> None:
    seen: list[tuple[int, int]] = []
    list(Engine(model, chunk=4).generate(tokens(10), GREEDY, 1, on_prefill=lambda *at: seen.append(at)))
    assert seen == [(0, 10), (4, 10), (8, 10), (10, 10)]


@pytest.mark.parametrize("traced", [False, True])
@pytest.mark.parametrize("known", [0, 30])
def test_the_end_of_a_prompt_by_the_kernels_of_decode_gives_the_same(
    model: Model, traced: bool, known: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where few tokens are left they go eight at a time, then one by one; as `traced`, as on a GPU."""
    prompt = tokens(45)
    expected = generate(Engine(model), prompt, 6)
    for few in (20, 45):
        monkeypatch.setattr(wide, "are_few", lambda tokens, rows, dtype, few=few: tokens <= few)
        engine, seen, stepped = Engine(model, chunk=16), list[int](), list[int]()

        def step(tokens: mx.array, *rest: Any, stepped: list[int] = stepped) -> Any:
            stepped.append(tokens.shape[1])
            return model.step(tokens, *rest)

        if traced:
            engine._step = step
        list(engine.generate(prompt[:known] or [1], GREEDY, 1))
        steps = engine.generate(prompt, GREEDY, 6, on_prefill=lambda done, total, seen=seen: seen.append(done))
        assert [step.token for step in steps] == expected
        by_eight = {(0, 20): [0, 16, 32, 40], (0, 45): [0, 8, 16, 24, 32, 40], (30, 20): [30, 38], (30, 45): [30, 38]}
        last = by_eight[known, few][-1]  # then one by one
        assert seen == [*by_eight[known, few], *range(last + 1, 46)]
        assert set(stepped) == ({1, 8} if traced else set())


def test_a_step_of_eight_tokens_has_room_for_all_of_them(
    model_file: MakeModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A kernel writes their rows where the array ends, and MLX does not look."""
    model = load_whole(model_file(TinySpec(context_length=600)))
    prompt = [1 + i % 9 for i in range(STEP + 4)]
    expected = generate(Engine(model), prompt, 3)
    monkeypatch.setattr(wide, "are_few", lambda tokens, rows, dtype: tokens <= 8)
    engine = Engine(model, chunk=STEP - 4)

    def step(tokens: mx.array, position: mx.array, rows: list[mx.array]) -> Any:
        assert int(position[0]) + tokens.shape[1] <= rows[0].shape[1]
        return model.step(tokens, position, rows)

    engine._step = step
    monkeypatch.setattr(engine.cache, "expect", lambda rows: None)  # of a chat, which did not expect so many
    assert generate(engine, prompt, 3) == expected


def test_ctrl_c_before_a_prompts_step_is_launched_forgets_its_tokens(
    model: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What a kernel has not written yet MLX does not know to be missing."""
    monkeypatch.setattr(wide, "are_few", lambda tokens, rows, dtype: True)
    engine, prompt = Engine(model), tokens(20)

    class Rows(list[mx.array]):
        def __iter__(self) -> Any:
            raise KeyboardInterrupt

    forward = engine._forward

    def interrupted(part: mx.array) -> mx.array:
        logits = forward(part)
        if engine.cache.offset == 16:
            engine.cache.rows = Rows(engine.cache.rows)  # type: ignore[assignment,arg-type]
        return logits

    monkeypatch.setattr(engine, "_forward", interrupted)
    with pytest.raises(KeyboardInterrupt):
        generate(engine, prompt, 1)
    assert engine.tokens == prompt[:8]


def test_a_prompt_is_allocated_at_once(model_file: MakeModel) -> None:
    """With room for an answer to begin in: no chunk copies those before it, nor does the first token."""
    sizes: list[int] = []
    engine = Engine(load_whole(model_file(TinySpec(context_length=4000))), chunk=STEP)

    def note(done: int, total: int) -> None:
        if done:
            assert engine.cache.rows[0] is not None
            sizes.append(engine.cache.rows[0].shape[1])

    for step in engine.generate(tokens(5 * STEP), GREEDY, 2, on_prefill=note):
        note(step.position, 0)
    assert sizes == [6 * STEP] * 7


def test_ctrl_c_in_a_prompt_keeps_the_chunks_that_were_read(model: Model) -> None:
    engine, prompt = Engine(model, chunk=4), tokens(15)

    def stop(done: int, total: int) -> None:
        if done == 8:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        list(engine.generate(prompt, GREEDY, 4, on_prefill=stop))
    assert generate(engine, prompt, 4) == greedy_by_hand(model, prompt, 4)
    assert engine.stats.cached_tokens == 8


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError])
def test_a_chunk_that_ctrl_c_waited_for_is_kept_and_one_that_failed_is_not(
    error: type[BaseException], model: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Python raises KeyboardInterrupt when MLX has computed the chunk."""
    engine, prompt = Engine(model, chunk=4), tokens(15)
    evaluate = mx.eval

    def stopped(*arrays: Any) -> None:
        evaluate(*arrays)
        if engine.cache.offset == 8:
            raise error

    with monkeypatch.context() as patch:
        patch.setattr(mx, "eval", stopped)
        with pytest.raises(error):
            list(engine.generate(prompt, GREEDY, 4))
    assert generate(engine, prompt, 4) == greedy_by_hand(model, prompt, 4)
    assert engine.stats.cached_tokens == (8 if error is KeyboardInterrupt else 4)


@pytest.mark.parametrize("context", [64, 20])
def test_the_context_is_the_limit(model: Model, context: int) -> None:
    """The model's 64 tokens, or fewer by choice: an answer ends there, a prompt that leaves no room is refused."""
    engine = Engine(model, context=context)
    assert len(generate(engine, tokens(context - 4), 100)) == 4
    with pytest.raises(InputError, match=f"{context}; .*larger" if context < 64 else f"model's context of {context}"):
        generate(engine, tokens(context), 1)
    with pytest.raises(InputError, match="full"):
        engine.cache.reserve(2)  # the last token of an answer is not cached
    assert Engine(model, context=1000).context == 64


DRAWS = ["greedy", "drawn", "filtered"]
NAN, INFINITE = b"\x00\x7e", b"\x00\x7c"  # float16, as the scale of a block of Q4_0


def damaged(file: Path, folder: Path, tensor: str, row: int, scale: bytes = NAN) -> Path:
    """A copy of the file in which the first block of a row has this scale."""
    info = GGUFFile(file).tensors[tensor]
    data, at = bytearray(file.read_bytes()), info.offset + row * (info.nbytes // info.shape[0])
    data[at : at + 2] = scale
    copy = folder / "damaged.gguf"
    copy.write_bytes(data)
    return copy


@pytest.mark.parametrize("row", [0, 300, 575])
@pytest.mark.parametrize("scale", [NAN, INFINITE], ids=["NaN", "infinite"])
@pytest.mark.parametrize("params", [GREEDY, SamplingParams(), SamplingParams(top_p=0.9, logprobs=1)], ids=DRAWS)
def test_one_logit_that_is_no_number_is_an_error_before_any_token(
    row: int, scale: bytes, params: SamplingParams, model_file: MakeModel, tmp_path: Path
) -> None:
    """Try any token of the vocabulary, drawn or not."""
    broken = load_whole(damaged(model_file(TinySpec(context_length=64)), tmp_path, "output.weight", row, scale))
    with pytest.raises(NotNumbersError, match=r"logits are not numbers after 5 tokens .*; the file may be damaged"):
        next(Engine(broken).generate(tokens(5), params, 3))


@pytest.mark.parametrize("params", [GREEDY, SamplingParams(seed=1), SamplingParams(top_p=0.9, seed=1)], ids=DRAWS)
def test_logits_that_stop_being_numbers_end_an_answer(
    params: SamplingParams, model: Model, model_file: MakeModel, tmp_path: Path
) -> None:
    """By a token whose embedding is damaged: what came before it is there, and no later prompt stands on its rows."""
    prompt = tokens(5)
    good = generate(Engine(model), prompt, 12, params)
    at = next(i for i, token in enumerate(good) if i and token not in prompt and token not in good[:i])
    path = damaged(model_file(TinySpec(context_length=64)), tmp_path, "token_embd.weight", good[at])
    engine = Engine(load_whole(path))
    steps = engine.generate(prompt, params, 12)
    assert [next(steps).token for _ in range(at + 1)] == good[: at + 1]
    with pytest.raises(NotNumbersError, match=f"after {5 + at + 1} tokens"):
        next(steps)
    assert engine.tokens == []
    assert generate(engine, prompt, 2, params) == good[:2]


@pytest.mark.parametrize(("prompt", "says"), [([], "empty"), ([5, 99999], "outside"), ([-1], "outside")])
def test_unusable_prompts_are_refused(model: Model, prompt: list[int], says: str) -> None:
    with pytest.raises(InputError, match=says):
        generate(Engine(model), prompt, 1)


def test_the_speed_of_a_short_answer_is_that_of_a_long_one(model: Model) -> None:
    """No step hides in the time to the first token, none is counted that did not run."""
    engine, speed = Engine(model), {}
    list(engine.generate(tokens(5), GREEDY, 40))  # a GPU compiles
    for count in (40, 2, 3):
        list(engine.generate(tokens(5), GREEDY, count))
        speed[count] = engine.stats.decode_tok_s
    assert speed[2] < 4 * speed[40]
    assert speed[3] < 4 * speed[40]


def test_figures_count_what_happened(model: Model) -> None:
    engine = Engine(model)
    steps = list(engine.generate(tokens(10), SamplingParams(logprobs=2), 5))
    stats = engine.stats
    assert (stats.prompt_tokens, stats.cached_tokens, stats.decode_tokens) == (10, 0, 5)
    assert 0 < stats.prefill_seconds <= stats.time_to_first_token
    assert stats.decode_seconds == pytest.approx(sum(step.seconds for step in steps[1:]))
    assert stats.decode_tok_s == pytest.approx(4 / stats.decode_seconds)
    assert stats.peak_memory > 0
    assert [step.position for step in steps] == [10, 11, 12, 13, 14]
    assert all(step.logprob is not None and len(step.top_logprobs or []) == 2 for step in steps)


def test_a_second_answer_of_one_engine_waits_for_the_end_of_the_first(model: Model) -> None:
    """In turns the two would read and write each other's rows."""
    engine, prompt = Engine(model), tokens(5)
    first = engine.generate(prompt, GREEDY, 6)
    got = [next(first).token, next(first).token]
    with pytest.raises(InUseError, match="in use"):
        next(engine.generate(tokens(4, seed=1), GREEDY, 6))
    assert [*got, *(step.token for step in first)] == greedy_by_hand(model, prompt, 6), "the first is untouched"
    for end in ("close", "drop"):
        second = engine.generate(prompt, GREEDY, 6)
        next(second)
        if end == "close":
            second.close()  # type: ignore[attr-defined]
        del second
        assert generate(engine, tokens(4, seed=1), 3) == greedy_by_hand(model, tokens(4, seed=1), 3)


def test_a_prompt_that_is_refused_leaves_the_engine_free(model: Model) -> None:
    engine = Engine(model)
    with pytest.raises(InputError):
        generate(engine, [], 1)
    assert generate(engine, tokens(3), 1) == greedy_by_hand(model, tokens(3), 1)


def in_a_thread(work: Callable[[], object]) -> object:
    """Return what `work` returns or raises in another thread."""
    outcome: list[object] = []

    def caught() -> None:
        try:
            outcome.append(work())
        except Exception as error:
            outcome.append(error)

    thread = threading.Thread(target=caught)
    thread.start()
    thread.join()
    return outcome[0]


def test_an_engine_belongs_to_the_thread_of_its_first_answer(model: Model) -> None:
    """A second thread would meet the rows that the first is writing. One engine each is right for threads."""
    engine, prompt = Engine(model), tokens(5)
    assert in_a_thread(lambda: generate(engine, prompt, 4)) == greedy_by_hand(model, prompt, 4), "made here, used there"
    with pytest.raises(InUseError, match="belongs to the thread"):
        generate(engine, prompt, 4)
    own = Engine(model)
    steps = own.generate(prompt, GREEDY, 4)
    first = next(steps).token
    assert isinstance(in_a_thread(lambda: next(steps)), InUseError), "an answer that is under way"
    assert [first, *(step.token for step in steps)] == greedy_by_hand(model, prompt, 4), "which goes on all the same"
    assert generate(own, prompt, 4) == greedy_by_hand(model, prompt, 4)


def test_two_threads_at_once_get_one_answer_and_one_error(model: Model) -> None:
    engine, prompt, together = Engine(model), tokens(5), threading.Barrier(2)
    outcomes: list[object] = []

    def work() -> None:
        together.wait()
        try:
            outcomes.append(generate(engine, prompt, 20))
        except InUseError as error:
            outcomes.append(error)

    threads = [threading.Thread(target=work) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(map(type, outcomes), key=str) == sorted((list, InUseError), key=str)
    assert greedy_by_hand(model, prompt, 20) in outcomes
