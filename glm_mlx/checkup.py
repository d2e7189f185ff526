"""What `doctor` does once its arguments are read: check every variant, print a table and a paragraph, write JSON."""

import argparse
import json
import os
import platform
import sys
import tempfile
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from datetime import datetime, timezone
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from threading import Event
from typing import Any

import mlx.core as mx
from gguf.constants import GGMLQuantizationType
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from glm_mlx import COMMAND_BUFFERS
from glm_mlx.cache import KvBits
from glm_mlx.compositions import COMPOSITIONS, NARROW, WIDTHS
from glm_mlx.config import Config
from glm_mlx.console import Console
from glm_mlx.engine import prefill_chunk
from glm_mlx.errors import InputError
from glm_mlx.isolation import Isolated, LostError, Rows, Variant
from glm_mlx.load import Opened, open_model
from glm_mlx.make_tiny import GLM_FLASH, make_tiny, metadata, tensor_shapes, type_of
from glm_mlx.memory import MemoryPlan, Tensor, plan_memory
from glm_mlx.model import activation_dtype
from glm_mlx.self_test import remembered_failures
from kernels import launcher
from kernels.cache_folder import private_folder
from kernels.check import Result, machine
from kernels.shown import shown

NO_GPU = "There is no GPU here. Kernels need one: Metal or CUDA. These are their twins, in MLX's own operations."
LAYERS, VOCABULARY = 47, 154_880  # of GLM-4.7-Flash; its widths are those of GLM_FLASH
WORKERS = 8  # processes that compile and check at a time
TRIED_TOKENS = 256  # spread over the vocabulary, that a file of --model is tried with
NAMED = 8  # variants that do not work, in the paragraph; --json has them all


def run(args: argparse.Namespace) -> int:
    if args.json is not None:
        _check_writable(args.json)
    opened = None if args.model is None else open_model(args.model, None, args.context, args.kv_bits)
    memory = opened.memory if opened else glm_flash_memory(args.context, args.kv_bits)
    on_gpu = any(launcher.back_end(op) is not None for op in launcher.OPS)
    found = _check_all(on_gpu, timed=not args.compile_only)
    conditions = {**machine(), "glm-mlx": _own_version(), "python": platform.python_version()}
    remembered = remembered_failures() if on_gpu else {}
    report = _paragraph(conditions, found, remembered)
    console = Console(highlight=False, emoji=False, width=None if sys.stdout.isatty() else 120)
    console.print(_table(conditions, found))
    console.print(_cache_line() if on_gpu else NO_GPU, soft_wrap=True, markup=False)
    console.print()
    console.print(memory.table("GLM-4.7-Flash in Q4_0, memory" if args.model is None else "memory"))
    for note in opened.notes if opened else []:
        console.print(f"note: {note}", soft_wrap=True, markup=False)
    print_environment(console)
    console.print(f"\nFor a bug report:\n\n{report}", soft_wrap=True, markup=False)
    tried = None
    if opened is not None and not args.compile_only:
        tried = _try_file(opened, any(result.error for result in found.values()))
        console.print(f"\nThe file: {tried.says}", soft_wrap=True, markup=False)
    if args.json is not None:
        whole = {
            "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
            "machine": conditions,
            "command buffers": [asdict(setting) for setting in COMMAND_BUFFERS],
            "report": report,
            "remembered": remembered,
            "memory": asdict(memory),
            "file": None if tried is None else asdict(tried),
            "variants": [{**asdict(variant), **asdict(result)} for variant, result in found.items()],
        }
        args.json.write_text(json.dumps(whole, indent=1, allow_nan=False) + "\n")
    if args.compile_only:
        return 0 if found and all(result.compiles for result in found.values()) else 1
    return 1 if any(result.error for result in found.values()) or (tried and tried.damaged) else 0


@dataclass(frozen=True)
class Tried:
    """Outcome of running a file's model once: a line for the user, and True if the file is damaged."""

    says: str
    damaged: bool


def _try_file(opened: Opened, kernels_fail: bool) -> Tried:
    """Load the file and compute a prompt that many of the experts see: what comes of it must be numbers.

    Not where kernels fail, which might hang, or where the memory does not do: neither is the file's fault.
    """
    if kernels_fail:
        return Tried("not tried, as kernels do not work", False)
    size = opened.tokenizer.vocab_size
    prompt = mx.arange(0, size, -(-size // min(TRIED_TOKENS, opened.memory.context)), mx.int32)[None]
    try:
        with opened.memory.limits():
            model = opened.load().model
            hidden = model.hidden_states(prompt, model.new_cache())
            finite = mx.isfinite(hidden).all() & mx.isfinite(model.logits(hidden[:, -1:])).all()
            if not finite.item():
                return Tried("its logits are not numbers (NaN or infinite); it may be damaged: fetch it again", True)
    except InputError as error:
        return Tried(f"not tried; {error}", False)
    return Tried(f"the logits behind {prompt.size} tokens are numbers", False)


def print_environment(console: Console) -> None:
    """Print the variables that bound MLX's command buffers, where any is set."""
    if COMMAND_BUFFERS:
        console.print(f"\nMLX's command buffers: {', '.join(map(str, COMMAND_BUFFERS))}", soft_wrap=True, markup=False)


def glm_flash_memory(context: int | None, kv_bits: KvBits = 16) -> MemoryPlan:
    """What GLM-4.7-Flash in Q4_0, the head in Q6_K, takes on this machine. No file is needed for that."""
    spec = replace(GLM_FLASH, layers=LAYERS, **COMPOSITIONS[0].changes)
    keys: dict[str, Any] = {f"deepseek2.{key}": value for key, value in metadata(spec).items()}
    keys |= {"general.architecture": "deepseek2", "tokenizer.ggml.tokens": [""] * VOCABULARY}
    shapes = list(tensor_shapes(spec, VOCABULARY))
    tensors = [Tensor(name, GGMLQuantizationType[type_of(spec, name, shape)], shape) for name, shape in shapes]
    cfg = Config.from_metadata(keys, [tensor.name for tensor in tensors])
    dtype = activation_dtype()
    return plan_memory(cfg, tensors, dtype, prefill_chunk(dtype), context, kv_bits)


def _cache_line() -> str:
    """Name the folder in which `generate` keeps what it compiled and checked, or say why there is none."""
    try:
        return f"kept between starts in {shown(private_folder())}"
    except OSError as error:
        return f"nothing is kept between starts, which makes them slower: {shown(error)}"


def _check_writable(path: Path) -> None:
    """Before the work and not after it."""
    if path.is_dir() or not os.access(path if path.exists() else path.parent, os.W_OK):
        raise InputError(f"cannot write {shown(path)}; name another file with --json")


def _check_all(on_gpu: bool, timed: bool) -> dict[Variant, Result]:
    """Every variant once, by small models of every composition; on a CPU narrow ones, in float32 as the product."""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    console = Console(stderr=True)
    workers = [Isolated() for _ in range(min(WORKERS, os.cpu_count() or 1))] if on_gpu else [Rows()]
    found: dict[Variant, Result] = {}
    try:
        with (
            tempfile.TemporaryDirectory() as folder,
            Progress(*columns, console=console, transient=True, disable=not sys.stderr.isatty()) as bar,
        ):
            for composition in bar.track(COMPOSITIONS, description=""):
                bar.update(bar.task_ids[0], description=composition.name)
                spec = replace(WIDTHS if on_gpu else NARROW, **composition.changes)
                file = make_tiny(Path(folder) / f"{composition.name}.gguf", spec)
                for dtype in composition.dtypes if on_gpu else (mx.float32,):
                    try:
                        variants = workers[0].open(file, dtype)
                    except LostError as lost:
                        found[Variant("-", f"a model of {composition.name}", str(dtype))] = Result(
                            False, None, str(lost)
                        )
                        continue
                    new = {index: variant for index, variant in enumerate(variants) if variant not in found}
                    results = _check_together(workers, file, dtype, list(new)) if len(workers) > 1 else {}
                    for index, variant in new.items():
                        # Alone: what is timed, and what failed, for which a kernel beside it may be to blame.
                        if index not in results or timed or results[index].error is not None:
                            results[index] = workers[0].check(index, timed)
                        found[variant] = results[index]
                file.unlink()
    finally:
        for worker in workers:
            worker.close()
    return dict(sorted(found.items(), key=lambda item: ("-", *launcher.OPS, *launcher.PROMPT_OPS).index(item[0].op)))


def _check_together(
    workers: Sequence[Isolated | Rows], file: Path, dtype: mx.Dtype, indices: Sequence[int]
) -> dict[int, Result]:
    """Each worker takes a share: compiling, which is most of the work, is done by one core for each kernel."""
    stopped = Event()

    def share(number: int) -> dict[int, Result]:
        own, worker, results = indices[number :: len(workers)], workers[number], dict[int, Result]()
        if number > 0 and own:
            try:
                worker.open(file, dtype)
            except LostError as lost:
                return dict.fromkeys(own, Result(False, None, str(lost)))
        for index in own:
            if not stopped.is_set():
                results[index] = worker.check(index, False)
        return results

    with ThreadPoolExecutor(len(workers)) as pool:
        try:
            return {index: result for part in pool.map(share, range(len(workers))) for index, result in part.items()}
        except BaseException:  # Ctrl-C: without waiting for what is being checked
            stopped.set()
            for worker in workers:
                worker.close()
            raise


def _table(conditions: Mapping[str, str], found: Mapping[Variant, Result]) -> Table:
    table = Table(
        *("op", "variant", "activations", "compiles", "agrees", "µs", "GB/s"),
        title=f"{_where(conditions)}, MLX {conditions['mlx']}",
    )
    for column in table.columns[5:]:
        column.justify = "right"
    for variant, result in found.items():
        yes, no = "yes", "[bold red]NO[/]"
        compiles = "-" if result.compiles is None else yes if result.compiles else no
        agrees = yes if result.agrees else no if result.agrees is False else "-"
        table.add_row(
            variant.op,
            variant.what,
            variant.activations,
            compiles,
            "[bold red]does not run[/]" if result.compiles and result.agrees is None else agrees,
            "-" if result.microseconds is None else f"{result.microseconds:.1f}",
            "-" if result.gb_s is None else f"{result.gb_s:.1f}",
        )
    return table


def _where(conditions: Mapping[str, str]) -> str:
    return f"{conditions['device']} ({conditions['back end']}), {conditions['os']}"


def _paragraph(conditions: Mapping[str, str], found: Mapping[Variant, Result], remembered: Mapping[str, str]) -> str:
    """Everything that someone without this device must know, in one paragraph."""
    versions = ", ".join(f"{name} {conditions[name]}" for name in ("mlx", "glm-mlx", "python", "kernels"))
    parts = [f"glm-mlx doctor on {_where(conditions)}; {versions}."]
    wrong = [(variant, result.summary) for variant, result in found.items() if result.error]
    if all(result.compiles is None for result in found.values()):
        parts.append(f"No GPU: no kernel was tried; {len(found) - len(wrong)} of {len(found)} twins ran.")
    else:
        compiled, agree = (sum(bool(getattr(r, key)) for r in found.values()) for key in ("compiles", "agrees"))
        parts.append(f"Of {len(found)} variants {compiled} compile, {agree} run and agree with their twins.")
    parts += [f"{v.op}: {v.what}, {v.activations}: {shown(error)}." for v, error in wrong[:NAMED]]
    if len(wrong) > NAMED:
        more = {variant.op for variant, _ in wrong[NAMED:]}
        parts.append(f"{len(wrong) - NAMED} more of {', '.join(sorted(more))} do not work.")
    parts += [f"generate remembers {shown(what)}: {shown(error)}." for what, error in remembered.items()]
    return " ".join(parts)


def _own_version() -> str:
    try:
        return version("glm-mlx")
    except PackageNotFoundError:  # run from a folder without being installed
        return "unknown"
