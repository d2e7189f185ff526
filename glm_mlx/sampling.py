"""From logits to the next token, on the device: the vocabulary never travels to the host.

Order, as in llama.cpp: logit bias, repetition penalty, presence and frequency penalties, top-k, top-p, min-p,
temperature, draw. Each filter sees the probabilities that the one before it left, at temperature 1.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import mlx.core as mx

from glm_mlx.errors import InputError


@dataclass(frozen=True)
class SamplingParams:
    """Raises InputError for a value out of range.

    temperature          0 takes the most likely token and ignores top_k, top_p, min_p and seed
    top_k                0 is off
    repetition_penalty   over prompt and answer: positive logits are divided by it, negative ones multiplied
    presence_, frequency_penalty   subtracted once, and for each use, over the answer alone
    logit_bias           token id -> number added to its logit; -inf forbids it
    logprobs             how many alternatives to report with each token; None reports no log-probabilities
    """

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    seed: int = 0
    logprobs: int | None = None

    def __post_init__(self) -> None:
        # The bounds keep float32 from overflowing or losing everything on the way.
        _check(
            "temperature",
            self.temperature,
            self.temperature == 0 or 1e-3 <= self.temperature <= 1e3,
            "0, or 0.001 to 1000",
        )
        _check("top-k", self.top_k, 0 <= self.top_k < 1 << 31, "0 (off) to 2**31 - 1")
        _check("top-p", self.top_p, 0 < self.top_p <= 1, "above 0 and at most 1")
        _check("min-p", self.min_p, 0 <= self.min_p <= 1, "0 to 1")
        _check("repetition-penalty", self.repetition_penalty, 1e-3 <= self.repetition_penalty <= 1e3, "0.001 to 1000")
        for name in ("presence_penalty", "frequency_penalty"):
            _check(name.replace("_", "-"), getattr(self, name), abs(getattr(self, name)) <= 1e3, "-1000 to 1000")
        for token, bias in self.logit_bias.items():
            _check(f"logit-bias of token {token}", bias, abs(bias) <= 1e6 or bias == -math.inf, "up to 1e6, or -inf")
        _check("seed", self.seed, 0 <= self.seed < 1 << 64, "0 to 2**64 - 1")
        _check("logprobs", self.logprobs, self.logprobs is None or 0 <= self.logprobs <= 100, "0 to 100")


def _check(name: str, value: object, good: bool, wanted: str) -> None:
    if not good:
        raise InputError(f"{name} is {value}; it must be {wanted}")


@dataclass(frozen=True)
class Sample:
    """One drawn token for each sequence, still on the device. Log-probabilities are the model's own, before filters.

    `is_nan`: the logits were no numbers. It looks at one of them: a hidden state that is NaN makes all of them NaN. A
    damaged output matrix can make some NaN, but then it does so for every token, and the engine looks at all once.
    """

    token: mx.array  # (B,) int32
    is_nan: mx.array  # (B,) bool
    logprob: mx.array | None  # (B,)
    top_tokens: mx.array | None  # (B, logprobs), most likely first
    top_logprobs: mx.array | None

    def arrays(self) -> list[mx.array]:
        return [a for a in (self.token, self.is_nan, self.logprob, self.top_tokens, self.top_logprobs) if a is not None]


class Sampler:
    """Draws from logits (B, vocabulary) and remembers what it drew. The same seed gives the same tokens."""

    def __init__(self, params: SamplingParams, vocab_size: int, prompts: Sequence[Sequence[int]]):
        """`prompts`: the token ids of each of the B sequences. Raises InputError for a biased token out of range."""
        self.params = params
        self._key = mx.random.key(params.seed)
        batch = len(prompts)
        self._seen: mx.array | None = None
        self._uses: mx.array | None = None
        if params.repetition_penalty != 1:
            self._seen = mx.zeros((batch, vocab_size), mx.bool_)
            for i, prompt in enumerate(prompts):
                self._seen[i, mx.array(list(prompt), mx.int32)] = True
        if params.presence_penalty or params.frequency_penalty:
            self._uses = mx.zeros((batch, vocab_size))
        self._bias: mx.array | None = None
        if params.logit_bias:
            for token in params.logit_bias:
                _check("a token of logit-bias", token, 0 <= token < vocab_size, f"0 to {vocab_size - 1}")
            self._bias = mx.zeros((vocab_size,))
            self._bias[mx.array(list(params.logit_bias), mx.int32)] = mx.array(list(params.logit_bias.values()))

    def __call__(self, logits: mx.array) -> Sample:
        token = self._draw(self._penalize(logits))
        rows = mx.arange(token.shape[0])
        if self._seen is not None:
            self._seen[rows, token] = True
        if self._uses is not None:
            self._uses = self._uses.at[rows, token].add(1)
        is_nan = mx.isnan(logits[:, 0])
        if self.params.logprobs is None:
            return Sample(token, is_nan, None, None, None)
        logprobs = logits - mx.logsumexp(logits, axis=-1, keepdims=True)
        top = mx.argsort(-logprobs, axis=-1)[:, : self.params.logprobs]
        return Sample(
            token,
            is_nan,
            mx.take_along_axis(logprobs, token[:, None], axis=-1)[:, 0],
            top,
            mx.take_along_axis(logprobs, top, axis=-1),
        )

    def _penalize(self, logits: mx.array) -> mx.array:
        p = self.params
        if self._bias is not None:
            logits = logits + self._bias
        if self._seen is not None:
            penalized = mx.where(logits > 0, logits / p.repetition_penalty, logits * p.repetition_penalty)
            logits = mx.where(self._seen, penalized, logits)
        if self._uses is not None:
            logits = logits - p.presence_penalty * (self._uses > 0) - p.frequency_penalty * self._uses
        return logits

    def _draw(self, logits: mx.array) -> mx.array:
        p = self.params
        if p.temperature == 0:
            return mx.argmax(logits, axis=-1).view(mx.int32)  # a view, where a cast would be a launch more
        self._key, key = mx.random.split(self._key)
        if not p.top_k and p.top_p == 1 and not p.min_p:
            return mx.random.categorical(logits / p.temperature, key=key).astype(mx.int32)
        order = mx.argsort(-logits, axis=-1)
        kept = filter_sorted(mx.take_along_axis(logits, order, axis=-1), p.top_k, p.top_p, p.min_p)
        place = mx.random.categorical(kept / p.temperature, key=key)
        return mx.take_along_axis(order, place[:, None], axis=-1)[:, 0].astype(mx.int32)


def filter_sorted(logits: mx.array, top_k: int, top_p: float, min_p: float) -> mx.array:
    """Logits (B, vocabulary), largest first, with -inf for what top-k, top-p and min-p drop. The first always stays."""
    if top_k:
        logits = mx.where(mx.arange(logits.shape[-1]) < top_k, logits, -mx.inf)
    if top_p < 1:
        probabilities = mx.softmax(logits, axis=-1, precise=True)
        before = mx.cumsum(probabilities, axis=-1) - probabilities  # mass of the tokens that come first
        logits = mx.where((before < top_p) | (mx.arange(logits.shape[-1]) == 0), logits, -mx.inf)
    if min_p:
        logits = mx.where(logits >= logits[:, :1] + math.log(min_p), logits, -mx.inf)
    return logits
