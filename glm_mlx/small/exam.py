"""Held-out exam questions for the small model, and exact rules to grade its answers.

| task | right when |
|---|---|
| addition | the answer is the sum, alone or in a sentence that holds no number but the sum and the two added |
| tools | only the calls are written, each with the tool's name and exactly the arguments, typed as the schema says |
| story | of all words of its kind (names, animals, colours, places …) the answer has the right one alone |
| format | reasoning, answer, calls and the stop token stand as GLM's format has them; nothing about the content |

Every answer must also have ended by itself.
"""

import json
import random
import re
from dataclasses import dataclass
from typing import Any

from glm_mlx.small import puzzles, stories, tool_calls
from glm_mlx.small.corpus import conversations, make_style
from glm_mlx.small.turns import Message, Style

EXAMS = ("addition", "tools", "story", "format")

_SPECIAL = re.compile(r"<\|[a-z]+\|>|\[[a-zM]MASK\]|<[se]op>|</?(?:think|tool_call|tool_response|arg_key|arg_value)>")
_ARGUMENT = r"<arg_key>([^<>]+)</arg_key><arg_value>((?:(?!</?arg_|</?tool_).)*)</arg_value>"
_CALL = re.compile(rf"<tool_call>([^<>]+)((?:{_ARGUMENT})*)</tool_call>", re.DOTALL)
_CALLS = re.compile(rf"(?:<tool_call>[^<>]+(?:{_ARGUMENT})*</tool_call>)+", re.DOTALL)
_JSON_TYPES: dict[str, tuple[type, ...]] = {"integer": (int,), "number": (int, float), "boolean": (bool,)}


@dataclass(frozen=True)
class Case:
    """An exam question: `messages` go up to the assistant's turn, with the reasoning of older turns."""

    messages: list[Message]
    tools: list[dict[str, Any]] | None
    thinking: bool
    task: str
    expected: dict[str, Any]


def exam(task: str, count: int, seed: int) -> list[Case]:
    """Held-out questions of one of EXAMS, the same for the same seed.

    addition: two numbers of two digits, thinking on. tools: one or two calls. story: a question about a story
    in the conversation. format: any turn of any held-out conversation.
    """
    if task not in EXAMS:
        raise ValueError(f"no exam {task!r}; there are {', '.join(EXAMS)}")
    rng = random.Random(f"exam {task} {seed}")
    if task == "format":
        return _format_cases(rng, count, seed)
    make = {"addition": _addition_case, "tools": _tools_case, "story": _story_case}[task]
    return [make(rng) for _ in range(count)]


def _addition_case(rng: random.Random) -> Case:
    style, opening = make_style(rng, held_out=True)
    while True:
        turn = puzzles.addition(rng, Style(True, style.brief, True), digits=2)
        if min(turn.expected["numbers"]) >= 10:
            break
    return Case(opening + turn.messages[:1], None, True, "addition", turn.expected)


def _tools_case(rng: random.Random) -> Case:
    style, opening = make_style(rng, held_out=True)
    tools = tool_calls.make_tools(rng, held_out=True)
    turn = tool_calls.call_turn(rng, style, tools)
    schemas = [tool.schema() for tool in tools]
    return Case(opening + turn.messages[:1], schemas, style.thinking, "tools", turn.expected)


def _story_case(rng: random.Random) -> Case:
    style, opening = make_style(rng, held_out=True)
    while True:
        turns = stories.story_turns(rng, style, questions=rng.choice((1, 2)))
        if "word" in turns[-1].expected:
            break
    before = [message for turn in turns for message in turn.messages][:-1]
    return Case(opening + before, None, style.thinking, "story", turns[-1].expected)


def _format_cases(rng: random.Random, count: int, seed: int) -> list[Case]:
    cases = []
    for _, conversation in zip(range(count), conversations(seed, held_out=True), strict=False):
        messages = conversation.messages
        cut = rng.choice([index for index, message in enumerate(messages) if message["role"] == "assistant"])
        cases.append(Case(messages[:cut], conversation.tools, conversation.thinking, "format", {}))
    return cases


def grade(case: Case, reasoning: str, answer: str, raw: str, finished: bool) -> bool:
    """Whether an answer is right.

    `reasoning` and `answer` are the plain text before and after `</think>`, without special tokens. `raw` is every
    token that the model made with the special ones spelled out, the one that stopped it last; it starts inside the
    reasoning if the case has thinking on. `finished`: it stopped by itself.
    """
    if not finished or not is_well_formed(case, raw):
        return False
    if case.task == "addition":
        numbers = [int(number) for number in re.findall(r"-?\d+", answer.replace(",", ""))]
        return numbers[-1:] == case.expected["numbers"][-1:] and set(numbers) <= set(case.expected["numbers"])
    if case.task == "story":
        words = {word.lower() for word in re.findall(r"[^\W\d_]+", answer)}
        rivals = {rival.lower() for rival in case.expected["rivals"]}
        return case.expected["word"].lower() in words and words.isdisjoint(rivals)
    if case.task == "tools":
        # Parsed by the schema's types, so true is not 1 here. The order of arguments is free, that of calls is not.
        return bool(parse_calls(_after_reasoning(case, raw), case.tools or []) == case.expected["calls"])
    return True


def is_well_formed(case: Case, raw: str) -> bool:
    """Reasoning closed where thinking is on; then text, or calls of given tools alone; then the right stop token."""
    body, _, _ = raw.rpartition("<|")
    stop = raw[len(body) :]
    if case.thinking:
        thought, closed, _ = body.partition("</think>")
        if not closed or not thought.strip() or _SPECIAL.search(thought):
            return False
    written = _after_reasoning(case, raw)
    if "<tool_call>" in written:
        return stop == "<|observation|>" and parse_calls(written, case.tools or []) is not None
    return stop == "<|user|>" and written.strip() != "" and not _SPECIAL.search(written)


def _after_reasoning(case: Case, raw: str) -> str:
    """The answer and calls, without the stop token."""
    body = raw.rpartition("<|")[0]
    return body.partition("</think>")[2] if case.thinking else body


def parse_calls(text: str, tools: list[dict[str, Any]]) -> list[dict[str, Any]] | None:
    """The calls in a text that holds nothing else: names and typed arguments. None if it is not that.

    Also None for a tool or an argument that the schemas do not have, and a value that is not of its type.
    """
    if not _CALLS.fullmatch(text):
        return None
    schemas = {tool["function"]["name"]: tool["function"]["parameters"]["properties"] for tool in tools}
    calls = []
    for found in _CALL.finditer(text):
        name, arguments = found[1], {}
        for key, value in re.findall(_ARGUMENT, found[2], re.DOTALL):
            if key in arguments or key not in schemas.get(name, {}):
                return None
            try:
                arguments[key] = _typed(value, schemas[name][key]["type"])
            except ValueError:
                return None
        if name not in schemas:
            return None
        calls.append({"name": name, "arguments": arguments})
    return calls


def _typed(text: str, kind: str) -> Any:
    """A value as the schema's type reads it: strings as they stand, the rest as JSON. ValueError if it is not that."""
    if kind == "string":
        return text
    value = json.loads(text)
    if type(value) not in _JSON_TYPES[kind]:
        raise ValueError(f"{text!r} is no {kind}")
    return value
