"""Seeded conversations for the small model, and their token ids with a loss weight each.

What a conversation is about (several turns mix; `tools` stays with one set of tools):

| task | share | what |
|---|---|---|
| tools | 36 % | a call or two from schemas, results, an answer; sometimes no tool fits |
| story | 16 % | a story told or given, and questions about it |
| addition | 10 % | 1 to 3 digits, 2 most often, worked digit by digit from the right |
| subtraction | 6 % | the same |
| sorting, counting | 4 % each | three to six words; one to nine words |
| project | 6 % | what this model and this program are |
| talk, scope | 3.5 % each | greetings and thanks; a polite no |
| copying | 11 % | words, names and numbers to be said again: a model this small copies only what it has copied |

Half of the conversations with thinking on and several turns keep their old reasoning (`clear_thinking=False`), half
drop it, as both occur when a model is used. One in five has a system message; "briefly" in it means short answers.
"""

import json
import random
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from glm_mlx.small import puzzles, stories, talk, tool_calls
from glm_mlx.small.turns import Message, Style, Turn
from glm_mlx.template import GLM_TEMPLATE, ChatTemplate
from glm_mlx.tokenizer import Tokenizer

TASKS = {
    "tools": 36.0,
    "story": 16.0,
    "addition": 10.0,
    "subtraction": 6.0,
    "sorting": 4.0,
    "counting": 4.0,
    "project": 6.0,
    "talk": 3.5,
    "scope": 3.5,
    "copying": 11.0,
}
_SINGLE_TURNS = {
    "addition": puzzles.addition,
    "subtraction": puzzles.subtraction,
    "sorting": puzzles.sorting,
    "counting": puzzles.counting,
    "project": talk.project_question,
    "talk": talk.small_talk,
    "scope": talk.out_of_scope,
    "copying": talk.copying,
}
_SINGLE_WEIGHTS = [TASKS[task] for task in _SINGLE_TURNS]
_MAX_CHARS = 1250  # about 400 tokens: several conversations share a row of 512

_SYSTEM = (
    "You are a helpful assistant.",
    "You are a friendly assistant.",
    "You are a very small model.",
    "You are a kind and patient helper.",
    "You are an assistant in a program.",
    "Be polite.",
    "Help the user.",
    "Be helpful and kind.",
)
_SYSTEM_BRIEF = (
    "Answer briefly.",
    "You are a helpful assistant. Answer briefly.",
    "Keep it short.",
    "Give short answers.",
    "Be brief.",
)

# The lines around the schemas, as `glm_chat_template.jinja` writes them.
_TOOLS_BEFORE = "\n# Tools\n\nThese functions can be called, one JSON object a line:\n<tools>\n"
_TOOLS_AFTER = "</tools>\n\nTo call a function, write:\n"
_CALL_SHAPE = ["<tool_call>", "name", "<arg_key>", "key", "</arg_key>", "<arg_value>", "value", "</arg_value>"]
_CALL_SHAPE += ["</tool_call>"]

# The weight of a token in the loss: what the assistant writes, and what it reads.
WRITTEN, READ = 1.0, 0.1


@dataclass(frozen=True)
class Conversation:
    """`messages` and `tools` as in OpenAI's chat format; `clear_thinking` as the chat template takes it."""

    messages: list[Message]
    tools: list[dict[str, Any]] | None
    thinking: bool
    task: str
    clear_thinking: bool = True


def conversations(seed: int, held_out: bool = False, task: str | None = None) -> Iterator[Conversation]:
    """Conversations without end, the same for the same arguments.

    With `held_out`, names of tools and of parameters, string values, names in stories and sums are those that training
    never sees; the words that they are made of are the same.
    With `task`, every turn is of that task.
    """
    rng = random.Random(f"{seed} {held_out} {task}")  # a text seeds through SHA-512, the same on every machine
    while True:
        yield make_conversation(rng, held_out, task)


def make_style(rng: random.Random, held_out: bool) -> tuple[Style, list[Message]]:
    """How a conversation is held, and the system message that says so, if any."""
    thinking, kind = rng.random() < 0.55, rng.random()
    if kind < 0.8:
        return Style(thinking, False, held_out), []
    brief = kind > 0.92
    message = {"role": "system", "content": rng.choice(_SYSTEM_BRIEF if brief else _SYSTEM)}
    return Style(thinking, brief, held_out), [message]


def make_conversation(rng: random.Random, held_out: bool, task: str | None) -> Conversation:
    main = task or rng.choices(list(TASKS), list(TASKS.values()))[0]
    style, messages = make_style(rng, held_out)
    count = rng.choices((1, 2, 3, 4), (50, 28, 14, 8))[0]
    tools = None
    if main == "tools":
        turns, tools = tool_calls.tool_turns(rng, style, 1 if rng.random() < 0.7 else 2)
    elif main == "story":
        turns = stories.story_turns(rng, style, rng.choice((0, 1, 1, 2, 2, 3)))
        if task is None and count > 2:
            turns += [_single(rng, style) for _ in range(count - 2)]
            if rng.random() < 0.3:
                turns.insert(0, turns.pop())
    elif task is None:
        turns = [_SINGLE_TURNS[main](rng, style)] + [_single(rng, style) for _ in range(count - 1)]
    else:
        turns = [_SINGLE_TURNS[main](rng, style) for _ in range(count)]
    chars = len(json.dumps(tools))
    used = 0
    for turn in turns:
        chars += sum(len(str(message)) - 40 for message in turn.messages)
        if used and chars > _MAX_CHARS:
            break
        messages += turn.messages
        used += 1
    return Conversation(messages, tools, style.thinking, main, clear_thinking=used < 2 or rng.random() < 0.5)


def _single(rng: random.Random, style: Style) -> Turn:
    """A turn of any task that is one question and one answer."""
    return _SINGLE_TURNS[rng.choices(list(_SINGLE_TURNS), _SINGLE_WEIGHTS)[0]](rng, style)


def encode(tokenizer: Tokenizer, template: ChatTemplate, conversation: Conversation) -> tuple[list[int], list[float]]:
    """Token ids of a conversation and the loss weight of each: 1.0 for what the assistant writes, else 0.1.

    The assistant writes its reasoning, `</think>` after it, its answer, its calls, and the role token that ends its
    turn. This does not run the template, which would take most of the time: it knows the format of `GLM_TEMPLATE`, and
    a test holds it to `encode_chat`. ValueError for another template, and for a text that it would have to trim.
    """
    if template.source != GLM_TEMPLATE:
        raise ValueError("encode knows the format of GLM_TEMPLATE only; pass ChatTemplate(GLM_TEMPLATE)")
    ids: list[int] = []
    weights: list[float] = []
    for text, special, weight in segments(conversation):
        if special:
            token = tokenizer.id(text)
            if token is None:
                raise ValueError(f"the vocabulary has no {text}; train it with glm_mlx.small.vocabulary")
            ids.append(token)
            weights.append(weight)
        elif text:
            part = tokenizer.encode(text)
            ids += part
            weights += [weight] * len(part)
    return ids, weights


def segments(conversation: Conversation) -> Iterator[tuple[str, bool, float]]:
    """The conversation as the template renders it: (text, is it a special token, loss weight)."""
    messages = conversation.messages
    last_user = max((index for index, message in enumerate(messages) if message["role"] == "user"), default=-1)
    yield "[gMASK]", True, READ
    yield "<sop>", True, READ
    if conversation.tools:
        lines = "".join(json.dumps(tool["function"], ensure_ascii=False) + "\n" for tool in conversation.tools)
        yield "<|system|>", True, READ
        yield _TOOLS_BEFORE + lines + _TOOLS_AFTER, False, READ
        for part in _CALL_SHAPE:
            yield part, part.startswith("<"), READ
    before = ""
    for index, message in enumerate(messages):
        role = message["role"]
        ends_turn = WRITTEN if before == "assistant" else READ
        if role == "assistant":
            yield "<|assistant|>", True, READ
            kept = not conversation.clear_thinking or index > last_user
            yield from _assistant_segments(message, kept)
        elif role == "tool":
            if before != "tool":
                yield "<|observation|>", True, ends_turn
            yield "<tool_response>", True, READ
            yield message["content"], False, READ
            yield "</tool_response>", True, READ
        else:
            yield f"<|{role}|>", True, ends_turn
            yield message["content"], False, READ
        before = role
    if before == "assistant":
        yield "<|observation|>" if messages[-1].get("tool_calls") else "<|user|>", True, WRITTEN


def _assistant_segments(message: Message, reasoning_kept: bool) -> Iterator[tuple[str, bool, float]]:
    """What follows `<|assistant|>`; the prompt for an answer holds the first tag, `<think>` or `</think>`."""
    reasoning, content = message.get("reasoning_content"), message["content"]
    if content != content.strip() or (reasoning or "") != (reasoning or "").strip():
        raise ValueError(f"the template would trim {message!r}; write it without spaces at its ends")
    if reasoning and reasoning_kept:
        yield "<think>", True, READ
        yield reasoning, False, WRITTEN
        yield "</think>", True, WRITTEN
    else:
        yield "</think>", True, READ
    yield content, False, WRITTEN
    for call in message.get("tool_calls", ()):
        yield "<tool_call>", True, WRITTEN
        yield call["function"]["name"], False, WRITTEN
        for key, value in call["function"]["arguments"].items():
            yield "<arg_key>", True, WRITTEN
            yield key, False, WRITTEN
            yield "</arg_key>", True, WRITTEN
            yield "<arg_value>", True, WRITTEN
            yield value if isinstance(value, str) else json.dumps(value, ensure_ascii=False), False, WRITTEN
            yield "</arg_value>", True, WRITTEN
        yield "</tool_call>", True, WRITTEN
