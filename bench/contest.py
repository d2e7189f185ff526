"""What takes part in a comparison: the turns that a contestant takes, and this project as one of them."""

from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np

from bench import decode
from glm_mlx.model import Model, decode_bytes
from kernels.planes import Weight

OURS = "glm-mlx"
WARM_UP = decode.WARM_UP  # tokens


class UnavailableError(Exception):
    """A contestant can't take part: one line with why, and what to do."""


@dataclass
class Turn:
    """One prompt, read, and the tokens after it; times in seconds.

    number: of the round; 0 reads a prompt to warm up and counts in no figure. seconds: of each counted token, or one
    mean of `mean_of` tokens where a program tells no more.
    """

    number: int
    depth: int
    by: str
    fill: str
    time_to_first_token: float | None = None
    warm_up: list[float] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)
    mean_of: int = 1
    tokens: list[int] = field(default_factory=list)

    @property
    def prefill_tok_s(self) -> float | None:
        """None where no prompt was read, or one of a single token."""
        if self.time_to_first_token is None or self.depth < 2:
            return None
        return self.depth / self.time_to_first_token


class Contestant(Protocol):
    """details: for the JSON file. notes: one line each, for a person."""

    name: str
    details: dict[str, Any]
    notes: list[str]
    warms_up_itself: bool  # and then takes no turn in round 0

    def measure(self, turn: Turn, count: int) -> None:
        """Fill `turn` with warm-up and `count` tokens, as they come: what is there when Ctrl-C comes is good.

        With a `count` of 0 only the prompt is read. Whatever it raises ends this contestant at this depth.
        """


def prompt_tokens(depth: int, vocab_size: int) -> list[int]:
    """The prompt that everybody reads who takes one: the one of `bench/decode.py`."""
    prompt: list[int] = np.random.default_rng(0).integers(0, vocab_size, max(depth, 1)).tolist()
    return prompt


class Ours:
    """This project, through the engine that `generate` uses."""

    name = OURS
    warms_up_itself = False

    def __init__(self, model: Model, weights: dict[str, Weight]):
        self.model = model
        fixed, per_row = decode_bytes(model.cfg, weights, model.row_format)
        self.details: dict[str, Any] = {"bytes_a_token": {"weights": fixed, "each_row_of_the_cache": per_row}}
        self.notes: list[str] = []

    def measure(self, turn: Turn, count: int) -> None:
        run = decode.Run(turn.depth, self.name, turn.fill)
        try:
            decode.measure(self.model, run, WARM_UP + count + 2 if count else 1)
        finally:
            turn.time_to_first_token = run.time_to_first_token
            turn.warm_up, turn.seconds, turn.tokens = run.seconds[:WARM_UP], run.decode, run.tokens
