"""What `generate` does once its arguments are read: load, encode, generate, print."""

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, TextIO

import mlx.core as mx
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn
from rich.table import Table

from glm_mlx.chat import GLM_TEMPLATE, ChatTemplate, Part, ReasoningSplitter, encode_chat
from glm_mlx.engine import Engine, Step
from glm_mlx.errors import InputError
from glm_mlx.hub import resolve
from glm_mlx.load import Loaded, load_model
from glm_mlx.make_tiny import TinySpec, make_tiny
from glm_mlx.model import decode_bytes
from glm_mlx.sampling import SamplingParams

STDERR = Console(stderr=True, highlight=False)


@dataclass
class Answer:
    """What one generation gave."""

    reasoning: str = ""
    answer: str = ""
    steps: list[Step] = field(default_factory=list)
    bytes_read: list[int] = field(default_factory=list)  # by each step, weights and cache
    finish: str = "length"  # or "stop", "interrupted"


def run(args: argparse.Namespace) -> int:
    """Raises InputError and KeyboardInterrupt for `generate.main` to answer."""
    prompt = None if args.chat else _prompt(args)
    params_without_file = _sampling(args, None)  # a bad option must not wait for a model to load
    loaded = _load(args)
    engine = Engine(loaded.model)
    params = _sampling(args, loaded)
    if args.verbose:
        _describe(loaded, params)
    talk = Conversation(loaded, engine, args)
    del params_without_file
    if args.chat:
        return _chat(talk, args, params)
    assert prompt is not None
    ids = talk.encode_raw(prompt) if args.raw else talk.encode([*talk.opening, {"role": "user", "content": prompt}])
    answer = talk.generate(ids, params)
    if args.json:
        print(json.dumps(_report(loaded, engine, ids, answer, params), ensure_ascii=False))
    else:
        _figures(engine)
    if args.benchmark is not None:
        _benchmark_table(answer)
    if answer.finish == "interrupted":
        raise KeyboardInterrupt
    return 0
