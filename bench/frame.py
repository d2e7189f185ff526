"""What stands around the measurements of every benchmark: its conditions, Ctrl-C, tables and the JSON file."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rich.status import Status
from rich.table import Table

from bench import script
from bench.conditions import conditions, copy_bandwidth, describe, describe_parity, parity
from bench.subject import Subject


class Frame:
    """One run. What was measured is shown and written, whatever ends it.

    parity: of the kernels, checked before anything is timed; without a subject the script may set it.
    notes: one line each, for a person.
    """

    def __init__(self, name: str, path: Path, subject: Subject | None = None):
        """`path`: of the JSON file, from `script.results_file`."""
        self.name, self.path, self.subject = name, path, subject
        self.conditions = conditions(copy=False)
        self.parity = parity(subject.model) if subject else None
        self.notes: list[str] = []
        self.interrupted = False
        self.error: Exception | None = None

    @contextmanager
    def measuring(self) -> Iterator[Status]:
        """Around all measurements; then a copy is timed, which uses `gpu_time` and so must come last."""
        try:
            with script.NOTES.status("measuring") as status:
                yield status
        except KeyboardInterrupt:
            self.interrupted = True
        except Exception as error:  # told by `finish`
            self.error = error
        try:
            self.conditions["copy"] = copy_bandwidth()
        except KeyboardInterrupt:
            self.interrupted = True
        except Exception as error:
            self.notes.append(f"how fast memory is copied is not known: {error}")

    @property
    def copy_gb_s(self) -> float | None:
        return self.conditions["copy"]["gb_s"] if self.conditions["copy"] else None

    def of_copy(self, gb_s: float) -> float | None:
        """A speed as a share of a copy's; None where that is not known."""
        return gb_s / self.copy_gb_s if self.copy_gb_s else None

    def finish(self, lines: Sequence[str], tables: Sequence[Table], report: dict[str, Any]) -> int:
        """Show, write `report` with what is known here, and return the exit code. Raises what ended `measuring`."""
        if self.interrupted:
            self.notes.append("interrupted: this is what was measured until then")
        if self.error:
            self.notes.append("ended by an error: this is what was measured until then")
        known: dict[str, Any] = {"script": self.name, "conditions": self.conditions}
        before = describe(self.conditions)
        if self.parity is not None:
            known["parity"] = self.parity
            before.append(describe_parity(self.parity))
        if self.subject is not None:
            known["model"] = self.subject.as_dict()
            before.insert(0, self.subject.describe())
        script.show([*before, *lines], tables, self.notes)
        script.write_json(
            self.path, {**known, "interrupted": self.interrupted or bool(self.error), "notes": self.notes, **report}
        )
        if self.error:
            raise self.error
        return 130 if self.interrupted else 0
