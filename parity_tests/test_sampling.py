"""Sampling: each filter against its definition, the documented order, and seeds."""

import math

import mlx.core as mx
import numpy as np
import pytest

from bench.launches import launches, primitives
from glm_mlx.errors import InputError
from glm_mlx.sampling import Sampler, SamplingParams, filter_sorted
from parity_tests.budgets import check

LOGITS = np.random.default_rng(0).normal(0, 2, (2, 300)).astype(np.float32)


def draws(params: SamplingParams, logits: np.ndarray, count: int, prompts: list[list[int]] | None = None) -> np.ndarray:
    """(count, B) tokens from one sampler that sees the same logits again and again."""
    sampler = Sampler(params, logits.shape[1], prompts or [[0]] * len(logits))
    return np.array([np.array(sampler(mx.array(logits)).token) for _ in range(count)])


def kept(logits: np.ndarray, top_k: int = 0, top_p: float = 1.0, min_p: float = 0.0) -> set[int]:
    """The filters by definition, one after the other, on one row of logits."""
    order = [int(i) for i in np.argsort(-logits, kind="stable")]
    if top_k:
        order = order[:top_k]
    if top_p < 1:
        p = np.exp(logits[order].astype(np.float64))
        p /= p.sum()
        order = order[: int(np.searchsorted(np.cumsum(p), top_p)) + 1]
    best = logits[order[0]]
    return {i for i in order if not min_p or math.exp(logits[i] - best) >= min_p}


@pytest.mark.parametrize("top_k", [0, 1, 40, 299, 300, 5000])
@pytest.mark.parametrize("top_p", [1.0, 0.95, 0.3, 1e-6])
@pytest.mark.parametrize("min_p", [0.0, 0.05, 1.0])
def test_filters_keep_what_their_definitions_keep(top_k: int, top_p: float, min_p: float) -> None:
    ordered = -np.sort(-LOGITS, axis=-1)
    got = np.array(filter_sorted(mx.array(ordered), top_k, top_p, min_p))
    for row, want in zip(got, ordered, strict=True):
        assert set(np.flatnonzero(np.isfinite(row))) == kept(want, top_k, top_p, min_p)


def test_drawn_tokens_follow_the_filtered_distribution() -> None:
    """20,000 draws at temperature 0.7 after top-k 5: within four standard deviations of the exact probabilities."""
    logits = mx.array(np.repeat(LOGITS[:1], 4000, axis=0))
    sampler = Sampler(SamplingParams(temperature=0.7, top_k=5, seed=1), 300, [[0]] * 4000)
    tokens = np.concatenate([np.array(sampler(logits).token) for _ in range(5)])
    best = np.argsort(-LOGITS[0])[:5]
    p = np.exp(LOGITS[0][best] / 0.7)
    p /= p.sum()
    assert set(tokens) <= set(best)
    for token, probability in zip(best, p, strict=True):
        error = abs((tokens == token).mean() - probability)
        assert error < 4 * math.sqrt(probability * (1 - probability) / len(tokens))


def test_the_same_seed_gives_the_same_tokens_and_another_seed_others() -> None:
    once, again, other = (draws(SamplingParams(seed=seed), LOGITS, 20) for seed in (7, 7, 8))
    assert (once == again).all()
    assert (once != other).any()


def test_sequences_of_a_batch_draw_apart() -> None:
    same = np.repeat(LOGITS[:1], 2, axis=0)
    tokens = draws(SamplingParams(seed=0), same, 30)
    assert (tokens[:, 0] != tokens[:, 1]).any()


def test_temperature_zero_takes_the_most_likely_whatever_the_filters_say() -> None:
    params = SamplingParams(temperature=0, top_k=3, top_p=0.1, min_p=0.9)
    assert (draws(params, LOGITS, 3) == LOGITS.argmax(axis=-1)).all()


def test_logit_bias_forbids_and_forces() -> None:
    best = int(LOGITS[0].argmax())
    assert draws(SamplingParams(temperature=0, logit_bias={best: -math.inf}), LOGITS[:1], 1)[0, 0] != best
    assert draws(SamplingParams(temperature=0, logit_bias={17: 1e4}), LOGITS, 1).tolist() == [[17, 17]]


def test_a_greedy_token_takes_two_launches() -> None:
    """The choice, and the look at a logit for NaN: a cast of the token's type would be a third."""
    logits = mx.array(LOGITS[:1])
    mx.eval(logits)
    found = primitives(*Sampler(SamplingParams(temperature=0), 300, [[]])(logits).arrays())
    assert launches(found) == 2, found


@pytest.mark.parametrize("params", [SamplingParams(temperature=0), SamplingParams(), SamplingParams(top_p=0.5)])
def test_logits_that_are_nan_are_marked_in_their_own_sequence(params: SamplingParams) -> None:
    logits = mx.array(np.stack([LOGITS[0], np.full(300, np.nan, np.float32)]))
    assert np.array(Sampler(params, 300, [[0], [0]])(logits).is_nan).tolist() == [False, True]


def penalized(
    params: SamplingParams, logits: np.ndarray, prompts: list[list[int]], drawn: list[list[int]]
) -> np.ndarray:
    """What the penalties leave, computed one token at a time."""
    out = logits.astype(np.float64)
    for b, row in enumerate(out):
        for token in {*prompts[b], *drawn[b]}:
            row[token] = (
                row[token] / params.repetition_penalty if row[token] > 0 else row[token] * params.repetition_penalty
            )
        for token in set(drawn[b]):
            row[token] -= params.presence_penalty + params.frequency_penalty * drawn[b].count(token)
    return out


def test_penalties_follow_their_definitions_over_several_steps() -> None:
    """Repetition counts the prompt too, presence and frequency the answer alone; batch rows keep apart."""
    params = SamplingParams(temperature=0, repetition_penalty=1.3, presence_penalty=0.4, frequency_penalty=0.25)
    prompts = [[int(LOGITS[0].argmax()), 3], [5]]
    sampler, drawn = Sampler(params, 300, prompts), [[], []]
    for _ in range(12):
        want = penalized(params, LOGITS, prompts, drawn)
        check("sampling", np.array(sampler._penalize(mx.array(LOGITS))), want, "penalties")
        for b, token in enumerate(np.array(sampler(mx.array(LOGITS)).token)):
            assert token == want[b].argmax()
            drawn[b].append(int(token))
    assert len(set(drawn[0])) < len(drawn[0]), "the frequency penalty was never used"


def test_log_probabilities_are_the_models_own_before_any_filter() -> None:
    params = SamplingParams(temperature=0.1, top_k=1, logit_bias={4: 100.0}, logprobs=3)
    sample = Sampler(params, 300, [[0], [0]])(mx.array(LOGITS))
    exact = LOGITS - np.log(np.exp(LOGITS.astype(np.float64)).sum(axis=-1, keepdims=True))
    assert np.array(sample.token).tolist() == [4, 4]
    assert sample.logprob is not None
    assert sample.top_logprobs is not None
    check("sampling", np.array(sample.logprob), exact[:, 4], "logprob")
    check("sampling", np.array(sample.top_logprobs), -np.sort(-exact, axis=-1)[:, :3], "top logprobs")


@pytest.mark.parametrize(
    "bad",
    [
        {"temperature": -0.1},
        {"temperature": math.nan},
        {"temperature": math.inf},
        {"temperature": 1e-39},
        {"temperature": 1e39},
        {"top_k": -1},
        {"top_p": 0.0},
        {"top_p": 1.1},
        {"top_p": math.nan},
        {"min_p": -0.1},
        {"min_p": 2.0},
        {"repetition_penalty": 0.0},
        {"repetition_penalty": 1e-300},
        {"repetition_penalty": 1e39},
        {"presence_penalty": math.inf},
        {"presence_penalty": 1e39},
        {"frequency_penalty": math.nan},
        {"logit_bias": {3: math.inf}},
        {"logit_bias": {3: 1e39}},
        {"logit_bias": {3: math.nan}},
        {"seed": -1},
        {"seed": 1 << 64},
        {"logprobs": -1},
    ],
    ids=str,
)
def test_values_out_of_range_are_named(bad: dict[str, object]) -> None:
    with pytest.raises(InputError, match=next(iter(bad)).replace("_", "-")):
        SamplingParams(**bad)  # type: ignore[arg-type]


def test_a_biased_token_outside_the_vocabulary_is_named() -> None:
    with pytest.raises(InputError, match="300"):
        Sampler(SamplingParams(logit_bias={300: 1.0}), 300, [[0]])
