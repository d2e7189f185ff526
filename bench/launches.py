"""What one decoded token asks of the device, counted in the graph that MLX is about to run."""

import io
import re
from collections import Counter
from collections.abc import Mapping

import mlx.core as mx

from glm_mlx.model import Model
from glm_mlx.sampling import Sampler, SamplingParams

# Primitives that only look at an array in another way. (Reshape and Contiguous copy where they must; that is rare.)
VIEWS = {
    "AsStrided", "Broadcast", "Contiguous", "Depends", "ExpandDims", "Flatten", "Reshape", "Slice", "Split", "Squeeze",
    "StopGradient", "Transpose", "Unflatten", "View",
}  # fmt: skip


def primitives(*arrays: mx.array) -> Counter[str]:
    """How many of each kind of MLX's primitives stand between evaluated arrays and these."""
    text = io.StringIO()
    mx.export_to_dot(text, *arrays)
    return Counter(re.findall(r'\[label ="(\w+)', text.getvalue()))


def decode_step(model: Model) -> Counter[str]:
    """The primitives of one greedy token on the default device, with a cache that need not grow."""
    cache, token = model.new_cache(), mx.zeros((1, 1), mx.int32)
    mx.eval(model.hidden_states(mx.zeros((1, 2), mx.int32), cache))
    mx.eval([rows for rows in cache.rows if rows is not None])
    if mx.default_device() == mx.Device(mx.gpu):  # as the engine does
        logits, _ = mx.compile(model.step)(token, mx.array([cache.offset], mx.int32), cache.reserve(1))
    else:
        logits = model.logits(model.hidden_states(token, cache))[:, 0]
    return primitives(*Sampler(SamplingParams(temperature=0), model.cfg.vocab_size, [[]])(logits).arrays())


def launches(found: Mapping[str, int]) -> int:
    """Those that compute: about what the device is asked to launch."""
    return sum(count for name, count in found.items() if name not in VIEWS)
