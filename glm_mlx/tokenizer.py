"""Text to token ids and back: byte-level BPE from a GGUF file's `tokenizer.ggml.*` metadata.

Sources: the key names and the split patterns are those of llama.cpp (`src/llama-vocab.cpp` at 00ad355e); the BPE itself
is the `tokenizers` library. Choices of our own:
- Plain text never becomes a special token unless the caller asks for it. Special are control tokens (token_type 3) and
  markup: user-defined tokens (4) with an angle or square bracket in their name, as `<think>` and `<tool_call>`.
- Other user-defined tokens are text, and plain text becomes them: letters that DeepSeek's vocabulary lacks (`ü`).
- Decoded text holds user-defined tokens, markup too. It holds control tokens only if the caller asks for them.
- Bytes that are no UTF-8 survive: each becomes its own byte token, or U+FFFD where the file has none for it.

The file spells plain tokens in GPT-2's byte alphabet, special and user-defined ones as they are. `ü` is a letter in one
and the byte 0xFC in the other, so the type decides. A vocabulary needs the bytes of UTF-8: they are bytes in any type.
"""

import codecs
import re
import reprlib
from collections.abc import Iterable, Iterator, Mapping
from functools import cached_property
from typing import Any

import tokenizers
from tokenizers import Regex, models, pre_tokenizers

from glm_mlx.errors import InputError

# The regex library gives up (and panics) in a run of about 10 million spaces; no context holds this much text.
MAX_CHARS = 4_000_000
MAX_WORDS = 10_000  # the library takes seconds for 400,000; DeepSeek's files have fewer than a hundred

_GLM4 = (
    r"(?:'[sS]|'[tT]|'[rR][eE]|'[vV][eE]|'[mM]|'[lL][lL]|'[dD])|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)

# The letters that deepseek-llm keeps together: the cased letters of an older Unicode, so `\p{L}` will not do.
_DEEPSEEK_LETTERS = """
    41-5A 61-7A B5 C0-D6 D8-F6 F8-1BA 1BC-1BF 1C4-293 295-2AF 370-373 376 377 37B-37D 37F 386 388-38A 38C 38E-3A1
    3A3-3F5 3F7-481 48A-52F 531-556 10A0-10C5 13A0-13F5 13F8-13FD 1C90-1CBA 1CBD-1CBF 1D00-1D2B 1D6B-1D77 1D79-1D9A
    1E00-1F15 1F18-1F1D 1F20-1F45 1F48-1F4D 1F50-1F57 1F59 1F5B 1F5D 1F5F-1F7D 1F80-1FB4 1FB6-1FBC 1FBE 1FC2-1FC4
    1FC6-1FCC 1FD0-1FD3 1FD6-1FDB 1FE0-1FEC 1FF2-1FF4 1FF6-1FFC 2102 2107 210A-2113 2115 2119-211D 2124 2126 2128
    212A-212D 212F-2134 2139 213C-213F 2145-2149 214E 2183 2184 2C00-2C7B 2C7E-2CE4 2CEB-2CEE 2CF2 2CF3 A640-A66D
    A680-A69B A722-A76F A771-A787 A78B-A78E AB70-ABBF FB00-FB06 FB13-FB17 FF21-FF3A FF41-FF5A 10400-1044F 104B0-104D3
    104D8-104FB 10C80-10CB2 10CC0-10CF2 118A0-118DF 1E900-1E943"""
_DEEPSEEK_MARKS = "21-2F 3A-7E FF01-FF0F FF1A-FF5E 2018-201F 3000-3002"
_DEEPSEEK_CJK = "4E00-9FA5 800-4E00 AC00-D7FF"


def _class(ranges: str) -> str:
    """A regex character class from hexadecimal code points and ranges."""
    items = (re.sub(r"[0-9A-F]+", lambda point: chr(int(point[0], 16)), item) for item in ranges.split())
    return f"[{''.join(items)}]"


# `tokenizer.ggml.pre` -> patterns. Each splits what the one before left; text between matches stays a piece.
_PATTERNS = {
    "glm4": [_GLM4],
    "chatglm-bpe": [_GLM4],
    "deepseek-llm": [
        r"[\r\n]",
        rf"\s?{_class(_DEEPSEEK_LETTERS)}+",
        rf"\s?{_class(_DEEPSEEK_MARKS)}+",
        r"(?<!\s)\s+$",  # written `\s+$` there, which takes quadratic time on a long run of spaces
        rf"{_class(_DEEPSEEK_CJK)}+",
        r"\p{N}+",
    ],
}

_CONTROL, _USER_DEFINED = 3, 4
_STOP_TOKENS = ("<|endoftext|>", "<|user|>", "<|observation|>")
_STOP_KEYS = ("tokenizer.ggml.eos_token_id", "tokenizer.ggml.eot_token_id", "tokenizer.ggml.eom_token_id")


def _byte_chars() -> tuple[str, ...]:
    """GPT-2's table: printable Latin-1 stands for itself, the other 68 bytes take U+0100 upwards, in order."""
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = iter(range(0x100, 0x200))
    return tuple(chr(byte) if byte in printable else chr(next(others)) for byte in range(256))


BYTE_CHARS = _byte_chars()  # byte -> the character that stands for it in the file's tokens
_BYTE_ALPHABET = frozenset(BYTE_CHARS)
_CHAR_TO_LATIN1 = {ord(char): byte for byte, char in enumerate(BYTE_CHARS)}
_NEVER_IN_UTF8 = frozenset(BYTE_CHARS[byte] for byte in (0xC0, 0xC1, *range(0xF5, 0x100)))

_BRACKET = re.compile(r"[<>\[\]]")  # in the name of markup
_ESCAPED_BYTE = re.compile("([\udc80-\udcff])")  # what `surrogateescape` makes of a byte that is no UTF-8
_OTHER_SURROGATE = re.compile("[\ud800-\udc7f\udd00-\udfff]")
_SURROGATES = re.compile("([\ud800-\udfff]+)")


class Tokenizer:
    """The vocabulary of one GGUF file.

    `metadata` is the file's key/values as plain Python values. InputError, naming the key, for any that cannot be used.
    """

    def __init__(self, metadata: Mapping[str, Any]) -> None:
        model = metadata.get("tokenizer.ggml.model")
        if model != "gpt2":
            raise _unusable("tokenizer.ggml.model", f"is {reprlib.repr(model)}, not 'gpt2' (byte-level BPE)")
        pre = metadata.get("tokenizer.ggml.pre")
        if not isinstance(pre, str) or pre not in _PATTERNS:
            raise _unusable("tokenizer.ggml.pre", f"is {reprlib.repr(pre)}, not one of {', '.join(_PATTERNS)}")
        self._tokens: list[str] = _list(metadata, "tokenizer.ggml.tokens", str)
        types: list[int] = _list(metadata, "tokenizer.ggml.token_type", int)
        if len(types) != len(self._tokens):
            raise _unusable("tokenizer.ggml.token_type", f"has {len(types)} entries for {len(self._tokens)} tokens")
        self._ids = _ids_by_token(self._tokens)
        named = [
            (token, index, kind)
            for index, (token, kind) in enumerate(zip(self._tokens, types, strict=True))
            if kind in (_CONTROL, _USER_DEFINED) and not _is_byte(token, kind)
        ]
        self._control_ids = frozenset(index for _, index, kind in named if kind == _CONTROL)
        self._raw_ids = frozenset(index for _, index, _ in named)  # spelled as they are, not in the byte alphabet
        self._special = {token: i for token, i, kind in named if token and (kind == _CONTROL or _BRACKET.search(token))}
        self._words = {token: i for token, i, _ in named if token and token not in self._special}
        if len(self._words) > MAX_WORDS:
            raise _unusable(
                "tokenizer.ggml.token_type",
                f"marks {len(self._words):,} plain words as user-defined, {MAX_WORDS:,} at most",
            )
        self._byte_ids = [None if char in self._words else self._ids.get(char) for char in BYTE_CHARS]
        for byte, char in enumerate(BYTE_CHARS):
            if self._byte_ids[byte] is None and char not in _NEVER_IN_UTF8:
                raise _unusable("tokenizer.ggml.tokens", f"has no token for the byte 0x{byte:02X}")
        self._bpe = self._build(pre, _list(metadata, "tokenizer.ggml.merges", str))

        if "tokenizer.ggml.eos_token_id" not in metadata:
            raise _unusable("tokenizer.ggml.eos_token_id", "is missing")
        stops = {_token_id(metadata, key, len(self._tokens)) for key in _STOP_KEYS}
        stops.update(self._ids.get(token) for token in _STOP_TOKENS)
        self.stop_ids: frozenset[int] = frozenset(index for index in stops if index is not None)
        self.bos_id: int | None = _token_id(metadata, "tokenizer.ggml.bos_token_id", len(self._tokens))
        self.eos_id: int | None = _token_id(metadata, "tokenizer.ggml.eos_token_id", len(self._tokens))
        self.add_bos = metadata.get("tokenizer.ggml.add_bos_token", False)
        if not isinstance(self.add_bos, bool):
            raise _unusable("tokenizer.ggml.add_bos_token", f"is {reprlib.repr(self.add_bos)}, not true or false")
        if self.add_bos and self.bos_id is None:
            raise _unusable("tokenizer.ggml.add_bos_token", "is true, and tokenizer.ggml.bos_token_id is missing")
        self.think_open_id: int | None = self._ids.get("<think>")
        self.think_close_id: int | None = self._ids.get("</think>")
        self.call_open_id: int | None = self._ids.get("<tool_call>")
        self.call_close_id: int | None = self._ids.get("</tool_call>")
        self.vocab_size = len(self._tokens)

    def _build(self, pre: str, merges: list[str]) -> tokenizers.Tokenizer:
        """The library's tokenizer over plain tokens and words alone, so that it cannot make a special one."""
        plain = {
            token: index
            for token, index in self._ids.items()
            if index not in self._raw_ids and _BYTE_ALPHABET.issuperset(token)
        }
        pairs: dict[tuple[str, str], None] = {}  # ordered, and the first of two equal merges counts
        for merge in merges:
            left, _, right = merge.partition(" ")
            if left in plain and right in plain and left + right in plain:
                pairs[left, right] = None
            elif not left or not right or " " in right:
                raise _unusable("tokenizer.ggml.merges", f"has {reprlib.repr(merge)}, which is not two tokens")
            elif not {left, right, left + right} <= self._ids.keys():
                raise _unusable("tokenizer.ggml.merges", f"has {reprlib.repr(merge)}, which names an unknown token")
            # Else the merge needs a special token, or one that no bytes can spell: text never reaches it.
        words = {token: index for token, index in self._words.items() if not _SURROGATES.search(token)}
        bpe = tokenizers.Tokenizer(models.BPE(vocab=plain | words, merges=list(pairs)))
        bpe.add_special_tokens(list(words))  # "special" for the library: found in a text before it is split
        splits: list[Any] = [pre_tokenizers.Split(Regex(pattern), "isolated") for pattern in _PATTERNS[pre]]
        byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
        bpe.pre_tokenizer = pre_tokenizers.Sequence([*splits, byte_level])
        return bpe

    def encode(self, text: str, *, special: bool = False) -> list[int]:
        """Token ids of a text, without a BOS.

        With `special`, the names of special tokens in the text become those tokens; without, they stay plain text.
        U+DC80 to U+DCFF (bytes read with `surrogateescape`) become byte tokens; other lone surrogates become U+FFFD.
        InputError for more than 4 million characters.
        """
        if len(text) > MAX_CHARS:
            raise InputError(f"the text has {len(text):,} characters, over the limit of {MAX_CHARS:,}; shorten it")
        ids: list[int] = []
        for part in self.split_special(text) if special else [text]:
            if isinstance(part, int):
                ids.append(part)
            else:
                ids.extend(self._encode_plain(part))
        return ids

    def _encode_plain(self, text: str) -> Iterator[int]:
        for piece in _ESCAPED_BYTE.split(_OTHER_SURROGATE.sub("\ufffd", text)):
            if _ESCAPED_BYTE.match(piece):
                index = self._byte_ids[ord(piece) - 0xDC00]
                yield from self._encode_plain("\ufffd") if index is None else [index]
            elif piece:
                yield from self._bpe.encode(piece, add_special_tokens=False).ids

    def split_special(self, text: str) -> Iterator[str | int]:
        """The text cut at the names of special tokens: ids for the names, the longest first, and text between."""
        start = 0
        for at, end in self._find_special(text):
            if at > start:
                yield text[start:at]
            yield self._special[text[at:end]]
            start = end
        if start < len(text):
            yield text[start:]

    def _find_special(self, text: str) -> Iterator[tuple[int, int]]:
        """Yield (start, end) of each name of a special token in the text."""
        if self._finder is None:
            return
        at = 0
        for piece in _SURROGATES.split(text):  # which the library does not take; no name holds one
            if piece and not _SURROGATES.match(piece):
                found = self._finder.encode(piece, add_special_tokens=False)
                yield from ((at + a, at + b) for i, (a, b) in zip(found.ids, found.offsets, strict=True) if i)
            at += len(piece)

    @cached_property
    def special_names(self) -> list[str]:
        """What `split_special` looks for, the longest first.

        A name of one character is left out: in text it could not be told from the character itself.
        """
        return sorted((name for name in self._special if len(name) > 1), key=len, reverse=True)

    @cached_property
    def _finder(self) -> tokenizers.Tokenizer | None:
        """A tokenizer whose tokens are the special names, and 0 is all between them.

        The library finds them in one pass over the text, however many there are: a file may name 400,000.
        """
        names = [name for name in self.special_names if not _SURROGATES.search(name)]
        if not names:
            return None
        finder = tokenizers.Tokenizer(models.WordLevel({"?": 0}, unk_token="?"))
        finder.add_special_tokens(names)
        return finder

    def decode_bytes(self, ids: Iterable[int], *, special: bool = False) -> bytes:
        """The bytes of some tokens. Control tokens give their names if `special`, else nothing.

        Ids outside the vocabulary (a padded output layer has some) give nothing.
        """
        return b"".join(self._token_bytes(index, special) for index in ids)

    def decode(self, ids: Iterable[int], *, special: bool = False) -> str:
        """As `decode_bytes`, as text; bytes that are no UTF-8 become U+FFFD."""
        return self.decode_bytes(ids, special=special).decode("utf-8", "replace")

    def _token_bytes(self, index: int, special: bool) -> bytes:
        token = self.token(index)
        if index in self._control_ids and not special:
            return b""
        if index not in self._raw_ids and _BYTE_ALPHABET.issuperset(token):
            return token.translate(_CHAR_TO_LATIN1).encode("latin-1")
        return token.encode("utf-8", "replace")

    def stream(self) -> "Detokenizer":
        """A decoder that takes one token at a time."""
        return Detokenizer(self)

    def token(self, index: int) -> str:
        """The token as the file spells it, "" for an id outside the vocabulary."""
        return self._tokens[index] if 0 <= index < len(self._tokens) else ""

    def id(self, token: str) -> int | None:
        """The id of a token as the file spells it."""
        return self._ids.get(token)


class Detokenizer:
    """Tokens to text as they come: the pieces join to what `Tokenizer.decode` gives, and no character is ever cut."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def push(self, token_id: int) -> str:
        """The text that this token completes; "" for a control token."""
        return self._decoder.decode(self._tokenizer.decode_bytes([token_id]))

    def finish(self) -> str:
        """What is left, U+FFFD for half a character. The decoder is then new again."""
        return self._decoder.decode(b"", final=True)


def _is_byte(token: str, kind: int) -> bool:
    """True for a token that stands for a byte though its type is special.

    A user-defined one of the 13 bytes that UTF-8 never uses is the letter instead: DeepSeek's files have those.
    """
    return token in _BYTE_ALPHABET and not (kind == _USER_DEFINED and token in _NEVER_IN_UTF8)


def _unusable(key: str, what: str) -> InputError:
    return InputError(f"the file's {key} {what}; use another GGUF file of this model")


def _list(metadata: Mapping[str, Any], key: str, kind: type) -> list[Any]:
    """The list at a key, all of one type."""
    value = metadata.get(key)
    if value is None:
        raise _unusable(key, "is missing")
    # By type, not isinstance: a bool is an int, and no token type.
    if not isinstance(value, list) or not set(map(type, value)) <= {kind}:
        raise _unusable(key, f"is {reprlib.repr(value)}, not a list of {kind.__name__}")
    return value


def _ids_by_token(tokens: list[str]) -> dict[str, int]:
    """Token to id. Empty tokens (padding) have no id by name; any other may stand only once."""
    ids = {token: index for index, token in enumerate(tokens) if token}
    if len(ids) + tokens.count("") < len(tokens):
        twice = next(token for index, token in enumerate(tokens) if token and ids[token] != index)
        raise _unusable("tokenizer.ggml.tokens", f"has {reprlib.repr(twice)} twice")
    return ids


def _token_id(metadata: Mapping[str, Any], key: str, size: int) -> int | None:
    """The token id at a key, None if the key is absent."""
    value = metadata.get(key)
    if key not in metadata or (type(value) is int and 0 <= value < size):
        return value
    raise _unusable(key, f"is {reprlib.repr(value)}, not an id below {size}")
