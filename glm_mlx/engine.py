"""Token ids in, token ids out: prefill in chunks, decode with one step of look-ahead."""

import time
from collections.abc import Callable, Generator, Iterator, Sequence
from dataclasses import dataclass

import mlx.core as mx

from glm_mlx.errors import InputError, NotNumbersError
from glm_mlx.exclusive import Exclusive
from glm_mlx.model import Model
from glm_mlx.model_cases import launches
from glm_mlx.sampling import Sample, Sampler, SamplingParams
from kernels import wide
from kernels.compiled import compile_ahead
from kernels.launcher import MAX_TOKENS

PREFILL_CHUNK = 512  # tokens
WIDE_CHUNK = 2048  # where `kernels.wide` expands each weight once a chunk, for all its tokens


@dataclass(frozen=True)
class Step:
    """One generated token. `seconds` since the token before it, or since the end of prefill."""

    token: int
    seconds: float
    position: int  # of the token; the cache then held as many rows
    logprob: float | None = None
    top_logprobs: list[tuple[int, float]] | None = None


@dataclass
class Stats:
    """Of one `generate` call; times in seconds, memory in bytes."""

    prompt_tokens: int = 0
    cached_tokens: int = 0  # of the prompt, whose rows were already there
    prefill_seconds: float = 0.0
    time_to_first_token: float = 0.0
    decode_tokens: int = 0
    decode_seconds: float = 0.0  # first token excluded
    peak_memory: int = 0

    @property
    def prefill_tok_s(self) -> float:
        return (self.prompt_tokens - self.cached_tokens) / self.prefill_seconds if self.prefill_seconds else 0.0

    @property
    def decode_tok_s(self) -> float:
        return (self.decode_tokens - 1) / self.decode_seconds if self.decode_seconds else 0.0


def prefill_chunk(dtype: mx.Dtype) -> int:
    """How many tokens of a prompt are computed at once, with activations of this type."""
    return WIDE_CHUNK if wide.applies(WIDE_CHUNK, dtype) else PREFILL_CHUNK


class Steps(Iterator[Step]):
    """An answer under way. Raises InUseError in another thread than the engine's, and then goes on in that one."""

    def __init__(self, alone: Exclusive, steps: Generator[Step, None, None]):
        self._alone = alone
        self._steps = _while_alone(alone, steps)  # which does not refer to this: it ends when nobody else does

    def __next__(self) -> Step:
        self._alone.check_thread()
        return next(self._steps)

    def close(self) -> None:
        """End the answer; the engine is free then, as it is when nothing refers to this any more."""
        self._steps.close()


def _while_alone(alone: Exclusive, steps: Generator[Step, None, None]) -> Generator[Step, None, None]:
    with alone:
        yield from steps


class Engine:
    """A model and the cache of one conversation.

    `tokens` are the ids whose rows are in the cache. A prompt that begins with them is computed only from where it
    differs. `context`: how many tokens prompt and answer may have together, if less than the model was made for.
    `chunk`: tokens of a prompt at once, by default as `prefill_chunk` says; of few that are left, `kernels.wide` says.
    An engine generates one answer at a time, and belongs to the thread of the first one.
    """

    def __init__(self, model: Model, chunk: int | None = None, context: int | None = None):
        self.model, self.chunk = model, chunk or prefill_chunk(model.dtype)
        most = model.cfg.context_length
        self.context = most if context is None else min(context, most)
        self.cache = model.new_cache()
        self.cache.limit = self.context
        # Python takes longer to build the graph of a step than a GPU to run it. A CPU doesn't mind, and compiling there
        # needs a C++ compiler.
        self._step = mx.compile(model.step) if mx.default_device() == mx.Device(mx.gpu) else None
        if self._step is not None and mx.cuda.is_available():
            compile_ahead(launches(model))
        self.tokens: list[int] = []
        self.stats = Stats()
        self._alone = Exclusive("the engine")

    def generate(
        self,
        prompt: Sequence[int],
        params: SamplingParams,
        max_tokens: int,
        stop_ids: frozenset[int] = frozenset(),
        on_prefill: Callable[[int, int], None] = lambda done, total: None,
    ) -> "Steps":
        """Yields up to `max_tokens` tokens; a stop id is yielded, then ends it. Closing the generator cancels.

        `on_prefill(done, total)` is called with prompt tokens before the first chunk and after each. Raises InputError
        for an empty prompt, one that does not fit the context, or ids that are not in the vocabulary; NotNumbersError
        in place of a token whose logits are NaN or infinite; InUseError while another generator of this engine is
        neither exhausted nor closed, or in another thread than the first.
        """
        return Steps(self._alone, self._steps(prompt, params, max_tokens, stop_ids, on_prefill))

    def _steps(
        self,
        prompt: Sequence[int],
        params: SamplingParams,
        max_tokens: int,
        stop_ids: frozenset[int],
        on_prefill: Callable[[int, int], None],
    ) -> Generator[Step, None, None]:
        cfg = self.model.cfg
        if not prompt:
            raise InputError("the prompt is empty; give at least one token of text")
        if len(prompt) >= self.context:
            limit, advice = "the model's context", "shorten it"
            if self.context < cfg.context_length:
                limit, advice = "the context", "shorten it or make the context larger"
            raise InputError(
                f"the prompt has {len(prompt):,} tokens, which leaves no room for an answer in {limit} of "
                f"{self.context:,}; {advice}"
            )
        if not all(0 <= token < cfg.vocab_size for token in prompt):
            raise InputError(
                f"the prompt holds a token id outside 0 to {cfg.vocab_size - 1}; encode it with this file's tokenizer"
            )
        max_tokens = min(max_tokens, self.context - len(prompt))
        sampler = Sampler(params, cfg.vocab_size, [prompt])
        stats = self.stats = Stats(prompt_tokens=len(prompt))
        mx.reset_peak_memory()
        start = time.perf_counter()
        self.cache.expect(len(prompt) + min(max_tokens, len(prompt) // 8 + 1))
        logits = self._prefill(prompt, on_prefill)
        stats.prefill_seconds = time.perf_counter() - start
        if max_tokens < 1:
            return

        last = time.perf_counter()
        sample, all_finite = sampler(logits), mx.all(mx.isfinite(logits))
        mx.eval(all_finite, sample.arrays())  # before the look-ahead, which on a CPU would delay it by a whole step
        now = time.perf_counter()
        stats.time_to_first_token, seconds = now - start, now - last
        for n in range(max_tokens):
            ahead = sampler(self._forward(sample.token[:, None])) if n + 1 < max_tokens else None
            if ahead is not None:
                mx.async_eval(ahead.arrays())  # the device goes on while the host looks at this token
            token = int(sample.token)
            if sample.is_nan.item() or (n == 0 and not all_finite.item()):
                self.tokens = []  # their rows may be no numbers either
                raise NotNumbersError(
                    f"the model's logits are not numbers after {len(prompt) + n:,} tokens (NaN or infinite); the file "
                    "may be damaged: fetch it again"
                )
            if n > 0:
                now = time.perf_counter()
                seconds = now - last
                stats.decode_seconds += seconds
            stats.decode_tokens = n + 1
            stats.peak_memory = mx.get_peak_memory()
            if ahead is not None:
                self.tokens.append(token)
            yield Step(token, seconds, len(prompt) + n, *_logprobs(sample))
            last = now
            if ahead is None or token in stop_ids:
                return
            sample = ahead

    def _prefill(self, prompt: Sequence[int], on_prefill: Callable[[int, int], None]) -> mx.array:
        """Bring the cache to `prompt` and return the logits of its last token, (1, vocabulary)."""
        # The last token is always computed: its logits are wanted.
        mx.synchronize()  # a step that was cancelled may still be writing its row
        known = _common_prefix(self.tokens, prompt[:-1])
        self.tokens = list(prompt[:known])  # first: Ctrl-C may come between, and rows without a token do no harm
        self.cache.trim(known)
        self.stats.cached_tokens = known
        on_prefill(known, len(prompt))
        with wide.within(mx.get_active_memory() + self.cache.growth(len(prompt))):
            while left := len(prompt) - len(self.tokens):
                few = wide.are_few(left, len(self.tokens), self.model.dtype)
                count = self.chunk
                if few:
                    count = MAX_TOKENS if left >= MAX_TOKENS else 1  # for another number kernels were compiled anew
                part = prompt[len(self.tokens) : len(self.tokens) + count]
                tokens = mx.array([list(part)], mx.int32)
                if few:
                    made = logits = self._forward(tokens)
                else:
                    made = self.model.hidden_states(tokens, self.cache)
                    logits = self.model.logits(made[:, -1:])[:, 0]  # evaluated of the last part alone
                arrays = [made, *(rows for rows in self.cache.rows if rows is not None)]
                # First: Ctrl-C shows when the wait is over, and the rows are there then. Nothing may come between, as
                # MLX does not know that a kernel is still to write them.
                self.tokens += part
                try:
                    mx.eval(arrays)
                except Exception:  # out of memory, say
                    del self.tokens[-len(part) :]
                    raise
                on_prefill(len(self.tokens), len(prompt))
        mx.eval(logits)
        return logits

    def _forward(self, tokens: mx.array) -> mx.array:
        """tokens (1, L) -> the logits of the last, (1, vocabulary)"""
        if self._step is None:
            return self.model.logits(self.model.hidden_states(tokens, self.cache)[:, -1:])[:, 0]
        length = tokens.shape[1]
        rows = self.cache.reserve(length)
        logits, rows = self._step(tokens, mx.array([self.cache.offset], mx.int32), rows)
        self.cache.take(rows, length)
        return logits


def _common_prefix(a: Sequence[int], b: Sequence[int]) -> int:
    for i, (x, y) in enumerate(zip(a, b, strict=False)):
        if x != y:
            return i
    return min(len(a), len(b))


def _logprobs(sample: Sample) -> tuple[float | None, list[tuple[int, float]] | None]:
    if sample.logprob is None or sample.top_tokens is None or sample.top_logprobs is None:
        return None, None
    tops = [(int(i), float(v)) for i, v in zip(sample.top_tokens[0], sample.top_logprobs[0], strict=True)]
    return float(sample.logprob), tops
