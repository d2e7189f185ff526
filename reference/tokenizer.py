"""Byte-level BPE for files with `tokenizer.ggml.pre = glm4`, by hand: no regular expressions, no tokenizer library.

Text is cut into words, each word into bytes, and the bytes are merged in the order of the file's merge list. Letters
and numbers are those of Python's `unicodedata`, so characters newer than its Unicode version count as neither.
"""

import unicodedata
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import pairwise
from typing import Any

CONTROL, USER_DEFINED = 3, 4  # values of tokenizer.ggml.token_type, llama.cpp `llama_token_type`


class ReferenceTokenizer:
    """Built from the metadata of a GGUF file."""

    def __init__(self, metadata: Mapping[str, Any]):
        self.tokens: list[str] = metadata["tokenizer.ggml.tokens"]
        types: list[int] = metadata["tokenizer.ggml.token_type"]
        self.ids = {token: i for i, token in enumerate(self.tokens)}
        self.rank = {tuple(merge.split(" ")): rank for rank, merge in enumerate(metadata["tokenizer.ggml.merges"])}
        named = {t.encode(): i for i, t in enumerate(self.tokens) if types[i] in (CONTROL, USER_DEFINED)}
        self.words = {t: i for t, i in named.items() if types[i] == USER_DEFINED and not set(t) & set(b"<>[]")}
        self.special = {t: i for t, i in named.items() if t not in self.words}
        self.byte_to_char = byte_alphabet()
        self.char_to_byte = {char: byte for byte, char in enumerate(self.byte_to_char)}

    def encode(self, text: str | bytes) -> list[int]:
        """Ids of plain text: `<|user|>` in it is nine characters like any others.

        User-defined tokens without brackets are text, and found first. Bytes that are not UTF-8 become a token each,
        and end a word.
        """
        ids: list[int] = []
        for part in valid_utf8(text.encode() if isinstance(text, str) else text):
            if isinstance(part, int):
                ids.append(self.ids[self.byte_to_char[part]])
                continue
            for piece in cut(part.encode(), self.words):
                if isinstance(piece, int):
                    ids.append(piece)
                else:
                    for word in split(piece.decode()):
                        ids += self.merge(word.encode())
        return ids

    def encode_with_special(self, text: str | bytes) -> list[int]:
        """The same, but special tokens written out in the text become their ids: leftmost first, then longest."""
        pieces = cut(text.encode() if isinstance(text, str) else text, self.special)
        return [i for piece in pieces for i in ([piece] if isinstance(piece, int) else self.encode(piece))]

    def decode_bytes(self, ids: Sequence[int]) -> bytes:
        """The text of the ids. It may begin or end inside a character."""
        return b"".join(self.token_bytes(self.tokens[i]) for i in ids)

    def token_bytes(self, token: str) -> bytes:
        raw = token.encode()
        return raw if raw in self.special or raw in self.words else bytes(self.char_to_byte[char] for char in token)

    def merge(self, word: bytes) -> list[int]:
        """Join the neighbours that stand first in the merge list, the leftmost such pair, until no pair is listed."""
        pieces = [self.byte_to_char[byte] for byte in word]
        while len(pieces) > 1:
            ranks = [self.rank.get(pair, len(self.rank)) for pair in pairwise(pieces)]
            best = min(ranks)
            if best == len(self.rank):
                break
            at = ranks.index(best)
            pieces[at : at + 2] = [pieces[at] + pieces[at + 1]]
        return [self.ids[piece] for piece in pieces]


def cut(data: bytes, names: Mapping[bytes, int]) -> Iterator[bytes | int]:
    """The ids of names in the data, leftmost first, then longest, and what stands between them."""
    lengths = sorted({len(name) for name in names}, reverse=True)
    start = at = 0
    while at < len(data):
        length = next((n for n in lengths if data[at : at + n] in names), None)
        if length is None:
            at += 1
            continue
        yield from (data[start:at], names[data[at : at + length]])
        start = at = at + length
    yield data[start:]


def byte_alphabet() -> list[str]:
    """One printable character for each byte, as in GPT-2 `encoder.py` (`bytes_to_unicode`).

    Printable Latin-1 stands for itself; the rest, in order, are the characters from U+0100 on. A space is U+0120.
    """
    printable = {*range(ord("!"), ord("~") + 1), *range(0xA1, 0xAC + 1), *range(0xAE, 0xFF + 1)}
    others = (chr(0x100 + i) for i in range(256))
    return [chr(byte) if byte in printable else next(others) for byte in range(256)]


def valid_utf8(data: bytes) -> Iterator[str | int]:
    """The text in the bytes, and between pieces of text each byte that is not UTF-8."""
    while data:
        try:
            yield data.decode()
            return
        except UnicodeDecodeError as error:
            if error.start:
                yield data[: error.start].decode()
            yield from data[error.start : error.end]
            data = data[error.end :]


# The split pattern of glm4, each alternative of it one function below, in its order:
#   (?:'[sS]|'[tT]|'[rR][eE]|'[vV][eE]|'[mM]|'[lL][lL]|'[dD])    contraction
#   [^\r\n\p{L}\p{N}]?\p{L}+                                     letters
#   \p{N}{1,3}                                                   digits
#    ?[^\s\p{L}\p{N}]+[\r\n]*                                    symbols
#   \s*[\r\n]+                                                   lines
#   \s+(?!\S)                                                    spaces before a space or the end
#   \s+                                                          spaces
# A function gets the text and a place, and gives the end of the match, or the place itself where nothing matches.


def split(text: str) -> Iterator[str]:
    """Cut text into words; joined they are the text again."""
    start = 0
    while start < len(text):
        ends = (alternative(text, start) for alternative in ALTERNATIVES)
        end = next(end for end in ends if end > start)
        yield text[start:end]
        start = end


def contraction(text: str, at: int) -> int:
    for ending in ("'s", "'t", "'re", "'ve", "'m", "'ll", "'d"):
        if text[at : at + len(ending)].lower() == ending:
            return at + len(ending)
    return at


def letters(text: str, at: int) -> int:
    lead = text[at]
    first = at if lead in "\r\n" or is_letter(lead) or is_number(lead) else at + 1
    end = run(text, first, is_letter)
    return end if end > first else at


def digits(text: str, at: int) -> int:
    return min(run(text, at, is_number), at + 3)


def symbols(text: str, at: int) -> int:
    first = at + 1 if text[at] == " " else at
    end = run(text, first, is_symbol)
    return run(text, end, is_newline) if end > first else at


def lines(text: str, at: int) -> int:
    """White space up to the last newline in it."""
    end = run(text, at, is_space)
    while end > at and not is_newline(text[end - 1]):
        end -= 1
    return end


def spaces_before_space(text: str, at: int) -> int:
    """All of the white space at the end of the text; elsewhere all but the last, which goes with the next word."""
    end = run(text, at, is_space)
    return end if end == len(text) else max(at, end - 1)


def spaces(text: str, at: int) -> int:
    return run(text, at, is_space)


ALTERNATIVES = (contraction, letters, digits, symbols, lines, spaces_before_space, spaces)


def run(text: str, at: int, belongs: Callable[[str], bool]) -> int:
    """The end of the run of characters from `at` on that belong."""
    while at < len(text) and belongs(text[at]):
        at += 1
    return at


def is_letter(char: str) -> bool:
    return unicodedata.category(char)[0] == "L"


def is_number(char: str) -> bool:
    return unicodedata.category(char)[0] == "N"


def is_space(char: str) -> bool:
    """Unicode's White_Space; Python's `isspace` also takes U+001C to U+001F."""
    return char.isspace() and not "\x1c" <= char <= "\x1f"


def is_newline(char: str) -> bool:
    return char in "\r\n"


def is_symbol(char: str) -> bool:
    return not (is_space(char) or is_letter(char) or is_number(char))
