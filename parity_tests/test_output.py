"""Reasoning, answer and calls of tools come apart, and every character that the model wrote is in one of them."""

import random

import pytest

from glm_mlx.output import OutputSplitter
from glm_mlx.tiny_vocab import tiny_vocabulary
from glm_mlx.tokenizer import BYTE_CHARS, Tokenizer

TOKENIZER = Tokenizer(tiny_vocabulary())
CALL = "<tool_call>fish<arg_key>place</arg_key><arg_value>true</arg_value></tool_call>"


def pieces(ids: list[int], starts_inside: bool) -> list[tuple[str, str]]:
    """Parts of some tokens in their order, neighbours of one kind joined. Every piece is whole and not empty."""
    splitter = OutputSplitter(TOKENIZER, starts_inside)
    found: list[tuple[str, str]] = []
    for part, text in [piece for index in ids for piece in splitter.push(index)] + splitter.finish():
        assert text
        if found and found[-1][0] == part:
            text = found.pop()[1] + text
        found.append((part, text))
    return found


def split(text: str, starts_inside: bool) -> list[tuple[str, str]]:
    return pieces(TOKENIZER.encode(text, special=True), starts_inside)


@pytest.mark.parametrize(
    ("text", "starts_inside", "reasoning", "answer"),
    [
        ("why 😀</think>\n\nthe\n\nanswer\n", True, "why 😀", "the\n\nanswer\n"),
        ("\n\r\nthe answer", False, "", "the answer"),
        ("<think>why</think>é", False, "why", "é"),
        ("why", True, "why", ""),
        ("</think>", True, "", ""),
        ("</think>\n", True, "", ""),
        ("x<think>\ny</think>z<|user|>", True, "x\ny", "z"),
    ],
)
def test_reasoning_and_answer(text: str, starts_inside: bool, reasoning: str, answer: str) -> None:
    """The tags switch and are not shown; newlines before the answer go, those inside it stay."""
    assert split(text, starts_inside) == [p for p in (("reasoning", reasoning), ("answer", answer)) if p[1]]


@pytest.mark.parametrize(
    ("text", "starts_inside", "reasoning", "answer"),
    [
        ("17 x 24 = 408</think>408", False, "", "17 x 24 = 408\n\n408"),
        ("x</think>y</think>\nz", True, "x", "y\nz"),
        ("a</think>b\n</think>c", True, "a", "b\nc"),
        ("a</think>b<think>c</think>d", True, "a\n\nc", "b\n\nd"),
        ("a</think>b<think></think>d", True, "a", "b\n\nd"),
        ("a<think>b", True, "a\n\nb", ""),
        ("408</think>", False, "", "408"),
    ],
)
def test_where_a_tag_was_left_out_texts_do_not_run_together(
    text: str, starts_inside: bool, reasoning: str, answer: str
) -> None:
    """An orphan tag, or a thought within an answer: a blank line, unless the model wrote a line's end itself."""
    found = split(text, starts_inside)
    assert "".join(text for part, text in found if part == "reasoning") == reasoning
    assert "".join(text for part, text in found if part == "answer") == answer


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        (CALL, [("tool_call", CALL)]),
        (f"\nI look.\n{CALL}{CALL}\nDone", [
            ("answer", "I look.\n"), ("tool_call", CALL + CALL), ("answer", "\nDone")
        ]),
        (f"408</think>{CALL}", [("answer", "408\n\n"), ("tool_call", CALL)]),
        ("<tool_call>fish\n{}<tool_call>bird</tool_call>ok", [
            ("tool_call", "<tool_call>fish\n{}<tool_call>bird</tool_call>"), ("answer", "ok")
        ]),
        ("<tool_call>fish<|observation|>sunny", [("tool_call", "<tool_call>fish"), ("answer", "sunny")]),
        ("<tool_call>fish", [("tool_call", "<tool_call>fish")]),
        ("<tool_call><think>a</think></tool_call>b", [
            ("tool_call", "<tool_call><think>a</think></tool_call>"), ("answer", "b")
        ]),
        ("a</tool_call>b<arg_key>", [("answer", "a</tool_call>b<arg_key>")]),
    ],
)  # fmt: skip
def test_calls_of_tools_are_a_part_of_their_own_as_written(text: str, parts: list[tuple[str, str]]) -> None:
    """Closed, one behind another, or not closed: up to a stop token or the end."""
    assert split(text, False) == parts


def test_a_call_spoken_of_in_a_thought_ends_no_thought() -> None:
    assert split("I could write <tool_call>.</think>No.", True) == [
        ("reasoning", "I could write <tool_call>."),
        ("answer", "No."),
    ]


def test_no_character_is_lost() -> None:
    """Seeded mixtures of text, halves of characters and tags: the parts hold what `decode` gives but the two tags."""
    rng = random.Random(0)
    words = [TOKENIZER.encode(word, special=True) for word in ("so", "é", "<tool_call>", "</tool_call>", "<|user|>")]
    words += [TOKENIZER.encode("é")[:1], [TOKENIZER.think_open_id or 0], [TOKENIZER.think_close_id or 0]]
    for _ in range(300):
        ids = [index for _ in range(12) for index in rng.choice(words)]
        whole = TOKENIZER.decode(ids).replace("<think>", "").replace("</think>", "")
        found = "".join(text for _, text in pieces(ids, rng.random() < 0.5)).replace("\n", "")
        assert found.replace("<think>", "").replace("</think>", "") == whole


def test_typed_tags_do_not_switch() -> None:
    """`</think>` in plain tokens is text that the model writes about, not the end of its thought."""
    assert pieces(TOKENIZER.encode("a</think>b<tool_call>"), True) == [("reasoning", "a</think>b<tool_call>")]


def test_half_a_character_stays_on_its_side() -> None:
    """A thought that ends inside a character ends with U+FFFD, and what follows starts clean."""
    half = TOKENIZER.encode("é")[:1]
    close, call = TOKENIZER.think_close_id, TOKENIZER.call_open_id
    assert close is not None
    assert call is not None
    found = pieces([*half, close, *TOKENIZER.encode("\né"), *half, call, *half], True)
    assert found == [("reasoning", "\ufffd"), ("answer", "é\ufffd"), ("tool_call", "<tool_call>\ufffd")]


def test_without_tags_in_the_vocabulary_all_is_answer() -> None:
    plain = Tokenizer({
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "glm4",
        "tokenizer.ggml.tokens": list(BYTE_CHARS),
        "tokenizer.ggml.token_type": [1] * 256,
        "tokenizer.ggml.merges": [],
        "tokenizer.ggml.eos_token_id": 0,
    })  # fmt: skip
    splitter = OutputSplitter(plain, starts_inside=False)
    assert [piece for index in plain.encode("<think>a") for piece in splitter.push(index)][-1] == ("answer", "a")
