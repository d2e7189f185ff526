"""A GGUF file's chat template, rendered in Jinja's sandbox to text that knows which characters the template wrote.

The text is the one that plain Jinja renders. Literal text and string constants of a template are compiled to `Traced`
strings; everything that reaches the template from outside is a plain `str`.
"""

import datetime
import json
import reprlib
from collections.abc import Iterable, Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Any, NoReturn

import jinja2
from jinja2 import nodes
from jinja2.compiler import CodeGenerator, Frame
from jinja2.ext import Extension, loopcontrols
from jinja2.filters import do_indent, sync_do_join
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import pass_eval_context

from glm_mlx.errors import InputError
from glm_mlx.provenance import Traced, concat, own
from glm_mlx.tokenizer import MAX_CHARS
from kernels.shown import shown

# GLM's chat format in our own words, for files that bring no template.
GLM_TEMPLATE = Path(__file__).with_name("glm_chat_template.jinja").read_text("utf-8")

# Compiling takes up to 50 us a token. Published templates stay below 100,000 characters, of four a token and more.
MAX_SOURCE = 200_000
MAX_TOKENS = 30_000


class ChatTemplate:
    """A Jinja chat template, rendered as transformers does, in Jinja's sandbox.

    The sandbox keeps the template from files, imports and the messages themselves, and bounds `range`; source and
    output are bounded here. Not bounded: the time of nested loops that print nothing, and the size of one expression
    (`'a' * n`). InputError for a source that is too long, or that is no template.
    """

    def __init__(self, source: str) -> None:
        if len(source) > MAX_SOURCE:
            raise _too_long(MAX_SOURCE, "characters")
        self.source = source
        environment = _Environment()
        try:
            tokens = (kind for _, kind, _ in environment.lex(source) if kind != "whitespace")
            if next(islice(tokens, MAX_TOKENS, None), None) is not None:
                raise _too_long(MAX_TOKENS, "tokens")
            self._template = environment.from_string(source)
        except InputError:
            raise
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
    ) -> Traced:
        """The chat as text. InputError when the template fails or makes more than 4 million characters."""
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
        except Exception as error:  # a template can raise anything that Python can
            raise _failed(error) from error
        if size > MAX_CHARS:
            raise InputError(f"the chat comes to more than {MAX_CHARS:,} characters; shorten the messages")
        return concat(text)


def file_template(metadata: Mapping[str, Any]) -> str:
    """The source of a file's chat template, GLM's own if it has none.

    InputError for one that is no string, and for a file that has named templates and none for all uses.
    """
    source = metadata.get("tokenizer.chat_template")
    prefix = "tokenizer.chat_template."
    named = sorted(key.removeprefix(prefix) for key in metadata if key.startswith(prefix))
    if isinstance(source, str):
        return source
    if source is not None:
        raise InputError(
            f"the file's tokenizer.chat_template is {reprlib.repr(source)}, not a string; "
            "give another one with --chat-template FILE"
        )
    if named:
        raise InputError(
            f"the file has no tokenizer.chat_template, only templates named {reprlib.repr(named)}; "
            "save one of them to a file and give it with --chat-template FILE"
        )
    return GLM_TEMPLATE


def read_template(path: str | Path) -> str:
    """The source in a file. InputError if it cannot be read, is no UTF-8, or is too long."""
    try:
        with open(path, encoding="utf-8-sig") as file:
            source = file.read(MAX_SOURCE + 1)
    except (OSError, ValueError) as error:
        reason = "it is no UTF-8" if isinstance(error, UnicodeError) else getattr(error, "strerror", None) or error
        raise InputError(f"cannot read the chat template '{shown(path)}': {reason}; give a text file") from error
    if len(source) > MAX_SOURCE:
        raise InputError(
            f"the chat template '{shown(path)}' has more than {MAX_SOURCE:,} characters; give a shorter one"
        )
    return source


class _CodeGenerator(CodeGenerator):
    """Compiles string constants and literal text to `Traced` strings, and `~` to an operation that keeps the record.

    They stand in the environment's `constants`, by their text, and are made once.
    """

    environment: "_Environment"

    def visit_Const(self, node: nodes.Const, frame: Frame) -> None:  # noqa: N802 - Jinja's name
        if isinstance(node.value, str):
            self.write(self._constant(node.value))
        else:
            super().visit_Const(node, frame)

    def visit_Concat(self, node: nodes.Concat, frame: Frame) -> None:  # noqa: N802
        if frame.eval_ctx.volatile or frame.eval_ctx.autoescape:
            return super().visit_Concat(node, frame)
        self.write("environment.concat(map(str, (")
        for arg in node.nodes:
            self.visit(arg, frame)
            self.write(", ")
        self.write(")))")

    def _output_const_repr(self, group: Iterable[Any]) -> str:
        return self._constant("".join(group))

    def _constant(self, text: str) -> str:
        self.environment.constants[text] = own(text)
        return f"environment.constants[{text!r}]"


class _Environment(ImmutableSandboxedEnvironment):
    code_generator_class = _CodeGenerator
    concat = staticmethod(concat)  # for macros, blocks of `set` and `filter`, and `~`

    def __init__(self) -> None:
        # The optimizer would put plain strings into constant lists and dicts.
        super().__init__(trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols, _Generation], optimized=False)
        self.constants: dict[str, Traced] = {}
        self.filters["tojson"] = _tojson
        self.filters["join"] = _join
        self.filters["indent"] = _indent
        self.globals["raise_exception"] = _raise_exception
        self.globals["strftime_now"] = _strftime_now


class _Generation(Extension):
    """`{% generation %}` to `{% endgeneration %}`, with which transformers marks what is trained on: rendered as it is.

    A scope of its own, as in transformers.
    """

    tags = {"generation"}  # noqa: RUF012 - Jinja's way

    def parse(self, parser: Parser) -> nodes.Node:
        line = next(parser.stream).lineno
        return nodes.Scope(parser.parse_statements(("name:endgeneration",), drop_needle=True), lineno=line)


def _tojson(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | str | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """JSON as transformers writes it: Jinja's own `tojson` escapes HTML, which is not what models were trained on."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


@pass_eval_context
def _join(context: nodes.EvalContext, value: Iterable[Any], d: Any = "", attribute: str | int | None = None) -> str:
    """Jinja's own, with a separator that keeps the record."""
    return sync_do_join(context, value, Traced(d) if type(d) is str else d, attribute)


def _indent(s: str, width: int | str = 4, first: bool = False, blank: bool = False) -> str:
    """Jinja's own, keeping the record."""
    if not isinstance(s, Traced):
        return do_indent(s, width, first, blank)
    indention = width if isinstance(width, str) else " " * width
    start, *lines = (s + "\n").splitlines()
    rest = (piece for line in lines for piece in ("\n", indention if line or blank else "", line))
    return concat((indention if first else "", start, *rest))


def _raise_exception(message: str) -> NoReturn:
    raise jinja2.TemplateError(message)


def _strftime_now(form: str) -> str:
    return datetime.datetime.now().strftime(form)


def _too_long(limit: int, units: str) -> InputError:
    return InputError(f"the chat template has more than {limit:,} {units}; give another one with --chat-template FILE")


def _failed(error: Exception) -> InputError:
    reason = " ".join(f"{type(error).__name__}: {error}".split())[:300]
    return InputError(
        f"the chat template failed: {reason}; change the messages or give another template with --chat-template FILE"
    )
