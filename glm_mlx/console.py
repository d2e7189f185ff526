"""The consoles that all commands print to."""

from collections.abc import Iterator

from rich import console
from rich.segment import Segment

from kernels.shown import without_control


class Console(console.Console):
    """Rich's, which lets no control characters of what it is given through: on a terminal they are commands."""

    def render(
        self, renderable: console.RenderableType, options: console.ConsoleOptions | None = None
    ) -> Iterator[Segment]:
        for segment in super().render(renderable, options):
            # Its own, which move the cursor of a progress bar, are marked as such.
            yield segment if segment.control else segment._replace(text=without_control(segment.text))
