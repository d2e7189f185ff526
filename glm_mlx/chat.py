"""Messages to token ids through the file's chat template.

Text that a person typed never becomes a control token. A typed `<|user|>` is broken by a sentinel before the template
sees it, the rendered chat is cut at the special tokens that are still whole (the template's own), and the sentinel is
taken out of the rest, which is encoded as plain text.
"""

import datetime
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

import jinja2
from jinja2.ext import loopcontrols
from jinja2.sandbox import ImmutableSandboxedEnvironment

from glm_mlx.errors import InputError
from glm_mlx.tokenizer import MAX_CHARS, Tokenizer

# GLM's chat format in our own words, for files that bring no template.
GLM_TEMPLATE = Path(__file__).with_name("glm_chat_template.jinja").read_text("utf-8")

_NONCHARACTERS = [chr(point) for point in range(0xFDD0, 0xFDF0)]  # Unicode promises that these mean nothing


class ChatTemplate:
    """A Jinja chat template, rendered as transformers does, in Jinja's sandbox.

    The sandbox keeps the template from files, imports and the messages themselves, and bounds `range`; the output is
    bounded here. Not bounded: the time of nested loops that print nothing, and the size of one expression (`'a' * n`).
    """

    def __init__(self, source: str) -> None:
        environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols])
        environment.filters["tojson"] = _tojson
        environment.globals["raise_exception"] = _raise_exception
        environment.globals["strftime_now"] = _strftime_now
        self.source = source
        try:
            self._template = environment.from_string(source)
        except Exception as error:  # the source is the file's, and anything may be in it
            raise _failed(error) from error

    def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        thinking: bool = True,
        add_generation_prompt: bool = True,
        clear_thinking: bool = True,
        bos_token: str = "",
        eos_token: str = "",
    ) -> str:
        """The chat as text. InputError when the template fails or makes more than 4 million characters."""
        pieces = self._template.generate(
            messages=messages,
            tools=tools,
            enable_thinking=thinking,
            add_generation_prompt=add_generation_prompt,
            clear_thinking=clear_thinking,
            bos_token=bos_token,
            eos_token=eos_token,
        )
        text: list[str] = []
        size = 0
        try:
            for piece in pieces:
                text.append(piece)
                size += len(piece)
                if size > MAX_CHARS:
                    break
        except Exception as error:  # a template can raise anything that Python can
            raise _failed(error) from error
        if size > MAX_CHARS:
            raise InputError(f"the chat comes to more than {MAX_CHARS:,} characters; shorten the messages")
        return "".join(text)


def encode_chat(
    tokenizer: Tokenizer,
    template: ChatTemplate,
    messages: Sequence[Mapping[str, Any]],
    *,
    tools: Sequence[Mapping[str, Any]] | None = None,
    thinking: bool = True,
    add_generation_prompt: bool = True,
    clear_thinking: bool = True,
) -> list[int]:
    """Token ids of a chat, ready for the model.

    `messages` and `tools` are as in OpenAI's chat format. `clear_thinking=False` keeps the reasoning of old turns.
    Special tokens come from the template alone, never from the messages or tools.
    """
    try:
        prepared = [_prepare(number, message) for number, message in enumerate(messages)]
        sentinel = _sentinel(template.source, tokenizer.special_names, prepared, tools)
        broken = _breaker(tokenizer.special_names, sentinel)
        text = template.render(
            _map_strings(prepared, broken),
            tools=_map_strings(tools, broken),
            thinking=thinking,
            add_generation_prompt=add_generation_prompt,
            clear_thinking=clear_thinking,
            bos_token=_name(tokenizer, tokenizer.bos_id),
            eos_token=_name(tokenizer, tokenizer.eos_id),
        )
    except RecursionError as error:
        raise InputError("the messages or tools are nested too deeply; make them flatter") from error
    ids: list[int] = []
    for part in tokenizer.split_special(text):
        if isinstance(part, int):
            ids.append(part)
        else:
            ids.extend(tokenizer.encode(part.replace(sentinel, "")))
    if tokenizer.add_bos and tokenizer.bos_id is not None and ids[:1] != [tokenizer.bos_id]:
        ids.insert(0, tokenizer.bos_id)
    return ids


def _tojson(value: Any, **options: Any) -> str:
    """Jinja's own `tojson` escapes HTML, which is not what models were trained on."""
    return json.dumps(value, **{"ensure_ascii": False, **options})


def _raise_exception(message: str) -> NoReturn:
    raise jinja2.TemplateError(message)


def _strftime_now(form: str) -> str:
    return datetime.datetime.now().strftime(form)


def _failed(error: Exception) -> InputError:
    reason = " ".join(f"{type(error).__name__}: {error}".split())[:300]
    return InputError(f"the file's chat template failed: {reason}; change the messages or use another GGUF file")


def _prepare(number: int, message: Any) -> dict[str, Any]:
    """One message in the form that templates expect: thought apart, no null content, arguments as an object."""
    if not isinstance(message, Mapping) or not isinstance(message.get("role"), str):
        raise InputError(f"message {number} is no object with a role; write {{'role': 'user', 'content': 'text'}}")
    content = message.get("content") or ""
    prepared = {**message, "content": content}
    thought, closed, answer = content.partition("</think>") if isinstance(content, str) else ("", "", "")
    if message["role"] == "assistant" and closed and not message.get("reasoning_content"):
        prepared["reasoning_content"] = thought.removeprefix("<think>").strip("\n")
        prepared["content"] = answer.lstrip("\n")
    if isinstance(message.get("tool_calls"), list):
        prepared["tool_calls"] = [_with_arguments(call) for call in message["tool_calls"]]
    return prepared


def _with_arguments(call: Any) -> Any:
    """A tool call with its arguments as an object: clients send them as JSON text, templates ask for `items()`."""
    if not isinstance(call, Mapping):
        return call
    if isinstance(call.get("function"), Mapping):
        return {**call, "function": _with_arguments(call["function"])}
    if isinstance(call.get("arguments"), str):
        try:
            return {**call, "arguments": json.loads(call["arguments"] or "{}")}
        except ValueError as error:
            raise InputError(f"the arguments of a tool call are no JSON ({error}); send a JSON object") from error
    return call


def _map_strings(value: Any, change: Callable[[str], str]) -> Any:
    """A copy of nested messages or tools with every string changed, keys too."""
    if isinstance(value, str):
        return change(value)
    if isinstance(value, Mapping):
        return {_map_strings(key, change): _map_strings(item, change) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_map_strings(item, change) for item in value]
    return value


def _sentinel(*given: Any) -> str:
    """The first noncharacter that no string in the given values holds."""
    used: set[str] = set()

    def note(text: str) -> str:
        used.update(text)
        return text

    _map_strings(list(given), note)
    free = next((char for char in _NONCHARACTERS if char not in used), None)
    if free is None:
        raise InputError("the messages hold all noncharacters from U+FDD0 to U+FDEF; remove one of them")
    return free


def _breaker(names: Sequence[str], sentinel: str) -> Callable[[str], str]:
    """Puts the sentinel after the first character of each of the names in a text.

    Also at the end of a text in which a name may have begun: a template may join two texts (the parts of a message).
    """
    firsts = {name[0] for name in names}
    longest = max(map(len, names), default=0)

    def broken(text: str) -> str:
        for name in names:
            while name in text:  # again where two overlap
                text = text.replace(name, name[0] + sentinel + name[1:])
        return text + sentinel if firsts.intersection(text[-longest:]) else text

    return broken


def _name(tokenizer: Tokenizer, token_id: int | None) -> str:
    return "" if token_id is None else tokenizer.token(token_id)
