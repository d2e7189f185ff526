"""Calls of the ops of this folder as a model makes them, each to be tried on its own: what `kernels.check` checks."""

import inspect
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields, is_dataclass, replace
from functools import wraps
from itertools import groupby
from types import ModuleType
from typing import Any, TypeVar

import mlx.core as mx

from kernels import launcher
from kernels.planes import Bundle, QuantizedTensor
from kernels.route import experts_of, weights_of

Kind = TypeVar("Kind")
FLOATS = {mx.float32: "F32", mx.float16: "F16", mx.bfloat16: "BF16"}


@dataclass(frozen=True)
class Case:
    """A call of a public function of `kernels.<op>`, for so many tokens.

    arguments: by the function's names for them; those named in `activations` are random, the others the model's own.
    """

    function: Callable[..., Any]
    arguments: Mapping[str, Any]
    activations: tuple[str, ...]
    tokens: int

    @property
    def op(self) -> str:
        return self.function.__module__.rpartition(".")[2]

    def run(self) -> list[mx.array]:
        """Its results; the chosen experts and the bits of their weights as two."""
        outputs = _outputs(self.function(**self.arguments))
        return [part for y in outputs for part in ((experts_of(y), weights_of(y)) if y.dtype == mx.uint32 else (y,))]

    def expected(self) -> list[mx.array]:
        """What the twins give for the same values in float32."""
        exact = {name: self.arguments[name].astype(mx.float32) for name in self.activations}
        with launcher.avoiding():
            return replace(self, arguments={**self.arguments, **exact}).run()

    def launches(self) -> list[launcher.Recorded]:
        """What `run` launches on a GPU: nothing where its twin must do. Raises KernelRefusedError."""
        with launcher.recording() as seen:
            self.run()
        return seen

    @property
    def has_kernel(self) -> bool:
        """Whether the op has one for this call; one that is refused counts."""
        try:
            return bool(self.launches())
        except launcher.KernelRefusedError:
            return True

    @property
    def types(self) -> tuple[str, ...]:
        """Of the weights, as in GGUF."""
        return tuple(_type(weight) for weight in self._weights())

    @property
    def variant(self) -> str:
        """What the text of the kernel turns on but for shapes: "qmv_all Q4_0 + Q8_0, norm"."""
        types = [(kind, len(list(group))) for kind, group in groupby(self.types)]
        words = [" + ".join(kind if count == 1 else f"{count} x {kind}" for kind, count in types)]
        parameters = inspect.signature(self.function).parameters
        for name, value in self.arguments.items():
            if isinstance(value, str):
                words.append(value)
            elif value is not None and parameters[name].default is None:
                words.append(name)
            elif isinstance(value, mx.array) and value.dtype == mx.uint8:
                words.append(f"{name} in 8 bits")
        what = ", ".join(filter(None, words))
        return what if self.function.__name__ == self.op else f"{self.function.__name__} {what}"

    @property
    def shapes(self) -> str:
        """Of the weights; of the activations where there are none."""
        shapes = [w.shape for w in self._weights()] or [self.arguments[name].shape for name in self.activations]
        return ", ".join("x".join(map(str, shape)) for shape in shapes)

    @property
    def dtype(self) -> str:
        """Of the activations; of the result where there are none."""
        found = [self.arguments[name].dtype for name in self.activations]
        found += [value for value in self.arguments.values() if isinstance(value, mx.Dtype)]
        return str(found[0]).removeprefix("mlx.core.")

    @property
    def nbytes(self) -> int:
        """What the kernel must read and write: of a bank of experts those that are chosen."""
        arrays = [value for value in self.arguments.values() if isinstance(value, mx.array)]
        weights = self._weights()
        with launcher.avoiding():
            written = self.run()
        ids = [experts_of(a) for a in arrays if a.dtype == mx.uint32] + [a for a in written if a.dtype == mx.uint32]
        chosen = ids[0].size if ids else None
        total = sum(a.nbytes for a in (*arrays, *written) if all(a is not w for w in weights))
        for w in weights:
            total += w.nbytes if chosen is None or len(w.shape) < 3 else w.nbytes // w.shape[0] * chosen
        return total

    @property
    def signature(self) -> Hashable:
        """Equal for calls of the same function with arguments of the same types, shapes and values, and for launches of
        the same texts, which say where a weight stands in its bundle. The same in every process on a machine."""
        try:
            launches = [launch.name for launch, _ in self.launches()]
        except launcher.KernelRefusedError:
            launches = []
        return _signature((self.function.__qualname__, self.arguments, launches))

    def _weights(self) -> list[Any]:
        """The matrices among the arguments."""
        return [w for name, value in self.arguments.items() if name not in self.activations for w in _matrices(value)]


@contextmanager
def calls(module: ModuleType, model: object, tokens: int) -> Iterator[list[Case]]:
    """Within the block the calls of ops that the module makes come to the list, each once, and its twin answers.

    A call with the same `Case.signature` is the same. Arrays of floats that the model does not
    hold, its activations, become random: nothing of the model is computed.
    """
    own = {id(a) for a in held(model, mx.array)}
    seen: dict[Hashable, tuple[Case, Any]] = {}
    found: list[Case] = []

    def noting(function: Callable[..., Any]) -> Callable[..., Any]:
        @wraps(function)
        def call(*args: Any, **options: Any) -> Any:
            given = inspect.signature(function).bind(*args, **options).arguments
            activations = tuple(name for name, value in given.items() if _is_floats(value) and id(value) not in own)
            signature = Case(function, given, activations, tokens).signature
            if signature not in seen:
                random = {name: _random(given[name], len(found), i) for i, name in enumerate(activations)}
                case = Case(function, {**given, **random}, activations, tokens)
                with launcher.avoiding():
                    seen[signature] = case, function(**case.arguments)
                found.append(case)
            return seen[signature][1]

        return call

    ops = {f"kernels.{op}" for op in launcher.OPS}
    before = {
        name: value
        for name, value in vars(module).items()
        if inspect.isfunction(value) and value.__module__ in ops and not name.endswith("_ops")
    }
    try:
        for name, function in before.items():
            setattr(module, name, noting(function))
        yield found
    finally:
        for name, function in before.items():
            setattr(module, name, function)


def held(model: object, kind: type[Kind]) -> list[Kind]:
    """All of a kind in an object, at any depth, each once."""
    left, seen, found = [model], set[int](), list[Kind]()
    while left:
        item = left.pop()
        if id(item) in seen:
            continue
        seen.add(id(item))
        if isinstance(item, kind):
            found.append(item)
        if isinstance(item, Mapping):
            left += item.values()
        elif isinstance(item, list | tuple):
            left += item
        elif hasattr(item, "__dict__") and not isinstance(item, mx.array):
            left += vars(item).values()
    return found


def _is_floats(value: Any) -> bool:
    return isinstance(value, mx.array) and value.dtype in FLOATS


def _random(like: mx.array, *seed: int) -> mx.array:
    values: mx.array = mx.random.normal(like.shape, key=mx.random.key(seed[0] << 8 | seed[1]))
    return values.astype(like.dtype)


def _matrices(value: Any) -> list[Any]:
    if isinstance(value, QuantizedTensor) or (_is_floats(value) and value.ndim > 1):
        return [value]
    return [w for item in value for w in _matrices(item)] if isinstance(value, list | tuple) else []


def _type(weight: Any) -> str:
    return weight.type.name if isinstance(weight, QuantizedTensor) else FLOATS[weight.dtype]


def _outputs(value: mx.array | Sequence[mx.array | None]) -> list[mx.array]:
    return [value] if isinstance(value, mx.array) else [y for y in value if y is not None]


def _signature(value: Any) -> Hashable:
    """Equal for arguments of the same types, shapes and values."""
    if isinstance(value, mx.array):
        return tuple(value.shape), str(value.dtype)
    if isinstance(value, QuantizedTensor):
        return value.type.name, value.shape
    if isinstance(value, Bundle):
        return None
    if isinstance(value, Mapping):
        return tuple((name, _signature(item)) for name, item in value.items())
    if isinstance(value, list | tuple):
        return tuple(map(_signature, value))
    if is_dataclass(value):
        return tuple(_signature(getattr(value, field.name)) for field in fields(value))
    return str(value) if isinstance(value, mx.Dtype) else value
