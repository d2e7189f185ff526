"""Several sequences read and continued together, each as if it were alone: what a server needs of the model."""

from collections.abc import Sequence

import mlx.core as mx

from glm_mlx.engine import prefill_chunk
from glm_mlx.model import Model


class Batch:
    """A model and the cache of some sequences, all empty at first.

    `batch(new)` appends each sequence's new tokens, a prompt or the token that was chosen last. While all sequences are
    as long as each other, as prompts are from their beginnings, attention is that of a single long prompt. `chunk`:
    tokens of all sequences at once, by default as for one.
    """

    def __init__(self, model: Model, sequences: int, chunk: int | None = None):
        self.model = model
        self.cache = model.new_batch_cache(sequences)
        self.chunk = max(1, (chunk or prefill_chunk(model.dtype)) // sequences)

    def __call__(self, new: Sequence[Sequence[int]]) -> mx.array:
        """The logits of each sequence's last token, (B, vocabulary). Every sequence gets one token at least.

        Raises InputError where the cache is full; it then holds the tokens of the chunks before.
        """
        lengths, cache = [len(tokens) for tokens in new], self.cache
        if len(lengths) != len(cache.offsets) or not all(lengths):
            raise ValueError(f"tokens for {len(cache.offsets)} sequences, at least one each, and not {lengths}")
        ends = [offset + length for offset, length in zip(cache.offsets, lengths, strict=True)]
        longest = max(lengths)
        padded = mx.array([[*tokens, *[0] * (longest - len(tokens))] for tokens in new], mx.int32)
        cache.expect(cache.offset + longest)
        last_tokens = mx.array(lengths) - 1
        last = mx.zeros((len(lengths), self.model.cfg.hidden_size), self.model.dtype)
        try:
            for begin in range(0, longest, self.chunk):
                hidden = self.model.hidden_states(padded[:, begin : begin + self.chunk], cache)  # (B, L, D)
                at = last_tokens - begin
                here = (at >= 0) & (at < hidden.shape[1])
                found = hidden[mx.arange(len(lengths)), mx.where(here, at, 0)]
                last = mx.where(here[:, None], found, last)
                mx.eval(last, [rows for rows in cache.rows if rows is not None])
        finally:  # Ctrl-C may come between two chunks, and padding is no sequence's
            cache.keep(ends)
        return self.model.logits(last[:, None])[:, 0]
