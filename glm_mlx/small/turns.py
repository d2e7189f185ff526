"""What every task of the corpus makes: turns, and the messages in them."""

from dataclasses import dataclass, field
from typing import Any

Message = dict[str, Any]


@dataclass(frozen=True)
class Style:
    """How a conversation is held: with reasoning, in short answers, from the held-out half of the words."""

    thinking: bool
    brief: bool
    held_out: bool


@dataclass(frozen=True)
class Turn:
    """A user's message and what follows up to the next one. `expected` is what `exam.grade` wants of the answer."""

    messages: list[Message]
    expected: dict[str, Any] = field(default_factory=dict)


def user(content: str) -> Message:
    return {"role": "user", "content": content}


def assistant(style: Style, reasoning: str, content: str, **others: Any) -> Message:
    """The reasoning is kept only where the conversation has thinking on."""
    thought = {"reasoning_content": reasoning} if style.thinking else {}
    return {"role": "assistant", **thought, "content": content, **others}


def turn(style: Style, question: str, reasoning: str, answer: str, **expected: Any) -> Turn:
    return Turn([user(question), assistant(style, reasoning, answer)], expected)
