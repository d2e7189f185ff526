"""Text from outside (a file, the hub, an error of a library) as it may reach a terminal.

An escape sequence in it could set the terminal's title, hide lines or type for the user.
"""

import re

CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")  # but for tabs and the ends of lines


def shown(name: object, most: int = 4096) -> str:
    """A path, a name or an error as part of one line: unprintable characters escaped, cut off at `most`."""
    text = str(name)
    if len(text) > most:
        text = text[:most] + "..."
    return text if text.isprintable() else "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text)


def without_control(text: str) -> str:
    """Text of several lines, in which control characters are escaped and all others stay."""
    return CONTROL.sub(lambda found: ascii(found[0])[1:-1], text)
