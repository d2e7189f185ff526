"""The calls of ops that one decoded token makes of a model, in their order: of which layer, on which weights.

Every function of `kernels` that `glm_mlx.model` calls is replaced for as long as one watches; the model does not know.
"""

import inspect
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, fields, is_dataclass, replace
from functools import wraps
from typing import Any

import mlx.core as mx

from bench.launches import launches, primitives
from glm_mlx import model as model_module
from glm_mlx.cache import STEP, TracedCache
from glm_mlx.model import Cache, Model, decode_bytes
from kernels import launcher
from kernels.launcher import Launch
from kernels.planes import Bundle, QuantizedTensor, Weight

OF_CACHE = ("mla_decode", "attend")  # ops that read the rows of the cache


@dataclass(frozen=True)
class Place:
    """part: embedding, attention, feed-forward, head or sampling. layer: None outside of layers."""

    part: str
    layer: int | None = None


@dataclass(frozen=True)
class Call:
    """weights: the names of its matrices within a layer. nbytes: of all weights and cached rows that it reads."""

    place: Place
    op: str
    weights: tuple[str, ...]
    types: tuple[str, ...]
    nbytes: int
    launches: tuple[tuple[Launch, tuple[mx.array, ...]], ...] = ()  # where they were recorded

    @property
    def what(self) -> str:
        return " + ".join(self.weights) or "-"

    @property
    def quant(self) -> str:
        return " + ".join(dict.fromkeys(self.types)) or "-"


@dataclass
class Entry:
    """The time of one op, or of one kernel of MLX, in one place; of several calls there if they are alike.

    seconds: by token. calls, launches, nbytes: a token's.
    """

    place: Place
    op: str
    what: str = "-"
    quant: str = "-"
    calls: float = 1
    launches: float = 1
    nbytes: int = 0
    seconds: list[float] = field(default_factory=list)


class Entries(dict[tuple[Place, str, str, str], Entry]):
    """In the order in which a token meets them."""

    def of(self, place: Place, op: str, call: Call | None = None) -> Entry:
        """The entry of a call, or of what is none; a new one has no calls, launches, bytes and seconds yet."""
        what, quant = (call.what, call.quant) if call else ("-", "-")
        return self.setdefault((place, op, what, quant), Entry(place, op, what, quant, 0, 0, 0))


def walk(model: Model, token: mx.array, cache: Cache, at: Callable[[Place], None]) -> mx.array:
    """The logits (1, vocabulary) of one token (1, 1), as `hidden_states` and `logits` make them.

    `at` is told the place before each part. The cache's offset stays: the next walk writes the same rows.
    """
    at(Place("embedding"))
    x = model.embed(token)
    for i, layer in enumerate(model.layers):
        at(Place("attention", i))
        x = layer.self_attn(x, cache)
        at(Place("feed-forward", i))
        x = layer.mlp(x)
    at(Place("head"))
    return model.logits(x)[:, 0]


def record(model: Model, weights: Mapping[str, Weight], depth: int) -> list[Call]:
    """The calls of a token behind so many others, with what they launch on a GPU. On any machine; nothing is computed.

    `weights`: those that the model was made of, by their names. Raises KernelRefusedError.
    """
    cfg, found = model.cfg, list[Call]()
    # Arrays of their own, as launches count what they read by array.
    rows = [model.row_format.zeros(1, _allocated(depth)) for _ in range(cfg.num_layers)]
    cache = TracedCache(rows, mx.array([depth], mx.int32))
    with launcher.recording() as seen:

        def see(call: Call, args: Any, make: Callable[[], Any]) -> Any:
            before = len(seen)
            made = make()
            found.append(replace(call, launches=tuple(seen[before:])))
            return made

        with _watching(model, weights, depth, see) as at:
            walk(model, mx.zeros((1, 1), mx.int32), cache, at)
    return found


def time_calls(
    model: Model, weights: Mapping[str, Weight], cache: Cache, depth: int, entries: Entries, sample: Callable[..., Any]
) -> None:
    """Walk one token and evaluate every call on its own; its seconds go to `entries`. `sample`: the logits' token.

    What must be computed between calls, such as the update of the cache, is an entry "between ops" of its place.
    """
    is_first = not entries

    def timed(entry: Entry, arrays: Any) -> None:
        start = time.perf_counter()
        mx.eval(arrays)
        seconds[id(entry)] = seconds.get(id(entry), 0.0) + time.perf_counter() - start

    def see(call: Call, args: Any, make: Callable[[], Any]) -> Any:
        timed(entries.of(call.place, "between ops"), args)
        made = make()
        entry = entries.of(call.place, call.op, call)
        if is_first:
            entry.calls += 1
            entry.nbytes += call.nbytes
            entry.launches += launches(primitives(*[leaf for leaf in _leaves(made) if isinstance(leaf, mx.array)]))
        timed(entry, made)
        return made

    seconds: dict[int, float] = {}
    with _watching(model, weights, depth, see) as at:
        logits = walk(model, mx.zeros((1, 1), mx.int32), cache, at)
    timed(entries.of(Place("head"), "between ops"), logits)
    entry, token = entries.of(Place("sampling"), "sampler"), sample(logits)
    if is_first:
        entry.calls, entry.launches = 1, launches(primitives(token))
    timed(entry, token)
    for entry in entries.values():
        entry.seconds.append(seconds.get(id(entry), 0.0))


@contextmanager
def _watching(
    model: Model, weights: Mapping[str, Weight], depth: int, see: Callable[[Call, Any, Callable[[], Any]], Any]
) -> Iterator[Callable[[Place], None]]:
    """Within the block `see(call, arguments, make)` stands for every call of an op; it returns what `make()` does.

    Yields what must be told the place of the calls that follow.
    """
    names = {id(weight): name for name, weight in weights.items()}
    place = Place("embedding")

    def at(now: Place) -> None:
        nonlocal place
        place = now

    def describe(function: Callable[..., Any], given: Any) -> Call:
        op = function.__name__.removesuffix("_ops")
        used = {names[id(leaf)]: leaf for leaf in _leaves(given) if id(leaf) in names}
        matrices = {_within_layer(name): w for name, w in used.items() if len(w.shape) > 1}
        types = tuple(launcher.kind(w)[0] for w in matrices.values())
        return Call(place, op, tuple(matrices), types, _read_bytes(model, used, op, depth))

    def shown(function: Callable[..., Any]) -> Callable[..., Any]:
        @wraps(function)
        def call(*args: Any, **options: Any) -> Any:
            return see(describe(function, [args, options]), [args, options], lambda: function(*args, **options))

        return call

    modules = {f"kernels.{op}" for op in (*launcher.OPS, "small_experts")}
    ops = {
        name: value
        for name, value in vars(model_module).items()
        if inspect.isfunction(value) and value.__module__ in modules
    }
    try:
        for name, function in ops.items():
            setattr(model_module, name, shown(function))
        yield at
    finally:
        for name, function in ops.items():
            setattr(model_module, name, function)


def _leaves(value: Any) -> Iterator[Any]:
    """The arrays and quantised weights in a value, at any depth; not those that only stand in the same array."""
    if isinstance(value, mx.array | QuantizedTensor):
        yield value
    elif isinstance(value, Bundle):
        return
    elif isinstance(value, Mapping):
        yield from _leaves([*value.values()])
    elif isinstance(value, list | tuple):
        for item in value:
            yield from _leaves(item)
    elif is_dataclass(value):
        yield from _leaves([getattr(value, field.name) for field in fields(value)])


def _within_layer(name: str) -> str:
    """ "layers.3.mlp.experts.gate_proj" -> "experts.gate_proj" """
    return name.split(".", 3)[3] if name.startswith("layers.") else name


def _read_bytes(model: Model, used: Mapping[str, Weight], op: str, depth: int) -> int:
    cfg = model.cfg
    if op == "embed":
        return sum(w.nbytes for w in used.values()) // cfg.vocab_size
    rows = (depth + 1) * model.row_format.nbytes if op in OF_CACHE else 0
    return decode_bytes(cfg, used, model.row_format)[0] + rows


def _allocated(depth: int) -> int:
    """Rows of a cache that holds so many, and one more."""
    return (depth // STEP + 1) * STEP
