"""Messages to token ids through the file's chat template.

Text that a person typed never becomes a control token. The template is rendered with strings that know which of their
characters the template wrote (`glm_mlx.template_text`), and only names of special tokens that it wrote whole become
tokens. The rest is encoded as plain text. Messages reach the template as they are, so the text is what Jinja makes of
them without this.
"""

import datetime
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

import jinja2
from jinja2 import nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.filters import make_attrgetter
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.visitor import NodeTransformer

from glm_mlx.errors import InputError
from glm_mlx.template_text import joined, own, runs
from glm_mlx.tokenizer import MAX_CHARS, Tokenizer

# GLM's chat format in our own words, for files that bring no template.
GLM_TEMPLATE = Path(__file__).with_name("glm_chat_template.jinja").read_text("utf-8")

MAX_SOURCE = 1 << 17  # characters of a template; those that models come with have a quarter of it at most
# Roles that programs write, not people. A template may make a token's name of one: '<|' ~ message.role ~ '|>'.
ROLES = frozenset({"system", "developer", "user", "assistant", "tool", "function", "observation"})
RESULTS = frozenset({"tool", "function", "observation"})  # roles of what tools gave

OWN, CONCATENATED = "own text", "joined texts"  # filters that no template can name


class ChatTemplate:
    """A Jinja chat template, rendered as transformers does, in Jinja's sandbox.

    The sandbox keeps the template from files, imports and the messages themselves, and bounds `range`; source and
    output are bounded here. Not bounded: the time of nested loops that print nothing, and the size of one expression
    (`'a' * n`).
    """

    def __init__(self, source: object) -> None:
        """InputError for a source that is no text, too long, or no template."""
        if not isinstance(source, str):
            raise InputError(
                f"the chat template is of type {type(source).__name__}, not text; give one with --chat-template FILE"
            )
        if len(source) > MAX_SOURCE:
            raise InputError(
                f"the chat template has {len(source):,} characters, of which {MAX_SOURCE:,} are read; "
                "give another with --chat-template FILE"
            )
        self.source = source
        environment = _Environment(trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols, _Generation])
        environment.filters |= {OWN: _own, CONCATENATED: joined, "join": _join, "tojson": _tojson}
        environment.globals["raise_exception"] = _raise_exception
        environment.globals["strftime_now"] = _strftime_now
        try:
            tree = _Marks().visit(environment.parse(source))
            tree.set_environment(environment)
            self._template = environment.from_string(tree)
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
        """The chat as a `TemplateText`. InputError when the template fails or makes more than 4 million characters.

        bos_token, eos_token: names of tokens, which count as the template's.
        """
        pieces = self._template.generate(
            messages=messages,
            tools=tools,
            enable_thinking=thinking,
            add_generation_prompt=add_generation_prompt,
            clear_thinking=clear_thinking,
            bos_token=own(bos_token),
            eos_token=own(eos_token),
        )
        text: list[str] = []
        size = 0
        try:
            for piece in pieces:
                text.append(piece)
                size += len(piece)
                if size > MAX_CHARS:
                    break
        except InputError:
            raise
        except Exception as error:  # a template can raise anything that Python can
            raise _failed(error) from error
        if size > MAX_CHARS:
            raise InputError(f"the chat comes to more than {MAX_CHARS:,} characters; shorten the messages")
        return joined(text)


def read_template(file: Path) -> ChatTemplate:
    """The template in a file. InputError for what cannot be read or used."""
    try:
        with file.open("rb") as opened:
            source = opened.read(4 * MAX_SOURCE + 1).decode("utf-8")
    except OSError as error:
        raise InputError(f"cannot read the chat template {file}: {error.strerror}; check the path") from error
    except ValueError as error:  # no UTF-8, or a name with a null character
        raise InputError(f"the chat template {file} is no text in UTF-8; save it as such") from error
    return ChatTemplate(source)


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
    text = template.render(
        [_prepare(number, message) for number, message in enumerate(messages)],
        tools=tools,
        thinking=thinking,
        add_generation_prompt=add_generation_prompt,
        clear_thinking=clear_thinking,
        bos_token=_name(tokenizer, tokenizer.bos_id),
        eos_token=_name(tokenizer, tokenizer.eos_id),
    )
    ids, between = list[int](), list[str]()
    for is_own, run in runs(text):
        for part in tokenizer.split_special(run) if is_own else [run]:
            if isinstance(part, int):
                ids += [*tokenizer.encode("".join(between)), part]
                between.clear()
            else:
                between.append(part)
    ids += tokenizer.encode("".join(between))
    if tokenizer.add_bos and tokenizer.bos_id is not None and ids[:1] != [tokenizer.bos_id]:
        ids.insert(0, tokenizer.bos_id)
    return ids


class _Environment(ImmutableSandboxedEnvironment):
    """Joins what blocks, macros and loops print so that its record is kept."""

    concat = staticmethod(joined)


class _Marks(NodeTransformer):
    """Marks what a template writes itself: its text and its strings. `~` keeps the record."""

    def visit_TemplateData(self, node: nodes.TemplateData) -> nodes.Node:  # noqa: N802 (Jinja's name)
        return _filtered(OWN, nodes.Const(node.data, lineno=node.lineno))

    def visit_Const(self, node: nodes.Const) -> nodes.Node:  # noqa: N802
        return _filtered(OWN, node) if isinstance(node.value, str) else node

    def visit_Concat(self, node: nodes.Concat) -> nodes.Node:  # noqa: N802
        self.generic_visit(node)
        return _filtered(CONCATENATED, nodes.List(node.nodes, lineno=node.lineno))


def _filtered(name: str, node: nodes.Expr) -> nodes.Filter:
    return nodes.Filter(node, name, [], [], None, None, lineno=node.lineno)


class _Generation(Extension):
    """transformers' `{% generation %}`, around what the model wrote. Here it prints what is in it."""

    tags = {"generation"}  # noqa: RUF012 (Jinja's)

    def parse(self, parser: Parser) -> nodes.Node:
        lineno = next(parser.stream).lineno
        return nodes.Scope(parser.parse_statements(("name:endgeneration",), drop_needle=True), lineno=lineno)


@jinja2.pass_context  # which keeps Jinja from folding a string into a plain constant
def _own(context: jinja2.runtime.Context, text: str) -> str:
    return own(text)


@jinja2.pass_environment
def _join(environment: jinja2.Environment, value: Any, d: str = "", attribute: str | int | None = None) -> str:
    """Jinja's own `join`, with the record of what it joins."""
    return joined(value if attribute is None else map(make_attrgetter(environment, attribute), value), d)


def _tojson(value: Any, **options: Any) -> str:
    """Jinja's own `tojson` escapes HTML, which is not what models were trained on."""
    try:
        return json.dumps(value, **{"ensure_ascii": False, **options})
    except RecursionError as error:
        raise InputError("the messages or tools are nested too deeply; make them flatter") from error


def _raise_exception(message: str) -> NoReturn:
    raise jinja2.TemplateError(message)


def _strftime_now(form: str) -> str:
    return datetime.datetime.now().strftime(form)


def _failed(error: Exception) -> InputError:
    reason = " ".join(f"{type(error).__name__}: {error}".split())[:300]
    return InputError(
        f"the chat template failed: {reason}; change the messages, or give another template with --chat-template FILE"
    )


def _prepare(number: int, message: Any) -> dict[str, Any]:
    """One message in the form that templates expect: thought apart, no null content, arguments as an object."""
    if not isinstance(message, Mapping) or not isinstance(message.get("role"), str):
        raise InputError(f"message {number} is no object with a role; write {{'role': 'user', 'content': 'text'}}")
    role, content = str(message["role"]), message.get("content") or ""
    if role in RESULTS and isinstance(content, list | tuple):
        content = "\n".join(_text_of_part(number, part) for part in content)
    prepared = {**message, "role": own(role) if role in ROLES else role, "content": content}
    thought, closed, answer = content.partition("</think>") if isinstance(content, str) else ("", "", "")
    if role == "assistant" and closed and message.get("reasoning_content") is None:
        prepared["reasoning_content"] = thought.removeprefix("<think>").strip("\n")
        prepared["content"] = answer.lstrip("\n")
    if isinstance(message.get("tool_calls"), list):
        prepared["tool_calls"] = [_with_arguments(call) for call in message["tool_calls"]]
    return prepared


def _text_of_part(number: int, part: Any) -> str:
    """The text of a part of a tool's result: templates expect one text there."""
    if isinstance(part, str):
        return part
    if isinstance(part, Mapping) and isinstance(part.get("text"), str):
        return str(part["text"])
    kind = part.get("type") if isinstance(part, Mapping) else type(part).__name__
    raise InputError(f"message {number}, the result of a tool, has a part of type {kind}; send parts of text alone")


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


def _name(tokenizer: Tokenizer, token_id: int | None) -> str:
    return "" if token_id is None else tokenizer.token(token_id)
