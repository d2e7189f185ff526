"""The product's tokenizer agrees with the reference's, keeps every byte, and refuses what it cannot use.

Two vocabularies: the tiny model's, and one where any two bytes may merge, in a shuffled order. In the second, a split
one character off changes the ids; in the first, it would mostly go unseen.
"""

# ruff: noqa: RUF001 - look-alike characters are what is tested

import contextlib
import random
import sys
import time
import unicodedata
from typing import Any

import pytest

from glm_mlx.errors import InputError
from glm_mlx.tiny_vocab import tiny_vocabulary
from glm_mlx.tokenizer import BYTE_CHARS, MAX_CHARS, Tokenizer
from reference.tokenizer import ReferenceTokenizer

TINY = tiny_vocabulary()


def with_tokens(tokens: list[str], types: list[int], merges: list[str], **others: Any) -> dict[str, Any]:
    """Metadata with this vocabulary; keywords are keys under `tokenizer.ggml.`."""
    return {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "glm4",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": types,
        "tokenizer.ggml.merges": merges,
        "tokenizer.ggml.eos_token_id": 0,
        **{f"tokenizer.ggml.{key}": value for key, value in others.items()},
    }


def all_pairs() -> dict[str, Any]:
    """Any two bytes merge, in a seeded order. The special names lie within one another."""
    pairs = [(left, right) for left in BYTE_CHARS for right in BYTE_CHARS]
    random.Random(0).shuffle(pairs)
    special = ["<a>", "<a><b>", "<b>c", "<|user|>", "é€"]
    tokens = [*BYTE_CHARS, *(left + right for left, right in pairs), *special]
    types = [1] * (len(tokens) - len(special)) + [3, 4, 3, 3, 4]
    return with_tokens(tokens, types, [f"{left} {right}" for left, right in pairs])


PAIRS = all_pairs()
BOTH = [(Tokenizer(metadata), ReferenceTokenizer(metadata)) for metadata in (TINY, PAIRS)]
TOKENIZER = BOTH[0][0]

HARD = {
    "empty": "",
    "digits": " ".join("12345678901234567890"[:n] for n in range(1, 21)),
    "digits and letters": "a1b22c333d4444 x12345y ½¾Ⅷ٣٤٥٦ 1,234,567.89 ²³",
    "contractions": "It's I'LL we'Ve you'd he'D 'twas 's 'S don't'S 're'vE can''t 'm'M o'll a'Sbcd 'Sefg h'Tijk",
    "long s": "'\u017f 'ſt It'ſ \u212a'\u212a x'ſabc y'ſdef z'ſghij'ſ",
    "other apostrophes": "it\u2019s ’S ＇s `s",
    "combining": "e\u0301 a\u0308\u0323b \u0301x n\u0303 क्षि நி \u20dd1\u20dd",
    "emoji": "👩‍👩‍👧‍👦 🇩🇪🇫🇷 👍🏽 ❤️ 1️⃣ a😀b",
    "cjk": "你好，世界。日本語のテキスト 한국어 文1字22",
    "thai": "สวัสดีครับ ๑๒๓๔ ภาษาไทย",
    "arabic": "مرحبا بالعالم ١٢٣٤ السَّلَامُ",
    "newlines": "a\r\nb\n\n\nc\r\rd \r\n \n  e\n \n\tf\r\n\r\n",
    "spaces": "  a   b  \n  c    ",
    "only spaces": "     ",
    "leading": "   x",
    "trailing": "x   ",
    "tabs": "\ta\t\tb \t c\t",
    "wide spaces": "a\u00a0b\u00a0\u00a0c \u3000d\u3000\u2003 e\u2028f\u2029\u205fg\u1680h\u202f",
    "no spaces": "a\u180eb\u200bc\u200b\u200b d\ufeffe\u2060 \u180e\u180e",
    "next line": "a\u0085b\u0085\u0085\n\u0085 c",
    "separators": "a\x1cb\x1d\x1ec \x1f d\x0be\x0cf\x00g\x7f",
    "punctuation": "...!!! (a) [b]\n\n {c};\r\n--> a->b != == ///\n//",
    "punctuation and lines": "!\n\n !\r\n x ?!\n",
    "special names": "a<|user|>b <think>\n</think>[gMASK]<sop><|us er|> <a><b>c<b><a>é€",
    "replacement": "\ufffd \ufdd0 \U0010ffff \ue000",
    "code": "def f(x):\n    return x  # 100%\n\n\nclass A:\n\t\tpass\n",
}


@pytest.mark.parametrize("text", HARD.values(), ids=HARD.keys())
def test_hard_text_as_the_reference(text: str) -> None:
    """The same ids as the reference, with and without special tokens, and the text comes back."""
    for tokenizer, reference in BOTH:
        assert tokenizer.encode(text) == reference.encode(text)
        assert tokenizer.encode(text, special=True) == reference.encode_with_special(text)
        assert tokenizer.decode(tokenizer.encode(text)) == text
        assert tokenizer.decode(tokenizer.encode(text, special=True), special=True) == text


def random_texts(seed: int, count: int) -> list[str]:
    """Texts of up to 30 characters, half of them from what the split pattern treats differently."""
    rng = random.Random(seed)
    # Unassigned characters are left out: the two sides have tables of different Unicode versions.
    anywhere = [chr(point) for point in range(0x20000) if unicodedata.category(chr(point)) not in ("Cn", "Cs", "Co")]
    pointed = list("  \n\r\t'sStTrReEvVmMlLdDſ019aZ!.-<|>\u00a0\u0085\u200b\u3000\u0301é你½😀")
    return [
        "".join(rng.choice(rng.choice((anywhere, pointed, pointed[:9]))) for _ in range(rng.randrange(31)))
        for _ in range(count)
    ]


def test_random_unicode_as_the_reference() -> None:
    """3000 seeded texts have the reference's ids and come back unchanged, in both vocabularies."""
    for text in random_texts(seed=1, count=3000):
        for tokenizer, reference in BOTH:
            ids = tokenizer.encode(text)
            assert ids == reference.encode(text), ascii(text)
            assert tokenizer.decode(ids) == text, ascii(text)


def test_every_character_is_classed_as_in_the_reference() -> None:
    """Letter, number, space or other: each assigned character splits from its neighbours as in the reference."""
    points = [point for point in range(sys.maxunicode) if unicodedata.category(chr(point)) not in ("Cn", "Cs", "Co")]
    plain = [
        point for point in points if not 0x3500 < point < 0xA000 and not 0xAC10 < point < 0xD700 and point < 0x20010
    ]
    tokenizer, reference = BOTH[1]
    for start in range(0, len(plain), 100):
        text = "".join(f"a{char}a1{char}1 {char}!" for char in map(chr, plain[start : start + 100]))
        assert tokenizer.encode(text) == reference.encode(text), f"from U+{plain[start]:04X}"


def test_any_bytes_survive() -> None:
    """Bytes that are no UTF-8, read with surrogateescape, come back, and each is its own token."""
    rng = random.Random(2)
    pieces = [
        b"\xff",
        b"\xe2\x82",
        b"\x80",
        b"\xc0\xaf",
        b"\xed\xa0\x80",
        b"\xf4\x90\x80\x80",
        b"the",
        b" ",
        "é".encode(),
    ]
    for _ in range(1000):
        data = b"".join(rng.choice(pieces) for _ in range(rng.randrange(8))) + rng.randbytes(rng.randrange(8))
        text = data.decode("utf-8", "surrogateescape")
        for tokenizer, reference in BOTH:
            ids = tokenizer.encode(text)
            assert tokenizer.decode_bytes(ids) == data
            assert ids == reference.encode(data), data
    assert TOKENIZER.encode("the\udcff") == [*TOKENIZER.encode("the"), TOKENIZER.id(BYTE_CHARS[0xFF])]


def test_other_lone_surrogates_become_replacement_characters() -> None:
    assert TOKENIZER.encode("a\ud800b\udfff\udc7f") == TOKENIZER.encode("a\ufffdb\ufffd\ufffd")


def test_special_tokens_only_when_asked_for() -> None:
    """The name of every special token is plain text by default, and one token with special=True."""
    names = [
        t for t, kind in zip(TINY["tokenizer.ggml.tokens"], TINY["tokenizer.ggml.token_type"], strict=True) if kind > 2
    ]
    special = {TOKENIZER.id(name) for name in names}
    assert len(names) == len(special) == 20
    for name in names:
        assert special.isdisjoint(TOKENIZER.encode(f"a{name}b"))
        assert TOKENIZER.encode(f"a{name}b", special=True)[1:-1] == [TOKENIZER.id(name)]


def test_merges_cannot_make_a_special_token() -> None:
    """A file whose merges spell a special token still gives plain tokens for plain text."""
    tokens = [*BYTE_CHARS, "ab", "abc"]
    metadata = with_tokens(tokens, [1] * 257 + [3], ["a b", "ab c"])
    assert Tokenizer(metadata).encode("abc") == [256, tokens.index("c")]
    assert Tokenizer(metadata).encode("abc", special=True) == [257]


def test_the_first_of_two_equal_merges_counts() -> None:
    """As in llama.cpp, where a later rank does not replace an earlier one."""
    metadata = with_tokens([*BYTE_CHARS, "ab", "bc"], [1] * 258, ["a b", "b c", "a b"])
    assert Tokenizer(metadata).encode("abc") == [256, BYTE_CHARS.index("c")]


def deepseek() -> Tokenizer:
    """A few of DeepSeek-V2-Lite's tokens at their ids: its bytes are those of UTF-8, 13 letters are added tokens."""
    letters = "øöúÿõ÷ûýÀùÁþü"  # from 100002 on
    latin = [char for char in BYTE_CHARS if char not in letters]
    tokens = [*sorted(latin), *[""] * (100_015 - len(latin))]
    types = [1] * len(tokens)
    tokens[100_002:], types[100_002:] = list(letters), [4] * len(letters)
    for index, token in {2874: "Ã¼", 6244: "er", 6245: "rer"}.items():
        tokens[index] = token
    tokens[100_000], types[100_000] = "<｜begin▁of▁sentence｜>", 3
    return Tokenizer(with_tokens(tokens, types, ["Ã ¼", "e r", "r er"], pre="deepseek-llm"))


def test_deepseeks_letters_are_tokens_of_their_own() -> None:
    """`ü` is id 100014, typed or read; the byte that its file's spelling would name is none of UTF-8's."""
    tokenizer = deepseek()
    for special in (False, True):
        assert tokenizer.encode("Führer", special=special) == [37, 100_014, 71, 6245]
    assert tokenizer.decode([37, 100_014, 71, 6245]) == "Führer"
    text = "ü ö ø ú û ù ý õ À Á ÷ ÿ þ ä é ß"
    assert tokenizer.decode(tokenizer.encode(text)) == text
    assert sum(index > 100_000 for index in tokenizer.encode(text)) == 13
    stream = tokenizer.stream()
    assert [stream.push(index) for index in tokenizer.encode("ßü")] == ["", "ß", "ü"]
    assert tokenizer.encode("\udcfc") == tokenizer.encode("\ufffd"), "there is no token for this byte"


def test_a_byte_of_utf_8_is_one_whatever_its_type() -> None:
    """No text could be spelt without it."""
    tokenizer = Tokenizer(with_tokens(list(BYTE_CHARS), [3 + byte % 2 for byte in range(256)], []))
    assert tokenizer.encode("é", special=True) == [0xC3, 0xA9]
    assert tokenizer.decode_bytes([0xC3, 0xA9, 0xE9]) == b"\xc3\xa9\xe9"


def test_user_defined_tokens_are_text_unless_they_look_like_markup() -> None:
    """Words are found in typed text, the longest first; tags only when asked for. Both are shown."""
    names = {"<think>": 4, "[INST]": 4, "/nothink": 4, "/no": 4, "日": 4, "<|user|>": 3, "hidden": 3}
    tokenizer = Tokenizer(with_tokens([*BYTE_CHARS, *names], [1] * 256 + list(names.values()), []))
    ids = {name: 256 + number for number, name in enumerate(names)}
    assert tokenizer.encode("a/nothink/no日") == [97, ids["/nothink"], ids["/no"], ids["日"]]
    for name in ("<think>", "[INST]", "<|user|>", "hidden"):
        assert tokenizer.encode(name) == list(name.encode())
        assert tokenizer.encode(name, special=True) == [ids[name]]
        assert name in tokenizer.special_names
    assert len(tokenizer.special_names) == 4
    assert tokenizer.decode(ids.values()) == "<think>[INST]/nothink/no日"
    assert tokenizer.decode(ids.values(), special=True) == "".join(names)


def test_400_000_special_tokens_are_found_in_little_time() -> None:
    """2 s here, most of it to make them; a look at each name for each place took minutes."""
    names = [f"<|{number}|>" for number in range(400_000)]
    start = time.process_time()
    tokenizer = Tokenizer(with_tokens([*BYTE_CHARS, *names], [1] * 256 + [3, 4] * 200_000, []))
    for _ in range(100):
        assert tokenizer.encode("a<|7|>\ud800<|399999|>\udcff<|400000|>", special=True)[:2] == [97, 256 + 7]
    assert tokenizer.encode("<|" * 100_000, special=True) == list(b"<|" * 100_000)
    assert time.process_time() - start < 10


def test_more_words_than_any_vocabulary_adds_are_refused() -> None:
    """The library would take seconds for 400,000."""
    words = [f"word{number}" for number in range(10_001)]
    with pytest.raises(InputError, match=r"tokenizer.ggml.token_type marks 10,001 plain words as user-defined, 10,000"):
        Tokenizer(with_tokens([*BYTE_CHARS, *words], [1] * 256 + [4] * len(words), []))


def test_decode_hides_control_tokens_and_unknown_ids() -> None:
    """Control tokens show only when asked for, tags always; ids of a padded output layer give nothing."""
    user, call = TOKENIZER.id("<|user|>"), TOKENIZER.id("<tool_call>")
    assert user is not None
    assert call is not None
    ids = [*TOKENIZER.encode("é"), user, call, -1, TOKENIZER.vocab_size, 10**9]
    assert TOKENIZER.decode(ids) == "é<tool_call>"
    assert TOKENIZER.decode(ids, special=True) == "é<|user|><tool_call>"
    assert TOKENIZER.decode(ids[:1]) == "\ufffd"
    assert TOKENIZER.token(TOKENIZER.vocab_size) == TOKENIZER.token(-1) == ""


def test_stream_gives_whole_characters_only() -> None:
    """Each push completes characters, never half of one, and all pieces join to the text."""
    for text in [*HARD.values(), *random_texts(seed=3, count=300)]:
        for tokenizer, _ in BOTH:
            stream = tokenizer.stream()
            shown = ""
            for index in tokenizer.encode(text):
                shown += stream.push(index)
                assert text.startswith(shown), ascii(text)
            assert shown == text
            assert stream.finish() == ""


def test_stream_agrees_with_decode_on_any_tokens() -> None:
    """Random ids, half characters and special tokens among them: the stream joins to what decode gives."""
    rng = random.Random(4)
    for _ in range(500):
        ids = [rng.choice((rng.randrange(128, 256), rng.randrange(580))) for _ in range(rng.randrange(20))]
        stream = TOKENIZER.stream()
        assert "".join(map(stream.push, ids)) + stream.finish() == TOKENIZER.decode(ids)


@pytest.mark.parametrize("unit", ["a", " ", "\n", "\r\n", "!", "1", "ab", "é", "\udcff", "' ", "<|", "\u0301"])
def test_long_runs_take_linear_time(unit: str) -> None:
    """100,000 repeats take 0.02 to 0.4 s here; a quadratic step would take minutes."""
    start = time.perf_counter()
    for tokenizer in (BOTH[1][0], Tokenizer({**TINY, "tokenizer.ggml.pre": "deepseek-llm"})):
        for text in (unit * 100_000, unit * 100_000 + "1"):
            data = text.encode("utf-8", "surrogateescape")
            assert tokenizer.decode_bytes(tokenizer.encode(text, special=True)) == data
    assert time.perf_counter() - start < 20


def test_text_over_the_limit_is_refused() -> None:
    with pytest.raises(InputError, match="4,000,001 characters"):
        TOKENIZER.encode("a" * (MAX_CHARS + 1))


def test_ids_that_the_file_names() -> None:
    """Stop ids come from the end-of-turn keys and from GLM's names; the think tags from their names."""
    named = ("<|endoftext|>", "<|user|>", "<|observation|>")
    assert TOKENIZER.stop_ids == {TOKENIZER.id(name) for name in named}
    assert TOKENIZER.token(TOKENIZER.think_open_id or 0) == "<think>"
    assert TOKENIZER.token(TOKENIZER.think_close_id or 0) == "</think>"
    assert TOKENIZER.token(TOKENIZER.bos_id or 0) == "[gMASK]"
    assert TOKENIZER.vocab_size == 576
    assert not TOKENIZER.add_bos
    bare = Tokenizer(with_tokens(list(BYTE_CHARS), [1] * 256, [], eos_token_id=7, eot_token_id=8, eom_token_id=9))
    assert bare.stop_ids == {7, 8, 9}
    by_name = Tokenizer(with_tokens([*BYTE_CHARS, *named], [1] * 256 + [3] * 3, []))
    assert by_name.stop_ids == {0, 256, 257, 258}
    assert bare.think_open_id is bare.think_close_id is bare.bos_id is bare.id("<think>") is None


def test_deepseek_splits() -> None:
    """deepseek-llm: lines first, then cased letters with one space, marks, trailing spaces, CJK, numbers.

    The expected pieces are written by hand from llama.cpp's patterns.
    """
    tokenizer = Tokenizer({**TINY, "tokenizer.ggml.pre": "deepseek-llm"})
    cases = {
        "Hello wörld жук": ["Hello", " w", "ö", "rld", " жук"],  # ":-~" among the marks holds A-Z and a-z
        "a12 345": ["a", "12", " ", "345"],
        "x  y\r\n\nz": ["x", " ", " y", "\r", "\n", "\n", "z"],
        "你好, world。": ["你好", ",", " world", "。"],
        "end   ": ["end", "   "],
        "它'sİ ½ άώЖ": ["它", "'", "s", "İ", " ", "½", " άώЖ"],
        "äƻöʔü\u0301ß": ["ä", "ƻ", "ö", "ʔ", "ü", "\u0301", "ß"],
        "a{b}~ ！c": ["a", "{", "b", "}~", " ！", "c"],
    }
    for text, pieces in cases.items():
        found = tokenizer._bpe.pre_tokenizer.pre_tokenize_str(text)
        assert [text[start:end] for _, (start, end) in found] == pieces
        assert tokenizer.decode(tokenizer.encode(text)) == text


WILD: list[object] = [
    None,
    "",
    "x",
    "\ud800\n",
    -1,
    0,
    3,
    2**63,
    True,
    1.5,
    float("nan"),
    [],
    [None],
    [[]],
    ["a"],
    ["a", "a"],
    [1, True],
]
FAULTS = [
    ("model", "llama"),
    ("model", None),
    ("pre", "qwen2"),
    ("pre", ["glm4"]),
    ("tokens", None),
    ("tokens", "abc"),
    ("tokens", [*TINY["tokenizer.ggml.tokens"][1:], "more"]),
    ("tokens", [*TINY["tokenizer.ggml.tokens"][:-1], "A"]),
    ("tokens", [*TINY["tokenizer.ggml.tokens"][:-1], 5]),
    ("token_type", None),
    ("token_type", [1]),
    ("token_type", [True] * 576),
    ("token_type", [1.0] * 576),
    ("merges", None),
    ("merges", ["a"]),
    ("merges", [""]),
    ("merges", [" a"]),
    ("merges", ["a "]),
    ("merges", ["t h e"]),
    ("merges", ["t  h"]),
    ("merges", ["q zz"]),
    ("merges", ["z q"]),
    ("merges", [["t", "h"]]),
    ("eos_token_id", 576),
    ("eos_token_id", -1),
    ("eos_token_id", "0"),
    ("eos_token_id", None),
    ("eot_token_id", 2**32 - 1),
    ("bos_token_id", 1.0),
    ("add_bos_token", 1),
]


@pytest.mark.parametrize(("key", "value"), FAULTS)
def test_metadata_that_cannot_be_used_is_named(key: str, value: object) -> None:
    """Each fault is an InputError of one line with the key in it."""
    with pytest.raises(InputError, match=f"tokenizer.ggml.{key}") as caught:
        Tokenizer({**TINY, f"tokenizer.ggml.{key}": value})
    assert len(str(caught.value).splitlines()) == 1
    assert len(str(caught.value)) < 300


@pytest.mark.parametrize("key", ["model", "pre", "tokens", "token_type", "merges", "eos_token_id"])
def test_a_missing_key_is_named(key: str) -> None:
    metadata = {name: value for name, value in TINY.items() if name != f"tokenizer.ggml.{key}"}
    with pytest.raises(InputError, match=f"tokenizer.ggml.{key}"):
        Tokenizer(metadata)


def test_bos_is_needed_where_it_is_to_be_added() -> None:
    with pytest.raises(InputError, match="add_bos_token is true"):
        Tokenizer(with_tokens(list(BYTE_CHARS), [1] * 256, [], add_bos_token=True))


def test_wild_metadata_raises_nothing_but_input_error() -> None:
    """Any value at any key, and any element of a list: a tokenizer that works, or an InputError."""
    rng = random.Random(5)
    for _ in range(400):
        metadata = dict(TINY)
        key = rng.choice(list(metadata))
        if isinstance(metadata[key], list) and rng.random() < 0.7:
            metadata[key] = list(metadata[key])
            metadata[key][rng.randrange(len(metadata[key]))] = rng.choice(WILD)
        else:
            metadata[key] = rng.choice(WILD)
        with contextlib.suppress(InputError):
            tokenizer = Tokenizer(metadata)
            text = "the <|user|> x\ud800\udcff"
            assert tokenizer.decode(tokenizer.encode(text, special=True), special=True) == "the <|user|> x\ufffd\ufffd"
