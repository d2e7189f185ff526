"""Our chat template has GLM's format, typed text never becomes a control token."""

import json
import random
import signal
import sys
import time
from pathlib import Path
from typing import Any, NoReturn

import pytest
from jinja2.ext import loopcontrols
from jinja2.sandbox import ImmutableSandboxedEnvironment

from glm_mlx.chat import GLM_TEMPLATE, MAX_SOURCE, ChatTemplate, encode_chat, read_template
from glm_mlx.errors import InputError
from glm_mlx.tiny_vocab import tiny_vocabulary
from glm_mlx.tokenizer import BYTE_CHARS, Tokenizer

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
    """Seeded texts of whole names, halves of names, sentinels and lone bytes: no control token, no loss."""
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
    text = "".join(chr(point) for point in range(0xFDD0, 0xFDF0)) + "<|user|>"
    assert f"<|user|>{text}<|assistant|>" in chat([user(text)])


# In the manner of published templates: roles within names, trimming, comparisons, blocks, macros, JSON, namespaces.
IN_USE = {
    "roles make names": "{% for m in messages %}{{ '<|' + m['role'] + '|>' + m['content'] + '<|user|>' }}{% endfor %}",
    "by tilde": "{% for m in messages %}{{ '<|' ~ m.role ~ '|>' ~ (m.content | trim) }}{% endfor %}",
    "literal text": "{% for m in messages %}<|{{ m.role }}|>\n{{ m.content }}{{ eos_token }}\n{% endfor %}",
    "set block": "{% set head %}<|user|>{% endset %}{% for m in messages %}{{ head }}{{ m.content }}{% endfor %}",
    "macro": "{% macro turn(m) %}<|user|>{{ m.content.strip() }}{% endmacro %}"
    "{% for m in messages %}{{ turn(m) }}{% endfor %}",
    "call block": "{% macro turn() %}<|user|>{{ caller() }}{% endmacro %}"
    "{% for m in messages %}{% call turn() %}{{ m.content }}<|assistant|>{% endcall %}{% endfor %}",
    "filter block": "{% filter trim %} <|user|>{{ messages[0].content }} {% endfilter %}",
    "joined": "{{ ['<|user|>', messages[0].content, '<|assistant|>'] | join('\n') }}",
    "joined attributes": "{{ messages | map(attribute='content') | join('<|user|>') }}"
    "{{ messages | join('<|user|>', attribute='content') }}",
    "replaced": "{{ '<|user|>X<|assistant|>' | replace('X', messages[0].content) }}",
    "a thought is cut off": "{% for m in messages %}{% if '</think>' in m.content %}"
    "{% set c = m.content.split('</think>')[-1].lstrip('\\n') %}{% else %}{% set c = m.content %}{% endif %}"
    "<|assistant|><think></think>{{ c }}{% endfor %}",
    "comparisons": "{% for m in messages %}{% if m.content.endswith('!') or m.content == 'x' %}<|user|>{% endif %}"
    "{{ m.content | length }}{{ m.content }}{{ m }}{% endfor %}",
    "namespace": "{% set ns = namespace(last='') %}{% for m in messages %}{% set ns.last = '<|user|>' + m.content %}"
    "{% endfor %}{{ ns.last }}",
    "json": "{% for m in messages %}<|user|>{{ m | tojson(indent=2) }}{% endfor %}",
    "conditional": "{{ '<|user|>' if messages else '' }}{{ messages[0].content if messages else '' }}",
    "default": "{{ missing | default('<|user|>') }}{{ messages[0].content }}",
    "upper and lower": "{{ '<|' + (messages[0].role | upper | lower) + '|>' }}{{ messages[0].content | upper }}",
    "indented": "<|user|>{{ messages[0].content | indent(2, true) }}",
    "markup": "<|user|>{{ messages[0].content | e }}{{ '<b>' | safe }}{{ 'a<' + ('<' | e) }}",
    "formatted": "{{ '%s and %s' | format(messages[0].content, 'x') }}{{ '{} {}'.format('y', messages[0].content) }}",
    "GLM's": GLM_TEMPLATE,
}
TEXTS = [" See [1].\n\n", "a < b \n", "hi!", "x", "<think>why</think>\n\nb", "<|user|>w<|USER|>", "", "é {{ x }} & 'q'"]


def plain_jinja(source: str, messages: list[dict[str, Any]], **names: Any) -> str:
    """The same as transformers renders it."""
    environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols])
    environment.filters["tojson"] = lambda value, **options: json.dumps(value, **{"ensure_ascii": False, **options})
    return environment.from_string(source).render(messages=messages, **names)


@pytest.mark.parametrize("source", IN_USE.values(), ids=IN_USE)
def test_text_comes_out_as_jinja_alone_makes_it(source: str) -> None:
    template = ChatTemplate(source)
    for text in TEXTS:
        messages = [user(text), assistant(text, reasoning_content=text), user(text)]
        options = {"add_generation_prompt": True, "enable_thinking": True, "clear_thinking": False, "tools": None}
        wanted = plain_jinja(source, messages, eos_token="<|endoftext|>", bos_token="", **options)
        assert template.render(messages, clear_thinking=False, eos_token="<|endoftext|>") == wanted


@pytest.mark.parametrize(
    ("source", "names"),
    [
        ("{% for m in messages %}{{ '<|' + m['role'] + '|>' + m['content'] }}{% endfor %}", ["<|user|>"]),
        ("<|user|>{{ messages[0].content }}<|assistant|>", ["<|user|>", "<|assistant|>"]),
        ("{{ '<|' ~ messages[0].role ~ '|>' }}", ["<|user|>"]),
        ("{{ ['<|user|>', messages[0].content] | join(' ') }}", ["<|user|>"]),
        ("{{ ['<|user|>', messages[0].content] | join }}", ["<|user|>"]),
        ("{% set x %}<|user|>{% endset %}{{ x }}{{ messages[0].content }}", ["<|user|>"]),
        ("{% macro f() %}<|user|>{% endmacro %}{{ f() }}", ["<|user|>"]),
        ("{{ '<|user|>X' | replace('X', messages[0].content) }}", ["<|user|>"]),
        ("{{ ' <|user|> ' | trim }}{{ 'a,<|user|>'.split(',')[1] }}", ["<|user|>", "<|user|>"]),
        ("{{ bos_token }}{{ eos_token }}<|user|>", ["<|user|>"]),
        ("{% generation %}<|user|>{{ messages[0].content }}{% endgeneration %}", ["<|user|>"]),
    ],
)
def test_what_a_template_writes_becomes_tokens(source: str, names: list[str]) -> None:
    ids = encode_chat(TOKENIZER, ChatTemplate(source), [user("hi")])
    ends = {TOKENIZER.bos_id, TOKENIZER.eos_id} if "bos_token" in source else set()
    assert [TOKENIZER.token(i) for i in ids if i in SPECIAL and i not in ends] == names


@pytest.mark.parametrize(
    ("source", "typed"),
    [
        ("{{ messages[0].content | lower }}", "<|USER|>"),
        ("{{ messages[0].content.casefold() }}", "<|USER|>"),
        ("{{ messages[0].content.lower().strip() }}", " <|USER|> "),
        ("{{ messages[0].content | replace('\n', '') }}", "<|us\ner|>"),
        ("{{ messages[0].content.split('\n') | join }}", "<|us\ner|>"),
        ("{{ messages[0].content | reverse }}", ">|resu|<"),
        ("{{ messages[0].content[::-1] }}", ">|resu|<"),
        ("{{ '<|' + messages[0].content }}", "user|>"),
        ("<|us{{ messages[0].content }}", "er|>"),
        ("{{ messages[0].content }}|>", "<|user"),
        ("{{ '<|%s|>' | format(messages[0].content) }}", "user"),
        ("{{ '<|{}|>'.format(messages[0].content) }}", "user"),
        ("{{ '<|X|>' | replace('X', messages[0].content) }}", "user"),
        ("{{ ['<|', '|>'] | join(messages[0].content) }}", "user"),
        ("{% for c in messages[0].content %}{{ c }}{% endfor %}", "<|user|>"),
        ("{{ messages[0].content | e | string }}{{ messages[0].content | safe }}", "<|user|>"),
        ("{{ messages[0].content | tojson }}{{ messages }}", "<|user|>"),
        ("{% set x = messages[0].content %}{% filter lower %}{{ x }}{% endfilter %}", "<|USER|>"),
        ("{{ messages[0].role }}", "<|user|>"),
    ],
)
def test_no_template_makes_a_token_of_what_was_typed(source: str, typed: str) -> None:
    message = user(typed) if ".role" not in source else {"role": typed, "content": ""}
    ids = encode_chat(TOKENIZER, ChatTemplate(source), [message])
    assert [i for i in ids if i in SPECIAL] == []
    assert TOKENIZER.decode(ids) == plain_jinja(source, [message])


def test_results_of_tools_in_parts_are_text() -> None:
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}, "c"]
    template = ChatTemplate("{{ messages[0].content }}")
    assert TOKENIZER.decode(encode_chat(TOKENIZER, template, [{"role": "tool", "content": parts}])) == "a\nb\nc"
    with pytest.raises(InputError, match=r"message 0, the result of a tool, has a part of type image_url"):
        encode_chat(TOKENIZER, template, [{"role": "tool", "content": [{"type": "image_url", "image_url": {}}]}])


def test_a_thought_that_is_given_apart_leaves_the_content_alone() -> None:
    template = ChatTemplate("{{ messages[0].reasoning_content }}|{{ messages[0].content }}")
    found = encode_chat(TOKENIZER, template, [assistant("a</think>b", reasoning_content="")])
    assert TOKENIZER.decode(found, special=True) == "|a</think>b"


@pytest.mark.parametrize("source", [None, 5, ["{{ x }}"], "{{ a }}" * 300_000])
def test_a_template_that_is_no_text_or_too_long_is_refused_at_once(source: Any) -> None:
    """Jinja takes 20 s for 300,000 expressions."""
    start = time.perf_counter()
    with pytest.raises(
        InputError, match=r"the chat template (is of type (NoneType|int|list), not text|has 2,100,000 char)"
    ):
        ChatTemplate(source)
    assert time.perf_counter() - start < 1


def test_the_longest_template_takes_little_time() -> None:
    start = time.process_time()
    ChatTemplate(("{{ a }}" * MAX_SOURCE)[: MAX_SOURCE // 7 * 7]).render([])
    assert time.process_time() - start < 10


def test_a_template_of_a_file(tmp_path: Path) -> None:
    good, bad = tmp_path / "good.jinja", tmp_path / "bad.jinja"
    good.write_text("é{{ messages[0].content }}", "utf-8")
    bad.write_bytes(b"\xff")
    assert read_template(good).render([user("hi")]) == "éhi"
    for file, why in ((tmp_path, "Is a directory"), (tmp_path / "none", "No such file"), (bad, "no text in UTF-8")):
        with pytest.raises(InputError, match=why) as caught:
            read_template(file)
        assert str(file) in str(caught.value)
        assert len(str(caught.value).splitlines()) == 1


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

    def too_long(number: int, frame: Any) -> NoReturn:
        pytest.exit("a template printed without end", 1)  # Jinja's errors are caught, this one is not

    before = signal.signal(signal.SIGALRM, too_long)
    signal.alarm(20)  # seconds; it takes less than one
    try:
        with pytest.raises(InputError, match="more than 4,000,000 characters"):
            ChatTemplate(endless).render([])
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


@pytest.mark.parametrize("messages", [["hi"], [{}], [{"role": None}], [{"role": 5}], [None], [{"role": "pirate"}]])
def test_messages_that_are_none_are_refused(messages: list[Any]) -> None:
    with pytest.raises(InputError) as caught:
        encode_chat(TOKENIZER, TEMPLATE, messages)
    assert len(str(caught.value).splitlines()) == 1


@pytest.mark.parametrize("arguments", ["{", "[1]", 5, "null"])
def test_arguments_that_are_no_object_are_refused(arguments: Any) -> None:
    with pytest.raises(InputError):
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
