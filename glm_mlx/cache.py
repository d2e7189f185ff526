"""The cache of multi-head latent attention: one row [latent | k_pe] for each token and layer, nothing expanded."""

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

    def trim(self, offset: int) -> None:
        """Forget every row from `offset` on."""
        self.offset = min(self.offset, offset)

    @property
    def nbytes(self) -> int:
        return sum(rows.nbytes for rows in self.rows if rows is not None)
