"""The cache of multi-head latent attention: one row [latent | k_pe] for each token and layer, nothing expanded."""

from collections.abc import Sequence

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

    @property
    def position(self) -> int:
        """Of the first new token."""
        return self.offset

    def context(self, length: int) -> None:
        """How many of the rows that `update` returns are valid, with `length` new ones: all."""
        return None

    def advance(self, length: int) -> None:
        self.offset += length

    def take(self, rows: Sequence[mx.array], length: int) -> None:
        """The arrays that a traced step returned, with `length` new rows."""
        self.rows = list(rows)
        self.advance(length)

    def reserve(self, length: int) -> list[mx.array]:
        """The whole arrays, grown so that `length` more rows fit; every layer must have been updated before."""
        rows = [rows for rows in self.rows if rows is not None]
        more = self.offset + length - rows[0].shape[1]
        if more > 0:
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


class TracedCache:
    """`LatentCache` within a traced step: whole arrays (B, allocated, width), and the position as an array (1,) int32.

    `rows` holds the updated arrays at the end of the step.
    """

    def __init__(self, rows: Sequence[mx.array], position: mx.array):
        self.rows, self.position = list(rows), position

    def update(self, layer: int, new: mx.array) -> mx.array:
        rows = self.rows[layer]
        self.rows[layer] = mx.slice_update(rows, new.astype(rows.dtype), self.position, axes=(1,))
        return self.rows[layer]

    def context(self, length: int) -> mx.array:
        return self.position + length

    def advance(self, length: int) -> None:
        pass
