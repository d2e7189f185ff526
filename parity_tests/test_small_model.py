"""The shipped small model: learned router statistics instead of noise, and answers that must not change."""

import re
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from gguf.constants import GGMLQuantizationType

from glm_mlx.engine import Engine
from glm_mlx.load import Loaded, load_model
from glm_mlx.small import SMALL_MODEL
from parity_tests import golden
from parity_tests.budgets import check
from parity_tests.compare import compare_layers, to_numpy
from parity_tests.golden import GREEDY, prompt_ids
from parity_tests.test_layers import assert_taps
from reference.model import Reference
from reference.tokenizer import ReferenceTokenizer


@pytest.fixture(scope="module")
def small() -> Loaded:
    return load_model(SMALL_MODEL)


def test_the_file_is_small_and_mixed_as_published_files_are(small: Loaded) -> None:
    assert SMALL_MODEL.stat().st_size <= 8_000_000
    types: dict[str, set[str]] = {}
    for name, tensor in small.gguf.tensors.items():
        types.setdefault(GGMLQuantizationType(tensor.type).name, set()).add(re.sub(r"^blk\.\d+\.", "", name))
    assert types["Q8_0"] == {"attn_k_b.weight", "attn_v_b.weight", "attn_kv_a_mqa.weight"}
    assert types["Q6_K"] == {"output.weight"}
    assert {"token_embd.weight", "ffn_down_exps.weight", "ffn_down_shexp.weight"} < types["Q4_0"]
    assert types.keys() == {"Q8_0", "Q6_K", "Q4_0", "F32"}


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


@pytest.mark.parametrize("case", golden.cases(), ids=lambda case: case["prompt"])
def test_greedy_answers_are_the_golden_ones(case: dict[str, Any], small: Loaded) -> None:
    assert golden.answer(small, case["prompt"], case["thinking"]) == case["answer"]


def test_no_expert_is_idle_or_does_all_the_work(small: Loaded) -> None:
    """Over the golden answers: real routing, not noise."""
    shares: list[np.ndarray] = []
    for case in golden.cases():
        ids = small.tokenizer.encode(case["answer"], special=True)
        x = small.model.embed(mx.array([ids]))
        cache = small.model.new_cache()
        for layer in small.model.layers:
            x = layer(x, cache, lambda name, value: shares.append(np.array(value)) if name == "experts" else None)
    chosen = np.concatenate([share.reshape(-1) for share in shares])
    counts = np.bincount(chosen, minlength=small.config.num_experts)
    assert counts.min() > 0
    assert counts.max() < 4 * counts.mean()
