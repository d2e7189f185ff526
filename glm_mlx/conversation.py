"""A chat as the tokens that the model has seen, so that a turn computes only what it adds."""

from collections.abc import Mapping
from typing import Any

from glm_mlx.chat import encode_chat
from glm_mlx.template import ChatTemplate
from glm_mlx.tokenizer import Tokenizer

Message = Mapping[str, Any]


class Conversation:
    """Messages, and the token ids of all turns so far, answers as the model wrote them.

    An answer that is decoded, put through the template and encoded again may come out as other tokens (another split
    into tokens, other white space), and the cache would miss from there on. So a turn is its tokens as they were, and
    what the template puts behind them for the next turn. Where the template renders the turns so far otherwise than
    before, they are taken as it renders them. So it is with `keep_reasoning` off: an answer is then read once more,
    without its reasoning.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        template: ChatTemplate,
        system: str | None = None,
        thinking: bool = True,
        keep_reasoning: bool = True,
    ):
        self.tokenizer, self.template = tokenizer, template
        self.thinking, self.keep_reasoning = thinking, keep_reasoning
        self._opening: list[Message] = [{"role": "system", "content": system}] if system else []
        self.reset()

    def reset(self) -> None:
        """Back to the system message."""
        self.messages = list(self._opening)
        self._ids: list[int] = []  # of `messages`, as the model has seen them
        self._rendered: list[int] = []  # the same as the template renders them

    def ask(self, text: str) -> list[int]:
        """The prompt for an answer to `text`, which is no part of the conversation before `add`."""
        whole = self._encode([*self.messages, {"role": "user", "content": text}], add_generation_prompt=True)
        behind = len(self._rendered)
        if self._ids and whole[:behind] == self._rendered:
            return [*self._ids, *whole[behind:]]
        return whole

    def add(self, text: str, prompt: list[int], tokens: list[int], reasoning: str, answer: str) -> None:
        """A turn: what was asked, the prompt that `ask` made of it, the tokens generated, and their text.

        Raises InputError where the template does; the conversation is then as it was.
        """
        thought = reasoning if self.keep_reasoning else ""
        said = {"role": "assistant", "content": answer, "reasoning_content": thought}
        messages = [*self.messages, {"role": "user", "content": text}, said]
        if self.keep_reasoning:
            self._rendered = self._encode(messages, add_generation_prompt=False)
            self._ids = self._closed([*prompt, *tokens])
        self.messages = messages

    def _closed(self, ids: list[int]) -> list[int]:
        """A turn's tokens with the end that the template gives it, however the model ended."""
        think, answer = self.tokenizer.think_open_id, self.tokenizer.think_close_id
        stop_ids = self.tokenizer.stop_ids
        if ids[-1] in stop_ids:  # belongs to the answer or to what follows it: the template knows
            ids = ids[:-1]
        if answer is not None and next((t for t in reversed(ids) if t in (think, answer)), answer) != answer:
            ids = [*ids, answer]  # its thought was cut short
        return ids + [token for token in self._rendered[-1:] if token in stop_ids]

    def _encode(self, messages: list[Message], add_generation_prompt: bool) -> list[int]:
        return encode_chat(
            self.tokenizer,
            self.template,
            messages,
            thinking=self.thinking,
            add_generation_prompt=add_generation_prompt,
            clear_thinking=not self.keep_reasoning,
        )
