"""A model's tokens as they come, told apart: reasoning, answer, and the calls of tools in it."""

from typing import Literal

from glm_mlx.tokenizer import Tokenizer

Part = Literal["reasoning", "answer", "tool_call"]

GAP = "\n\n"  # between texts that a tag stood between


class OutputSplitter:
    """Text and its part for each token.

    reasoning   from `<think>` to `</think>`, in which a call is only spoken of
    tool_call   from `<tool_call>` to `</tool_call>`, as written, tags and all; `<think>` in it is text. Without the
                closing tag it ends before the next `<tool_call>` or with a stop token
    answer      the rest

    `starts_inside`: the prompt ended with `<think>`. The two tags of reasoning are left out, as are newlines before the
    answer begins. Where one stood within an answer, or within reasoning, and no newline does, a blank line takes its
    place.
    """

    def __init__(self, tokenizer: Tokenizer, starts_inside: bool) -> None:
        self._tokenizer = tokenizer
        self._text = tokenizer.stream()
        self._part: Part = "reasoning" if starts_inside else "answer"
        self._last = {True: "", False: ""}  # character of the reasoning, and of answer and calls
        self._left_out = False  # a tag, since the last text

    def push(self, token_id: int) -> list[tuple[Part, str]]:
        """The text that this token completes, and where it belongs."""
        names = self._tokenizer
        if token_id in (names.think_open_id, names.think_close_id) and self._part != "tool_call":
            parts = self.finish()
            self._part = "reasoning" if token_id == names.think_open_id else "answer"
            self._left_out = True
            return parts
        parts = []
        if token_id == names.call_open_id and self._part != "reasoning":
            parts = self.finish()
            self._part = "tool_call"
        parts += self._parts(self._text.push(token_id))
        if self._part == "tool_call" and token_id in (names.call_close_id, *names.stop_ids):
            parts += self.finish()
            self._part = "answer"
        return parts

    def finish(self) -> list[tuple[Part, str]]:
        """Return what is left at the end: U+FFFD for half a character."""
        return self._parts(self._text.finish())

    def _parts(self, text: str) -> list[tuple[Part, str]]:
        thinks = self._part == "reasoning"
        last = self._last[thinks]
        if not last and not thinks:
            text = text.lstrip("\r\n")
        if not text:
            return []
        parts: list[tuple[Part, str]] = [(self._part, text)]
        if self._left_out and last and not {last, text[0]} & set("\r\n"):
            parts.insert(0, ("reasoning" if thinks else "answer", GAP))
        self._last[thinks], self._left_out = text[-1], False
        return parts
