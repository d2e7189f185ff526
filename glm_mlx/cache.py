"""The cache of multi-head latent attention: one row [latent | k_pe] for each token and layer, nothing expanded."""

from collections.abc import Sequence
from dataclasses import dataclass

import mlx.core as mx

STEP = 256  # rows by which the arrays grow


class LatentCache:
    """`rows[i]` is layer i's array (B, allocated, kv_lora_rank + qk_rope_head_dim); the first `offset` rows are valid.

    54,144 bytes a token for GLM-4.7-Flash in 16 bits.
    """

    def __init__(self, num_layers: int, width: int, dtype: mx.Dtype):
        self.rows: list[mx.array | None] = [None] * num_layers
        self.width, self.dtype = width, dtype
        self.offset = 0

    def update(self, layer: int, new: mx.array) -> mx.array:
        """Store `new` (B, L, width) behind the valid rows of a layer and return them all: (B, offset + L, width).

        `offset` moves only with `advance`, when every layer has its rows.
        """
        end = self.offset + new.shape[1]
        rows = self.rows[layer]
        allocated = 0 if rows is None else rows.shape[1]
        if end > allocated:
            more = mx.zeros((new.shape[0], -(-(end - allocated) // STEP) * STEP, self.width), self.dtype)
            rows = more if rows is None else mx.concatenate([rows, more], axis=1)
        assert rows is not None
        rows[:, self.offset : end] = new.astype(self.dtype)
        self.rows[layer] = rows
        return rows[:, :end]

    def advance(self, length: int) -> None:
        self.offset += length

    def take(self, rows: Sequence[mx.array], length: int) -> None:
        """The arrays that a traced step returned, with `length` new rows."""
        self.rows = list(rows)
        self.advance(length)

    def reserve(self, length: int) -> list[mx.array]:
        """The whole arrays, grown so that `length` more rows fit; every layer must have been updated before."""
        rows = [rows for rows in self.rows if rows is not None]
        assert len(rows) == len(self.rows)
        more = self.offset + length - rows[0].shape[1]
        if more > 0:
            # MLX does not know of what a kernel wrote in place, and copies only what is there.
            mx.synchronize()
            # By an eighth at least: whoever traced a step for these shapes traces it again.
            more = max(-(-more // STEP) * STEP, rows[0].shape[1] // 8 // STEP * STEP)
            space = mx.zeros((rows[0].shape[0], more, self.width), self.dtype)
            rows = [mx.concatenate([old, space], axis=1) for old in rows]
        return rows

    def trim(self, offset: int) -> None:
        """Forget every row from `offset` on."""
        self.offset = min(self.offset, offset)

    @property
    def nbytes(self) -> int:
        return sum(rows.nbytes for rows in self.rows if rows is not None)


@dataclass
class TracedCache:
    """`LatentCache` within a traced step: whole arrays (B, allocated, width), with room for the step's new rows behind
    `position`, (1,) int32. `rows` holds the updated arrays at the end of the step."""

    rows: list[mx.array]
    position: mx.array
