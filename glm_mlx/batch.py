"""Several sequences read and continued together, each as if it were alone: what a server needs of the model."""

from collections.abc import Sequence

import mlx.core as mx

from glm_mlx.engine import prefill_chunk
from glm_mlx.exclusive import Exclusive
from glm_mlx.model import Model
from kernels import wide
from kernels.wide import LEAST_TOKENS


class Batch:
    """A model and the cache of some sequences, all empty at first.

    `batch(new)` appends each sequence's new tokens, a prompt or the token that was chosen last. While all sequences are
    as long as each other, as prompts are from their beginnings, attention is that of a single long prompt. `chunk`:
    tokens of all sequences at once, by default as for one. A batch belongs to the thread that calls it first.
    """

    def __init__(self, model: Model, sequences: int, chunk: int | None = None):
        if sequences < 1:
            raise ValueError(f"a batch of {sequences} sequences; at least one is needed")
        self.model = model
        self.cache = model.new_batch_cache(sequences)
        self._alone = Exclusive("the batch")
        # Not so few of each sequence that a GPU's matrix units are left unused.
        self.chunk = max(1, chunk // sequences) if chunk else max(LEAST_TOKENS, prefill_chunk(model.dtype) // sequences)

    def __call__(self, new: Sequence[Sequence[int]]) -> mx.array:
        """The logits of each sequence's last token, (B, vocabulary). Every sequence gets one token at least.

        Raises InputError where the cache is full, as the model's context is. What was read before, here and on Ctrl-C,
        is kept: of each sequence as many of its tokens as the chunks before held. Raises InUseError in another thread.
        """
        with self._alone:
            return self._read(new)

    def _read(self, new: Sequence[Sequence[int]]) -> mx.array:
        lengths, cache = [len(tokens) for tokens in new], self.cache
        if len(lengths) != len(cache.offsets) or not all(lengths):
            raise ValueError(f"tokens for {len(cache.offsets)} sequences, at least one each, and not {lengths}")
        if not all(0 <= token < self.model.cfg.vocab_size for tokens in new for token in tokens):
            raise ValueError(f"a token id outside 0 to {self.model.cfg.vocab_size - 1}")
        ends = [offset + length for offset, length in zip(cache.offsets, lengths, strict=True)]
        longest = max(lengths)
        padded = mx.array([[*tokens, *[0] * (longest - len(tokens))] for tokens in new], mx.int32)
        cache.expect(cache.offset + longest)
        last_tokens = mx.array(lengths) - 1
        last = mx.zeros((len(lengths), self.model.cfg.hidden_size), self.model.dtype)
        held = mx.get_active_memory() + cache.growth(cache.offset + longest, len(lengths))
        try:
            with wide.within(held):
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
