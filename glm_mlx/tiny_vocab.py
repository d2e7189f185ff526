"""The vocabulary of the tiny test model: GLM's format at 576 tokens, learnt from the text below.

256 byte tokens, 300 merges, then GLM's control tokens in GLM's order. Deterministic: same ids on every machine.
"""

import re
from collections import Counter
from itertools import pairwise
from typing import Any

from glm_mlx.template import GLM_TEMPLATE
from glm_mlx.tokenizer import BYTE_CHARS

MERGES = 300

_TEXT = """\
This program runs a language model from one file on one machine. The file holds the weights of the model, its
vocabulary and its settings. The program reads the file, turns the text of the person into tokens, runs the model for
each token, and prints the text that the model makes. Nothing is sent to another machine.

A model is a stack of layers. Each layer has attention, which reads what came before, and experts, which work on what
is there now. A router chooses four experts out of sixty-four for each token, so most of the weights are not read for
most of the tokens. That is why the model is fast: the time of a step is the time to read the weights that the step
needs. The cache keeps one short row for each token of the context, and the attention reads the same row as the key
and as the value.

Speed means nothing when the answer is wrong. So every kernel has a twin, written in plain array operations, and every
test compares the two. The reference is a second program, written by other hands, that computes the same thing slowly
and simply. When the two do not agree, the test names the first layer where they part. A test that cannot fail is not
a test: before we trust it, we break the kernel and see that the test fails.

The weights are stored in blocks of four bits with one scale for each block. The kernel reads the bits as they are in
the file, multiplies, and adds in float32. A larger prompt is read in chunks, and the experts are sorted by token, so
that each matrix is read once. What was measured is in a table, with the machine, the context and the spread, and what
was not measured is not in the table. A message says what failed, with the value, and then what to do about it.

What can you ask? Write a question, and the model will think and then answer. You can give it tools: it will name the
function and the arguments, and you will return the result. It's small, it isn't clever, and it won't know the year.
But it will show that the program works, from the first byte of the file to the last token of the answer.
"""

# GLM's names, in the order of GLM's ids. Type 3 is control, 4 is user-defined (a tag that text may show).
CONTROL = ["<|endoftext|>", "[MASK]", "[gMASK]", "[sMASK]", "<sop>", "<eop>"]
CONTROL += ["<|system|>", "<|user|>", "<|assistant|>", "<|observation|>"]
TAGS = ["<think>", "</think>", "<tool_call>", "</tool_call>", "<tool_response>", "</tool_response>"]
TAGS += ["<arg_key>", "</arg_key>", "<arg_value>", "</arg_value>"]


def _learn_merges(text: str, count: int) -> list[tuple[str, str]]:
    """Plain BPE training on the words of an ASCII text: the commonest pair first, ties by spelling."""
    words = Counter(tuple(word.replace(" ", "Ġ")) for word in re.findall(r"'[a-z]+| ?[A-Za-z]+", text))
    merges = []
    for _ in range(count):
        pairs: Counter[tuple[str, str]] = Counter()
        for word, uses in words.items():
            for pair in pairwise(word):
                pairs[pair] += uses
        best = min(pairs, key=lambda pair: (-pairs[pair], pair))
        merges.append(best)
        merged: Counter[tuple[str, ...]] = Counter()
        for word, uses in words.items():
            merged[_merge(word, best)] += uses
        words = merged
    return merges


def _merge(word: tuple[str, ...], pair: tuple[str, str]) -> tuple[str, ...]:
    """The word with every occurrence of the pair joined, left to right."""
    out: list[str] = []
    for symbol in word:
        if out and (out[-1], symbol) == pair:
            out[-1] += symbol
        else:
            out.append(symbol)
    return tuple(out)


def tiny_vocabulary() -> dict[str, Any]:
    """The `tokenizer.*` metadata of the tiny model, as plain Python values."""
    return vocabulary_metadata(_learn_merges(_TEXT, MERGES))


def vocabulary_metadata(merges: list[tuple[str, str]]) -> dict[str, Any]:
    """The `tokenizer.*` metadata of a vocabulary: the bytes, what the merges make, then GLM's control tokens."""
    plain = [*BYTE_CHARS, *(left + right for left, right in merges)]
    tokens = plain + CONTROL + TAGS
    return {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "glm4",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": [1] * len(plain) + [3] * len(CONTROL) + [4] * len(TAGS),
        "tokenizer.ggml.merges": [f"{left} {right}" for left, right in merges],
        "tokenizer.ggml.bos_token_id": tokens.index("[gMASK]"),
        "tokenizer.ggml.eos_token_id": tokens.index("<|endoftext|>"),
        "tokenizer.ggml.padding_token_id": tokens.index("<|endoftext|>"),
        "tokenizer.ggml.eot_token_id": tokens.index("<|user|>"),
        "tokenizer.ggml.eom_token_id": tokens.index("<|observation|>"),
        "tokenizer.ggml.add_bos_token": False,
        "tokenizer.chat_template": GLM_TEMPLATE,
    }
