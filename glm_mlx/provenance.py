"""Text that knows which of its characters a chat template wrote itself.

`Traced` is a `str` with a record: one byte a character, 1 if the template wrote it, 0 if it came from outside. All
contents are computed by `str`'s own methods, so comparing, measuring and printing do what they do with a plain `str`.
An operation that is not written here gives a plain `str`, which has no record and counts as text from outside: losing
the record can cost a control token, but never make one.

A template can reach every public attribute of its strings: this class must have none that `str` does not have.
"""

import re
from collections.abc import Iterable, Iterator
from typing import Any, SupportsIndex

_RUN = re.compile(rb"\x01+|\x00+")
_DIRECTIVE = re.compile("%[%s]")


class Traced(str):
    """A text with a record of its characters; without `record`, all of them came from outside.

    ValueError if the record has another length than the text.
    """

    __slots__ = ("_record",)
    _record: bytes

    def __new__(cls, text: str = "", record: bytes | None = None) -> "Traced":
        self = super().__new__(cls, text)
        self._record = bytes(len(self)) if record is None else record
        if len(self._record) != len(self):
            raise ValueError(f"a record of {len(self._record)} for {len(self)} characters")
        return self

    def __str__(self) -> str:
        return self

    def __iter__(self) -> Iterator[str]:
        return (self[index] for index in range(len(self)))

    def __getitem__(self, key: SupportsIndex | slice) -> "Traced":
        text = super().__getitem__(key)
        return Traced(text, self._record[key] if isinstance(key, slice) else bytes((self._record[key],)))

    def __add__(self, other: Any) -> "Traced":
        # Markup and Undefined have their own way to be added to a str, and plain str its own error for others.
        if not isinstance(other, str) or hasattr(other, "__html__"):
            return NotImplemented
        return concat((self, other))

    def __radd__(self, other: Any) -> "Traced":
        return concat((other, self)) if isinstance(other, str) else NotImplemented

    def __mul__(self, times: Any) -> "Traced":
        if not hasattr(times, "__index__"):
            return NotImplemented
        return Traced(super().__mul__(times), self._record * times)

    __rmul__ = __mul__

    def __mod__(self, values: Any) -> str:
        """Keeps the record for `%s` and `%%`; another directive loses it."""
        text = super().__mod__(values)
        given = iter(values if isinstance(values, tuple) else (values,))
        pieces, at = list[str](), 0
        for found in _DIRECTIVE.finditer(self):
            value = self[found.start()] if found[0] == "%%" else str(next(given, ""))
            pieces += (self[at : found.start()], value)
            at = found.end()
        traced = concat((*pieces, self[at:]))
        return traced if traced == text else text

    def strip(self, chars: str | None = None, /) -> "Traced":
        return self.rstrip(chars).lstrip(chars)

    def lstrip(self, chars: str | None = None, /) -> "Traced":
        return self[len(self) - len(super().lstrip(chars)) :]

    def rstrip(self, chars: str | None = None, /) -> "Traced":
        return self[: len(super().rstrip(chars))]

    def removeprefix(self, prefix: str, /) -> "Traced":
        return self[len(self) - len(super().removeprefix(prefix)) :]

    def removesuffix(self, suffix: str, /) -> "Traced":
        return self[: len(super().removesuffix(suffix))]

    def split(self, sep: str | None = None, maxsplit: SupportsIndex = -1) -> list[str]:
        return self._found(super().split(sep, maxsplit), sep)

    def rsplit(self, sep: str | None = None, maxsplit: SupportsIndex = -1) -> list[str]:
        return self._found(super().rsplit(sep, maxsplit), sep)

    def splitlines(self, keepends: bool = False) -> list[str]:
        lines = self._cut(super().splitlines(True))
        return [line[: len(text)] for line, text in zip(lines, super().splitlines(keepends), strict=True)]

    def partition(self, sep: str, /) -> tuple[str, str, str]:
        head, middle, tail = self._cut(super().partition(sep))
        return head, middle, tail

    def rpartition(self, sep: str, /) -> tuple[str, str, str]:
        head, middle, tail = self._cut(super().rpartition(sep))
        return head, middle, tail

    def replace(self, old: str, new: str, count: SupportsIndex = -1, /) -> str:
        """Replace; what stands in for text from outside is from outside too, whoever wrote `new`."""
        text = super().replace(old, new, count)
        if not old:  # `new` goes between all characters, for which nothing stood
            return text
        records, at, left = list[bytes](), 0, count.__index__()
        while left and (found := self.find(old, at)) >= 0:
            replaced = self._record[found : found + len(old)]
            records += (self._record[at:found], bytes(len(new)) if 0 in replaced else _record(new))
            at, left = found + len(old), left - 1
        return Traced(text, b"".join(records) + self._record[at:])

    def join(self, pieces: Iterable[str], /) -> "Traced":
        pieces = list(pieces)
        return Traced(super().join(pieces), self._record.join(map(_record, pieces)))

    def lower(self) -> "Traced":
        return self._changed(super().lower())

    def upper(self) -> "Traced":
        return self._changed(super().upper())

    def casefold(self) -> "Traced":
        return self._changed(super().casefold())

    def capitalize(self) -> "Traced":
        return self._changed(super().capitalize())

    def title(self) -> "Traced":
        return self._changed(super().title())

    def swapcase(self) -> "Traced":
        return self._changed(super().swapcase())

    def _changed(self, text: str) -> "Traced":
        """The result of a change of case, in which characters may have moved: marked only if all of this text is."""
        return Traced(text, bytes(len(text)) if 0 in self._record else b"\1" * len(text))

    def _cut(self, texts: Iterable[str]) -> list["Traced"]:
        """Consecutive pieces of this text, with these contents."""
        pieces, at = list[Traced](), 0
        for text in texts:
            pieces.append(self[at : at + len(text)])
            at += len(text)
        return pieces

    def _found(self, texts: Iterable[str], sep: str | None) -> list[str]:
        """The pieces into which `sep` splits this text, None for white space."""
        pieces, at = list[str](), 0
        for text in texts:
            # A piece between white space begins with the first character that is none.
            start = self.index(text, at) if sep is None else at
            pieces.append(self[start : start + len(text)])
            at = start + len(text) + len(sep or "")
        return pieces


def own(text: str) -> Traced:
    """A text that the template wrote itself."""
    return Traced(text, b"\1" * len(text))


def concat(pieces: Iterable[str]) -> Traced:
    """The pieces in a row."""
    return Traced().join(pieces)


def runs(text: str) -> Iterator[tuple[bool, str]]:
    """The text cut where its record changes: (True, piece) if the template wrote the piece, else (False, piece)."""
    for run in _RUN.finditer(_record(text)):
        yield run[0][0] == 1, str.__getitem__(text, slice(*run.span()))


def _record(text: str) -> bytes:
    return text._record if isinstance(text, Traced) else bytes(len(text))
