"""The quick part of `glm_mlx.doctor`: before a model runs on a GPU, each of its kernels is checked once.

Checked is what will run: the calls of a decoded token, with the model's own weights, and some of a short chunk of
tokens. An op whose kernel does not compile, raises or disagrees with its twin is left to the twin from then on. The
outcome is remembered for this device, system, MLX and kernel text, in the user's cache folder; where that cannot be
written, the check is made at each start.

A kernel that never ends cannot be stopped from here (macOS ends it after some seconds, CUDA does not), and one that
takes the process down takes this start with it. What was being checked then counts as failed at the next start.
"""

import json
import os
import platform
import sys
import time
from contextlib import suppress
from hashlib import sha256
from pathlib import Path

import mlx.core as mx
import psutil

from glm_mlx.console import Console
from glm_mlx.errors import NO_MEMORY, InputError
from glm_mlx.model import Model
from glm_mlx.model_cases import chunk_cases, decode_cases, prompt_cases
from kernels import launcher
from kernels.cache_folder import NOWHERE, private_folder, read_own, write_whole
from kernels.cases import Case
from kernels.check import check, machine
from kernels.compiled import compile_ahead
from kernels.launcher import KernelRefusedError, Recorded
from kernels.shown import shown

PATIENCE = 2.5  # seconds, after which calls for several tokens are left to the next start
DIED = "the program ended while this was checked"
DOCTOR = "python -m glm_mlx.doctor"


def leave_broken_kernels(model: Model) -> list[str]:
    """From now on the ops whose kernels do not work use their twins. Returns a line about each, for the user.

    Raises InputError where a kernel has left the GPU unusable for this process; at the next start it is left out.
    """
    if all(launcher.back_end(op) is None for op in launcher.OPS):
        return []
    start, memory, failed = time.perf_counter(), _Memory(), dict[str, str]()
    status = Console(stderr=True).status("checking the kernels, once on this device")
    cases = [*decode_cases(model), *_smallest(chunk_cases(model)), *prompt_cases(model)]
    named = {_name(case): case for case in cases if case.has_kernel}
    new = [case for name, case in named.items() if name not in memory.outcomes]
    try:
        if new:
            if sys.stderr.isatty():
                status.start()
            compile_ahead(launch for case in new for launch in _launches(case))
        for name, case in named.items():
            if case.op in failed:
                continue
            if name in memory.outcomes:
                error = memory.outcomes[name]
            elif case.tokens > 1 and time.perf_counter() - start > PATIENCE:
                continue
            else:
                error = memory.check(name, case)
            if error:
                failed[case.op] = error
                launcher.avoid(case.op)
    finally:
        status.stop()
    return [
        f"note: the kernel {op} does not work here ({shown(error)}); MLX's own operations take its place, which is "
        f"slower; to report it: {DOCTOR}"
        for op, error in failed.items()
    ]


def remembered_failures() -> dict[str, str]:
    """What `leave_broken_kernels` has found not to work on this device: error by call."""
    return {name: error for name, error in _Memory().outcomes.items() if error}


def _name(case: Case) -> str:
    call = f"{case.op}: {case.variant}, {case.shapes}, {case.dtype}, {case.tokens} tokens"
    return f"{call} ({_digest(case.signature)[:6]})"


def _launches(case: Case) -> list[Recorded]:
    try:
        return case.launches()
    except KernelRefusedError:  # which the check will say
        return []


def _smallest(cases: list[Case]) -> list[Case]:
    """One of each variant, and of each kernel that has it."""
    smallest: dict[tuple[str, ...], Case] = {}
    for case in sorted(cases, key=lambda case: case.nbytes):
        kernels = [launch.op for launch, _ in _launches(case)]
        smallest.setdefault((case.variant, case.dtype, *kernels), case)
    return list(smallest.values())


class _Memory:
    """outcomes: of each call that was checked on this machine its error, or None where it had none."""

    def __init__(self) -> None:
        self.machine = machine()
        key, host = _digest(self.machine)[:16], _digest(platform.node())[:6]
        try:
            folder = private_folder()
        except OSError:
            folder = NOWHERE  # nothing is remembered
        self.file = folder / f"kernels-{key}.json"
        # Stands while a check runs, and stays where that takes the process down.
        self.mark = folder / f"kernels-{key}-{host}-{os.getpid()}.running"
        self.outcomes = _read(self.file)
        with suppress(OSError, ValueError):
            for left in folder.glob(f"kernels-{key}-{host}-*.running"):
                if not psutil.pid_exists(int(left.stem.rpartition("-")[2])):
                    self.outcomes[read_own(left).decode()] = DIED
                    self._save()
                    left.unlink()

    def check(self, name: str, case: Case) -> str | None:
        """The error, remembered. Raises InputError where the GPU is unusable after it.

        Without the memory for a check, which takes more than the kernel does, there is no error.
        """
        with suppress(OSError):
            write_whole(self.mark, name.encode())
        try:
            error = check(case, timed=False).summary
        finally:
            with suppress(OSError):
                self.mark.unlink()
        mx.clear_cache()  # of what the twin expanded
        if error is not None and NO_MEMORY.search(error):
            return None
        self.outcomes[name] = error
        self._save()
        if error is not None:
            try:
                mx.eval(mx.ones(8) + 1)
            except Exception:  # whatever MLX raises for a context that is lost
                raise InputError(
                    f"the kernel {case.op} has stopped the GPU for this process ({error}); start again, and it is "
                    f"left out; to report it: {DOCTOR}"
                ) from None
        return error

    def _save(self) -> None:
        text = json.dumps({"machine": self.machine, "outcomes": self.outcomes}, indent=1)
        with suppress(OSError):
            write_whole(self.file, f"{text}\n".encode())


def _read(file: Path) -> dict[str, str | None]:
    try:
        outcomes = json.loads(read_own(file))["outcomes"]
        return {str(name): None if error is None else str(error) for name, error in outcomes.items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError):  # none yet, or not what was written here
        return {}


def _digest(value: object) -> str:
    return sha256(repr(value).encode()).hexdigest()
