"""Messages to token ids through the file's chat template.

Text that a person typed never becomes a control token: only characters that the template wrote itself are searched for
the names of special tokens. Everything between those is encoded as plain text.
"""

import json
import reprlib
from collections.abc import Mapping, Sequence
from typing import Any

from glm_mlx.errors import InputError
from glm_mlx.provenance import own, runs
from glm_mlx.template import ChatTemplate
from glm_mlx.tokenizer import Tokenizer

# A template may write `"<|" ~ message.role ~ "|>"`: these words count as its own there, any other role as typed.
_ROLES = frozenset(("system", "developer", "user", "assistant", "tool", "function", "observation"))


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
        text = template.render(
            [_prepare(number, _plain(message)) for number, message in enumerate(messages)],
            tools=_plain(tools),
            thinking=thinking,
            add_generation_prompt=add_generation_prompt,
            clear_thinking=clear_thinking,
            bos_token=_name(tokenizer, tokenizer.bos_id),
            eos_token=_name(tokenizer, tokenizer.eos_id),
        )
    except RecursionError as error:
        raise InputError("the messages or tools are nested too deeply; make them flatter") from error
    ids: list[int] = []
    plain: list[str] = []  # the text since the last special token
    for is_own, piece in runs(text):
        for part in tokenizer.split_special(piece) if is_own else (piece,):
            if isinstance(part, str):
                plain.append(part)
            else:
                ids += (*tokenizer.encode("".join(plain)), part)
                plain.clear()
    ids += tokenizer.encode("".join(plain))
    if tokenizer.add_bos and tokenizer.bos_id is not None and ids[:1] != [tokenizer.bos_id]:
        ids.insert(0, tokenizer.bos_id)
    return ids


def _prepare(number: int, message: Any) -> dict[str, Any]:
    """One message in the form that templates expect: content as one text, thought apart, arguments as an object."""
    if not isinstance(message, Mapping) or not isinstance(message.get("role"), str):
        raise InputError(f"message {number} is no object with a role; write {{'role': 'user', 'content': 'text'}}")
    role, content = message["role"], _text(number, message.get("content"))
    prepared = {**message, "role": own(role) if role in _ROLES else role, "content": content}
    thought, closed, answer = content.partition("</think>")
    if role == "assistant" and closed and message.get("reasoning_content") is None:
        prepared["reasoning_content"] = thought.removeprefix("<think>").strip("\n")
        prepared["content"] = answer.lstrip("\n")
    if isinstance(message.get("tool_calls"), list):
        prepared["tool_calls"] = [_with_arguments(call) for call in message["tool_calls"]]
    return prepared


def _text(number: int, content: Any) -> str:
    """The content of a message as text. Its parts are joined as GLM's template joins them, with nothing between.

    Done for every template: one that does not know of parts would print the list.
    """
    parts = content if isinstance(content, list | tuple) else ["" if content is None else content]
    texts = []
    for part in parts:
        kind = part.get("type", "text") if isinstance(part, Mapping) else "text"
        text = part.get("text") if isinstance(part, Mapping) else part
        if kind != "text":
            raise InputError(
                f"message {number} has a part of type {reprlib.repr(kind)}; send text, all else is refused"
            )
        if not isinstance(text, str):
            raise InputError(
                f"message {number} has the content {reprlib.repr(part)}; "
                "send a string, or parts {'type': 'text', 'text': '...'}"
            )
        texts.append(text)
    return "".join(texts)


def _with_arguments(call: Any) -> Any:
    """A tool call with its arguments as an object: clients send them as JSON text, templates ask for `items()`."""
    if not isinstance(call, Mapping):
        return call
    if isinstance(call.get("function"), Mapping):
        return {**call, "function": _with_arguments(call["function"])}
    if isinstance(call.get("arguments"), str):
        try:
            call = {**call, "arguments": json.loads(call["arguments"] or "{}")}
        except (ValueError, RecursionError) as error:
            raise InputError(f"the arguments of a tool call are no JSON ({error}); send a JSON object") from error
    if not isinstance(call.get("arguments", {}), Mapping):
        raise InputError(
            f"the arguments of a tool call are no object but {reprlib.repr(call['arguments'])}; send a JSON object"
        )
    return call


def _plain(value: Any) -> Any:
    """A copy of nested messages or tools in dicts, lists and plain strings, which have no record."""
    if isinstance(value, str):
        return str.__str__(value)
    if isinstance(value, Mapping):
        return {_plain(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return value


def _name(tokenizer: Tokenizer, token_id: int | None) -> str:
    return "" if token_id is None else tokenizer.token(token_id)
