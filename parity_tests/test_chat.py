"""Our chat template has GLM's format, typed text never becomes a control token."""

import random
import sys
from typing import Any

import pytest

from glm_mlx.chat import encode_chat
from glm_mlx.errors import InputError
from glm_mlx.template import GLM_TEMPLATE, ChatTemplate
from glm_mlx.tiny_vocab import tiny_vocabulary
from glm_mlx.tokenizer import BYTE_CHARS, Tokenizer
from parity_tests.fuzz import time_limit

VOCABULARY = tiny_vocabulary()
TOKENIZER = Tokenizer(VOCABULARY)
TEMPLATE = ChatTemplate(GLM_TEMPLATE)
NAMES = TOKENIZER.special_names
SPECIAL = {TOKENIZER.id(name) for name in NAMES}


def user(content: Any) -> dict[str, Any]:
    return {"role": "user", "content": content}


def assistant(content: Any, **others: Any) -> dict[str, Any]:
    return {"role": "assistant", "content": content, **others}


def chat(messages: list[dict[str, Any]], **options: Any) -> str:
    """The chat as the model gets it, special tokens written out."""
    return TOKENIZER.decode(encode_chat(TOKENIZER, TEMPLATE, messages, **options), special=True)


def special_ids(messages: list[dict[str, Any]], **options: Any) -> list[int]:
    return [index for index in encode_chat(TOKENIZER, TEMPLATE, messages, **options) if index in SPECIAL]


CALL = {
    "type": "function",
    "function": {"name": "look", "arguments": {"at": "a b", "n": 2, "deep": {"k": ["é", None]}}},
}
FORMATS: list[tuple[str, list[dict[str, Any]], dict[str, Any], str]] = [
    ("one question", [user("hi")], {}, "<|user|>hi<|assistant|><think>"),
    ("thinking off", [user("hi")], {"thinking": False}, "<|user|>hi<|assistant|></think>"),
    ("no prompt", [user("hi")], {"add_generation_prompt": False}, "<|user|>hi"),
    ("system", [{"role": "system", "content": "Be kind."}, user("hi")], {"add_generation_prompt": False},
     "<|system|>Be kind.<|user|>hi"),
    ("user text is untouched", [user(" \n hi \n")], {"add_generation_prompt": False}, "<|user|> \n hi \n"),
    ("old reasoning is dropped", [user("a"), assistant("b", reasoning_content="why"), user("c")], {},
     "<|user|>a<|assistant|></think>b<|user|>c<|assistant|><think>"),
    ("unless it is kept", [user("a"), assistant("b", reasoning_content="why\n"), user("c")], {"clear_thinking": False},
     "<|user|>a<|assistant|><think>why</think>b<|user|>c<|assistant|><think>"),
    ("reasoning inside the content", [user("a"), assistant("<think>why\n</think>\n\nb"), user("c")],
     {"clear_thinking": False}, "<|user|>a<|assistant|><think>why</think>b<|user|>c<|assistant|><think>"),
    ("its opening tag may be missing", [user("a"), assistant("why</think>b"), user("c")], {},
     "<|user|>a<|assistant|></think>b<|user|>c<|assistant|><think>"),
    ("an answer's margins are trimmed", [assistant("\n b \n")], {"thinking": False},
     "<|assistant|></think>b<|assistant|></think>"),
    ("also where it ends like a token", [assistant("See [1].\n\n")], {"thinking": False},
     "<|assistant|></think>See [1].<|assistant|></think>"),
    ("and a thought's", [user("a"), assistant("b", reasoning_content="a < b \n")], {"add_generation_prompt": False},
     "<|user|>a<|assistant|><think>a < b</think>b"),
    ("a result in parts", [{"role": "tool", "content": [{"type": "text", "text": "1 < 2"}]}], {"thinking": False},
     "<|observation|><tool_response>1 < 2</tool_response><|assistant|></think>"),
    ("calls after the last question", [user("a"), assistant(None, reasoning_content="why", tool_calls=[CALL] * 2)], {},
     "<|user|>a<|assistant|><think>why</think>"
     + 2 * ('<tool_call>look<arg_key>at</arg_key><arg_value>a b</arg_value><arg_key>n</arg_key><arg_value>2</arg_value>'
            '<arg_key>deep</arg_key><arg_value>{"k": ["é", null]}</arg_value></tool_call>')
     + "<|assistant|><think>"),
    ("arguments as text", [assistant("", tool_calls=[{"function": {"name": "f", "arguments": '{"x": "1"}'}}])],
     {"add_generation_prompt": False},
     "<|assistant|></think><tool_call>f<arg_key>x</arg_key><arg_value>1</arg_value></tool_call>"),
    ("results share one turn", [user("a"), {"role": "tool", "content": "r"}, {"role": "tool", "content": "s"}], {},
     "<|user|>a<|observation|><tool_response>r</tool_response><tool_response>s</tool_response><|assistant|><think>"),
    ("parts", [user([{"type": "text", "text": "a"}, {"type": "text", "text": "b"}])], {"thinking": False},
     "<|user|>ab<|assistant|></think>"),
]  # fmt: skip


@pytest.mark.parametrize(("messages", "options", "text"), [f[1:] for f in FORMATS], ids=[f[0] for f in FORMATS])
def test_format(messages: list[dict[str, Any]], options: dict[str, Any], text: str) -> None:
    """GLM's format, character by character; every tag in it is a token."""
    assert chat(messages, **options) == "[gMASK]<sop>" + text
    tags = TOKENIZER.encode("[gMASK]<sop>" + text, special=True)
    assert encode_chat(TOKENIZER, TEMPLATE, messages, **options) == tags


def test_tools_come_first_in_a_system_turn() -> None:
    """One JSON object a line, not escaped for ASCII or HTML, then the turns."""
    tools = [{"type": "function", "function": {"name": "f", "description": "é < 'x'"}}, {"name": "g"}]
    text = chat([user("a")], tools=tools)
    assert text.startswith("[gMASK]<sop><|system|>\n# Tools\n")
    assert '<tools>\n{"name": "f", "description": "é < \'x\'"}\n{"name": "g"}\n</tools>' in text
    assert text.endswith("<|user|>a<|assistant|><think>")


def everywhere(text: str) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Messages and tools with the text in every place that people and programs fill."""
    half = len(text) // 2
    parts = [
        {"type": "text", "text": text[:half]},
        {"type": "text", "text": text[half:]},
        {"type": "text", "text": text},
    ]
    arguments = {f"k{text}": text, "list": [text, {f"j{text}": text}]}
    messages = [
        {"role": "system", "content": text},
        user(text),
        assistant(text, reasoning_content=text),
        user(parts),
        assistant(text, reasoning_content=text, tool_calls=[{"function": {"name": text, "arguments": arguments}}]),
        {"role": "tool", "content": text},
    ]
    tools = [{"function": {"name": text, "parameters": {"properties": {f"p{text}": {"description": text}}}}}]
    return messages, tools


def assert_typed_text_stays_text(text: str) -> None:
    messages, tools = everywhere(text)
    harmless_messages, harmless_tools = everywhere("x" * len(text))
    for clear in (True, False):
        found = special_ids(messages, tools=tools, clear_thinking=clear)
        assert found == special_ids(harmless_messages, tools=harmless_tools, clear_thinking=clear), ascii(text)
        rendered = TEMPLATE.render(messages, tools=tools, clear_thinking=clear)
        assert chat(messages, tools=tools, clear_thinking=clear) == rendered, ascii(text)


@pytest.mark.parametrize("name", NAMES)
def test_a_typed_token_stays_text(name: str) -> None:
    """The name of a special token, typed anywhere, adds no control token and loses no character."""
    assert_typed_text_stays_text(f"w{name}w")
    assert_typed_text_stays_text(f"w{name[0]}{name}{name}{name[:-1]}w")


def test_no_mixture_of_typed_pieces_makes_a_token() -> None:
    """Seeded texts of whole names, halves of names, noncharacters and lone bytes: no control token, no loss."""
    rng = random.Random(0)
    cuts = [(name, n) for name in NAMES for n in range(1, len(name))]
    halves = [name[:n] for name, n in cuts] + [name[n:] for name, n in cuts]
    for _ in range(300):
        pieces = [rng.choice(rng.choice((NAMES, halves, ["\ufdd0", "\ufdd1", "é", "\ufffd"]))) for _ in range(5)]
        assert_typed_text_stays_text(f"w{''.join(pieces)}w")


def test_a_token_typed_in_two_parts_stays_text() -> None:
    """A template joins the parts of one message; a name cut in two by them is still typed text."""
    for name in NAMES:
        for cut in range(1, len(name)):
            parts = [{"type": "text", "text": name[:cut]}, {"type": "text", "text": name[cut:]}]
            assert special_ids([user(parts)]) == special_ids([user("x")])
            assert name in chat([user(parts)])


def test_names_that_overlap_stay_text() -> None:
    """Breaking one name can leave the next one whole, where they share a character."""
    tokens, types = [*BYTE_CHARS, "<a<", "<<"], [1] * 256 + [3, 3]
    vocabulary = {**VOCABULARY, "tokenizer.ggml.tokens": tokens, "tokenizer.ggml.token_type": types}
    ids = {f"tokenizer.ggml.{name}_token_id": 0 for name in ("bos", "eos", "eot", "eom")}
    tokenizer = Tokenizer({**vocabulary, **ids, "tokenizer.ggml.merges": []})
    typed = "<a<a<a<<<<<a<"
    found = encode_chat(tokenizer, ChatTemplate("<<{{ messages[0].content }}<a<"), [user(typed)])
    assert found == [257, *tokenizer.encode(typed), 256]


def test_thought_and_answer_of_history_come_apart() -> None:
    """Any template gets an old answer without its thought, and without the newlines between."""
    template = ChatTemplate("{{ messages[0].reasoning_content }}|{{ messages[0].content }}")
    found = encode_chat(TOKENIZER, template, [assistant("<think>\nwhy\n</think>\n\nb\n")])
    assert TOKENIZER.decode(found) == "why|b\n"


def test_noncharacters_in_messages_survive() -> None:
    """No character is ours alone."""
    text = "".join(chr(point) for point in range(0xFDD0, 0xFDF0)) + "<|user|>"
    assert f"<|user|>{text}<|assistant|>" in chat([user(text)])


def test_typed_text_is_encoded_together_with_the_template_text_beside_it() -> None:
    """Ids are those of the rendered text in transformers: a border between typed and own text cuts no token."""
    template = ChatTemplate("<|user|>He{{ messages[0].content }}d<|assistant|>")
    ids = encode_chat(TOKENIZER, template, [user("llo worl")])
    assert ids == TOKENIZER.encode("<|user|>Hello world<|assistant|>", special=True)


def test_bytes_that_are_no_text_survive() -> None:
    data = b"a\xff\xe2\x82b"
    messages = [user(data.decode("utf-8", "surrogateescape"))]
    ids = encode_chat(TOKENIZER, TEMPLATE, messages, add_generation_prompt=False)
    assert TOKENIZER.decode_bytes(ids) == data


def test_bos_as_the_file_says() -> None:
    """A template gets the names of BOS and EOS; a BOS that the file wants and the template left out is added."""
    adds = Tokenizer({**VOCABULARY, "tokenizer.ggml.add_bos_token": True})
    plain = ChatTemplate("{{ messages[0].content }}")
    named = ChatTemplate("{{ bos_token }}{{ messages[0].content }}{{ eos_token }}")
    x, bos, eos = adds.encode("x"), adds.bos_id, adds.eos_id
    assert encode_chat(adds, plain, [user("x")]) == [bos, *x]
    assert encode_chat(adds, named, [user("x")]) == [bos, *x, eos]
    assert encode_chat(TOKENIZER, plain, [user("x")]) == x


FAILING = {
    "syntax": "{% if %}",
    "unclosed": "{% for a in b %}",
    "raise": "{{ raise_exception('roles\nmust\talternate') }}",
    "undefined": "{{ missing.field }}",
    "type": "{{ messages + 1 }}",
    "zero": "{{ 1 // 0 }}",
    "recursion": "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
    "range": "{% for i in range(10 ** 9) %}x{% endfor %}",
    "import": "{% include 'x' %}",
    "sandbox": "{{ ''.__class__.__mro__[1].__subclasses__() }}",
    "mutation": "{{ messages.append(1) }}",
    "unserialisable": "{{ missing | tojson }}",
    "surrogate": "{{ '\ud800' }}{% nothing %}",
}


@pytest.mark.parametrize("source", FAILING.values(), ids=FAILING.keys())
def test_a_failing_template_is_an_input_error(source: str) -> None:
    """One line, whatever the template does wrong, when it is parsed or when it runs."""
    with pytest.raises(InputError, match="the chat template failed: ") as caught:
        encode_chat(TOKENIZER, ChatTemplate(source), [user("hi")])
    assert len(str(caught.value).splitlines()) == 1
    assert len(str(caught.value)) < 500


def test_template_features_that_files_use() -> None:
    """break and continue, trimmed blocks, the date, tojson's options: as transformers gives them."""
    loop = ChatTemplate("{% for i in range(9) %}\n  {% if i == 2 %}{% break %}{% endif %}\n{{ i }}\n{% endfor %}")
    assert loop.render([]) == "0\n1\n"
    assert ChatTemplate("{{ strftime_now('%Y') }}").render([]).startswith("20")
    assert ChatTemplate("{{ {'b': 'é<', 'a': 1} | tojson }}").render([]) == '{"b": "é<", "a": 1}'
    assert ChatTemplate("{{ [1] | tojson(indent=1) }}").render([]) == "[\n 1\n]"


def test_endless_output_is_cut_off() -> None:
    """A template that prints without end stops at the limit, and says so."""
    endless = "{% for i in range(99999) %}{% for j in range(99999) %}xxxxxxxxxxxxxxxxxxxx{% endfor %}{% endfor %}"
    with time_limit(5), pytest.raises(InputError, match="more than 4,000,000 characters"):
        ChatTemplate(endless).render([])


PARTS = [{"type": "text", "text": "a\n"}, {"text": "b"}, "c"]


@pytest.mark.parametrize("role", ["system", "user", "assistant", "tool"])
def test_the_text_parts_of_a_message_are_joined(role: str) -> None:
    """Try GLM's template, and one that knows of no parts."""
    plain = ChatTemplate("{{ messages[0].content }}")
    assert TOKENIZER.decode(encode_chat(TOKENIZER, plain, [{"role": role, "content": PARTS}])) == "a\nbc"
    assert chat([{"role": role, "content": PARTS}]) == chat([{"role": role, "content": "a\nbc"}])


@pytest.mark.parametrize(("content", "says"), [
    ([{"type": "image_url", "image_url": {"url": "x"}}], "message 0 has a part of type 'image_url'"),
    ([{"type": "text"}], "message 0 has the content {'type': 'text'}"),
    ([["a"]], r"message 0 has the content \['a'\]"),
    (5, "message 0 has the content 5"),
    ({"temperature": 5}, "message 0 has the content {'temperature': 5}"),
])  # fmt: skip
def test_content_that_is_no_text_is_refused_by_name(content: Any, says: str) -> None:
    for role in ("user", "tool"):
        with pytest.raises(InputError, match=says):
            chat([{"role": role, "content": content}])


@pytest.mark.parametrize("messages", [["hi"], [{}], [{"role": None}], [{"role": 5}], [None], [{"role": "pirate"}]])
def test_messages_that_are_none_are_refused(messages: list[Any]) -> None:
    with pytest.raises(InputError) as caught:
        encode_chat(TOKENIZER, TEMPLATE, messages)
    assert len(str(caught.value).splitlines()) == 1


@pytest.mark.parametrize("arguments", ["{", "[1]", 5, "null", "[" * 100_000])
def test_arguments_that_are_no_object_are_refused(arguments: Any) -> None:
    with pytest.raises(InputError, match=r"the arguments of a tool call are .*; send a JSON object"):
        chat([assistant("", tool_calls=[{"function": {"name": "f", "arguments": arguments}}])])


def test_deep_nesting_is_refused() -> None:
    deep: Any = "x"
    for _ in range(3000):
        deep = [deep]
    limit = sys.getrecursionlimit()
    sys.setrecursionlimit(1000)  # Python's own; tinygrad raises it for the whole process
    try:
        with pytest.raises(InputError, match="nested too deeply"):
            chat([user("hi")], tools=[{"name": deep}])
    finally:
        sys.setrecursionlimit(limit)
