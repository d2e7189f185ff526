"""The cache of multi-head latent attention: one row [latent | k_pe] for each token and layer, nothing expanded."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, TypeAlias

import mlx.core as mx

from glm_mlx.config import Config
from glm_mlx.errors import InputError
from kernels.rows import GROUP, RowFormat

STEP = 256  # rows: the arrays' sizes are multiples of it
LARGE = 4 << 20  # bytes: MLX is not to keep the buffer of an old array of this size when the next layer grows
KvBits: TypeAlias = Literal[8, 16]  # 16: the type of the activations, which on a CPU has 32


def whole_steps(rows: int) -> int:
    """`rows` rounded up to what is allocated."""
    return -(-rows // STEP) * STEP


def row_format(cfg: Config, dtype: mx.Dtype, kv_bits: KvBits = 16) -> RowFormat:
    """Of a model with activations of `dtype`. Raises InputError where 8 bits cannot hold its latents."""
    if kv_bits == 8 and cfg.kv_lora_rank % GROUP:
        raise InputError(
            f"8 bits hold latents of a multiple of {GROUP} values, this model's have {cfg.kv_lora_rank}; "
            "leave --kv-bits out"
        )
    return RowFormat(cfg.kv_lora_rank, cfg.qk_rope_head_dim, mx.uint8 if kv_bits == 8 else dtype)


class LatentCache:
    """`rows[i]` is layer i's array (B, allocated, width of the format); the first `offset` rows are valid.

    54,144 bytes a token for GLM-4.7-Flash in 16 bits, 31,584 in 8. The arrays grow by an eighth at least: over a long
    answer eight rows are copied for each new one, where a token reads them all anyway. They never hold more than
    `limit` rows, and while they grow one layer stands in memory twice; of small arrays MLX keeps the old buffers.
    """

    def __init__(self, num_layers: int, row_format: RowFormat, limit: int | None = None):
        self.rows: list[mx.array | None] = [None] * num_layers
        self.format, self.limit = row_format, limit
        self.offset = 0
        self._expected = 0

    @property
    def position(self) -> int | mx.array:
        """Of the next token: the same for all sequences, or (B,) int32."""
        return self.offset

    def context(self, length: int) -> mx.array | None:
        """How many of the rows that `update` returned, with `length` new ones, are each sequence's: (B,) int32, or None
        for all."""
        return None

    def expect(self, rows: int) -> None:
        """So many rows are going to be needed: the arrays grow to them at once, when they next grow."""
        self._expected = rows

    def update(self, layer: int, new: mx.array) -> mx.array:
        """Store `new` (B, L, R + P) behind the valid rows of a layer; all as they are stored: (B, offset + L, width).

        `offset` moves only with `advance`, when every layer has its rows. Raises InputError past `limit`.
        """
        end = self.offset + new.shape[1]
        rows = self._with_room(layer, new.shape[0], end)
        rows[:, self.offset : end] = self.format.store(new)  # in place: nobody else holds the array
        return rows[:, :end]

    def advance(self, length: int) -> None:
        self.offset += length

    def take(self, rows: Sequence[mx.array], length: int) -> None:
        """The arrays that a traced step returned, with `length` new rows."""
        self.rows = list(rows)
        self.advance(length)

    def reserve(self, length: int) -> list[mx.array]:
        """The whole arrays, grown so that `length` more rows fit; of one sequence where nothing is there yet.

        Raises InputError past `limit`: before the launch of a kernel that would write there.
        """
        batch = 1 if self.rows[0] is None else self.rows[0].shape[0]
        return [self._with_room(layer, batch, self.offset + length) for layer in range(len(self.rows))]

    def _with_room(self, layer: int, batch: int, end: int) -> mx.array:
        """The array of a layer, grown where it has fewer than `end` rows."""
        if self.limit is not None and end > self.limit:
            raise InputError(f"the context of {self.limit:,} tokens is full; start anew or make it larger")
        old = self.rows[layer]
        allocated = 0 if old is None else old.shape[1]
        if old is not None and end <= allocated:
            return old
        rows = self.format.zeros(batch, self._size(end, allocated) - allocated)
        if old is not None:
            # MLX does not know of what a kernel wrote in place, and copies only what is there.
            mx.synchronize()
            rows = mx.concatenate([old, rows], axis=1)
            mx.eval(rows)  # now, so that the old array is gone before the next layer grows
        self.rows[layer] = rows
        if old is not None and old.nbytes >= LARGE:
            # MLX would keep the old buffer, which is too small for any layer to come. Not of small arrays: all buffers
            # that it keeps are freed, also those that a prompt would use again.
            del old
            mx.clear_cache()
        return rows

    def _size(self, end: int, allocated: int) -> int:
        """Rows of an array that must have `end` of them and has `allocated`."""
        if end <= allocated:
            return allocated
        size = max(end, self._expected, allocated + allocated // 8)
        return whole_steps(size if self.limit is None else min(size, self.limit))

    def growth(self, end: int, batch: int = 1) -> int:
        """Bytes by which the arrays will have grown when each has `end` rows."""
        allocated = [0 if rows is None else rows.shape[1] for rows in self.rows]
        return batch * self.format.nbytes * sum(self._size(end, own) - own for own in allocated)

    def trim(self, offset: int) -> None:
        """Forget every row from `offset` on."""
        self.offset = min(self.offset, offset)

    @property
    def nbytes(self) -> int:
        return sum(rows.nbytes for rows in self.rows if rows is not None)


class BatchCache(LatentCache):
    """`LatentCache` of sequences of different lengths: the first `offsets[b]` rows of sequence b are valid.

    All grow by the same number of rows, of which `keep` then says how many are a sequence's own. The others were
    padding on the right, which nobody sees, and over which the next rows are written. Until lengths differ the cache is
    read and written as one; then new rows go to where each sequence ends. `offset` is the largest of `offsets`; `limit`
    counts padding too.
    """

    def __init__(self, num_layers: int, row_format: RowFormat, sequences: int, limit: int | None = None):
        super().__init__(num_layers, row_format, limit)
        self.offsets = [0] * sequences

    @property
    def position(self) -> int | mx.array:
        return self.offset if min(self.offsets) == self.offset else mx.array(self.offsets, mx.int32)

    def context(self, length: int) -> mx.array | None:
        position = self.position
        return None if isinstance(position, int) else position + length

    def update(self, layer: int, new: mx.array) -> mx.array:
        position = self.position
        if isinstance(position, int):
            return super().update(layer, new)
        batch, length, _ = new.shape
        end = self.offset + length
        rows = self._with_room(layer, batch, end)
        rows[mx.arange(batch)[:, None], position[:, None] + mx.arange(length)] = self.format.store(new)
        return rows[:, :end]

    def advance(self, length: int) -> None:
        super().advance(length)
        self.offsets = [offset + length for offset in self.offsets]

    def keep(self, offsets: Sequence[int]) -> None:
        """Forget the rows of each sequence b from `offsets[b]` on."""
        self.offsets = [min(pair) for pair in zip(self.offsets, offsets, strict=True)]
        self.offset = max(self.offsets)

    def trim(self, offset: int) -> None:
        self.keep([offset] * len(self.offsets))


@dataclass
class TracedCache:
    """`LatentCache` within a traced step: whole arrays (B, allocated, width), with room for the step's new rows behind
    `position`, (1,) int32. `rows` holds the updated arrays at the end of the step."""

    rows: list[mx.array]
    position: mx.array
