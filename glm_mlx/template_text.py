"""A string that knows which of its characters a chat template wrote itself.

Control tokens may come from those characters alone. All others were typed by somebody, in a message or a tool, and a
name of a control token among them is text. The record errs on that side: an operation that is not here gives a plain
`str`, of which nothing counts as the template's.
"""

from collections.abc import Iterable, Iterator
from typing import Any, SupportsIndex


class TemplateText(str):
    """Computes what a plain `str` does. `_own` has a byte for each character, 1 where it is the template's.

    Jinja's sandbox keeps names with an underscore from templates. Made from any object, nothing is the template's.
    """

    _own: bytes

    def __new__(cls, text: object = "", own: bytes | None = None) -> "TemplateText":
        made = super().__new__(cls, text)
        made._own = bytes(len(made)) if own is None else own
        return made

    def __str__(self) -> "TemplateText":  # Jinja makes a `str` of all that it prints, joins or replaces in
        return self

    def __add__(self, other: str) -> str:
        if hasattr(other, "__html__"):  # Jinja's Markup escapes what it is added to
            return plain(self) + other
        return joined((self, other)) if isinstance(other, str) else NotImplemented

    def __radd__(self, other: str) -> str:
        return joined((other, self)) if isinstance(other, str) else NotImplemented

    def __mul__(self, count: SupportsIndex) -> str:
        return TemplateText(super().__mul__(count), self._own * count)

    __rmul__ = __mul__

    def __getitem__(self, key: SupportsIndex | slice) -> str:
        own = self._own[key]
        return TemplateText(super().__getitem__(key), bytes([own]) if isinstance(own, int) else own)

    def strip(self, chars: str | None = None, /) -> str:
        return self[len(self) - len(super().lstrip(chars)) :].rstrip(chars)

    def lstrip(self, chars: str | None = None, /) -> str:
        return self[len(self) - len(super().lstrip(chars)) :]

    def rstrip(self, chars: str | None = None, /) -> str:
        return self[: len(super().rstrip(chars))]

    def removeprefix(self, prefix: str, /) -> str:
        return self[len(self) - len(super().removeprefix(prefix)) :]

    def removesuffix(self, suffix: str, /) -> str:
        return self[: len(super().removesuffix(suffix))]

    def split(self, sep: str | None = None, maxsplit: SupportsIndex = -1) -> list[Any]:
        return self._cut(super().split(sep, maxsplit), sep)

    def rsplit(self, sep: str | None = None, maxsplit: SupportsIndex = -1) -> list[Any]:
        return self._cut(super().rsplit(sep, maxsplit), sep)

    def splitlines(self, keepends: bool = False) -> list[Any]:
        return self._cut(super().splitlines(keepends))

    def partition(self, sep: str, /) -> tuple[str, str, str]:
        head, middle, _ = super().partition(sep)
        end = len(head) + len(middle)
        return self[: len(head)], self[len(head) : end], self[end:]

    def rpartition(self, sep: str, /) -> tuple[str, str, str]:
        head, middle, _ = super().rpartition(sep)
        end = len(head) + len(middle)
        return self[: len(head)], self[len(head) : end], self[end:]

    def replace(self, old: str, new: str, count: SupportsIndex = -1, /) -> str:
        if not old:  # between all characters; no template has use for it
            return super().replace(old, new, count)
        return joined(self.split(old, count), new)

    def join(self, parts: Iterable[str], /) -> str:
        return joined(parts, self)

    def lower(self) -> str:
        return self._changed(super().lower())

    def upper(self) -> str:
        return self._changed(super().upper())

    def capitalize(self) -> str:
        return self._changed(super().capitalize())

    def title(self) -> str:
        return self._changed(super().title())

    def _changed(self, text: str) -> str:
        """Character by character: a change of case makes more characters of one, never fewer."""
        return TemplateText(text, self._own) if len(text) == len(self) else text

    def _cut(self, parts: list[str], sep: str | None = None) -> list[Any]:
        """The same parts, which stand in the text in this order. Without `sep`, blanks or ends of lines lie between."""
        end, found = -len(sep or ""), []
        for part in parts:
            start = self.find(part, end) if sep is None else end + len(sep)
            end = start + len(part)
            found.append(self[start:end])
        return found


def own(text: str) -> str:
    """The text as written by the template."""
    return TemplateText(text, b"\1" * len(text))


def plain(text: str) -> str:
    """The text without a record."""
    return "".join((text,)) if type(text) is TemplateText else text


def joined(parts: Iterable[Any], separator: str = "") -> str:
    """`separator.join(parts)` with the record of each. Parts that are no strings become such."""
    parts = [part if isinstance(part, str) else str(part) for part in parts]
    records = [_record(part) for part in parts]
    return TemplateText(str.join(separator, parts), _record(separator).join(records))


def runs(text: str) -> Iterator[tuple[bool, str]]:
    """The text cut where its writer changes: (True if the template wrote it, plain text)."""
    record, bare, start = _record(text), plain(text), 0
    while start < len(bare):
        kind = record[start]
        end = record.find(1 - kind, start)
        end = len(bare) if end < 0 else end
        yield bool(kind), bare[start:end]
        start = end


def _record(text: str) -> bytes:
    return text._own if isinstance(text, TemplateText) else bytes(len(text))
