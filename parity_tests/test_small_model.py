"""The shipped small model: learned router statistics instead of noise, and answers that must not change."""

import json
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest

from glm_mlx.chat import ChatTemplate, encode_chat
from glm_mlx.engine import Engine
from glm_mlx.load import Loaded, load_model
from glm_mlx.sampling import SamplingParams
from glm_mlx.small import SMALL_MODEL
from parity_tests.budgets import check
from parity_tests.compare import compare_layers, to_numpy
from parity_tests.test_layers import assert_taps
from reference.model import Reference
from reference.tokenizer import ReferenceTokenizer

GOLDEN = Path(__file__).with_name("golden_answers.json")
GREEDY = SamplingParams(temperature=0)


@pytest.fixture(scope="module")
def small() -> Loaded:
    return load_model(SMALL_MODEL)


def prompt_ids(loaded: Loaded, text: str, thinking: bool) -> list[int]:
    template = ChatTemplate(loaded.gguf.metadata["tokenizer.chat_template"])
    return encode_chat(loaded.tokenizer, template, [{"role": "user", "content": text}], thinking=thinking)


def test_the_file_is_small_and_mixed_as_published_files_are() -> None:
    assert SMALL_MODEL.stat().st_size <= 8_000_000


def test_every_layer_and_expert_choice_agrees_with_the_reference(small: Loaded) -> None:
    ids = prompt_ids(small, "Tell me a story about a fox and three red apples.", thinking=True)
    assert_taps(list(compare_layers(SMALL_MODEL, ids)), "small model")


def test_greedy_tokens_are_those_of_the_reference(small: Loaded) -> None:
    """The reference computes the whole answer at once; every token must be its most likely one."""
    prompt = prompt_ids(small, "What is 47 + 38?", thinking=True)
    answer = [s.token for s in Engine(small.model).generate(prompt, GREEDY, 60, small.tokenizer.stop_ids)]
    ids = prompt + answer
    logits = Reference(SMALL_MODEL).forward(ids[:-1])["logits"]
    assert logits[len(prompt) - 1 :].argmax(axis=-1).tolist() == answer
    got = to_numpy(small.model.logits(small.model.hidden_states(mx.array([ids[:-1]]), small.model.new_cache())))[0]
    check("logits" if small.model.dtype == mx.float32 else "logits, 16-bit", got, logits, "small model")


def test_its_tokenizer_is_the_references(small: Loaded) -> None:
    text = "Tell me: 12 + 345 = ?\n\nÄpfel, 苹果 and <|user|> as text."
    assert small.tokenizer.encode(text) == ReferenceTokenizer(small.gguf.metadata).encode(text)


@pytest.mark.parametrize("case", json.loads(GOLDEN.read_text()), ids=lambda case: case["prompt"])
def test_greedy_answers_are_the_golden_ones(case: dict[str, object], small: Loaded) -> None:
    ids = prompt_ids(small, str(case["prompt"]), bool(case["thinking"]))
    tokens = [s.token for s in Engine(small.model).generate(ids, GREEDY, 200, small.tokenizer.stop_ids)]
    assert small.tokenizer.decode(tokens, special=True) == case["answer"]


def test_no_expert_is_idle_or_does_all_the_work(small: Loaded) -> None:
    """Over the golden answers: real routing, not noise."""
    shares: list[np.ndarray] = []
    for case in json.loads(GOLDEN.read_text()):
        ids = small.tokenizer.encode(str(case["answer"]), special=True)
        x = small.model.embed(mx.array([ids]))
        cache = small.model.new_cache()
        for layer in small.model.layers:
            x = layer(x, cache, lambda name, value: shares.append(np.array(value)) if name == "experts" else None)
    chosen = np.concatenate([share.reshape(-1) for share in shares])
    counts = np.bincount(chosen, minlength=small.config.num_experts)
    assert counts.min() > 0
    assert counts.max() < 4 * counts.mean()
