"""Which rows of which tile hold a prompt's choices of experts: each tile has the same number of rows and one expert.

tiles_of(experts, num_experts) -> Tiles
    experts  (T, K)  uint32, each below num_experts

So that products by expert are batched matmuls. An expert that c choices fall on has the next ceil(c / rows) tiles. How
many tiles there are is the most that so many choices can need: the host never waits to learn what was chosen. Rows that
no choice fills, and the tiles past the last, hold some token's values, and nobody reads their results. The tiles past
the last have no expert.
"""

from dataclasses import dataclass

import mlx.core as mx

# Rows of a tile, by how many choices an expert has on average: with fewer they are mostly padding, with more tiles more
# weights are expanded. The best by arithmetic for the widths of GLM-4.7-Flash on an H200; not measured.
ROWS = ((8, 32), (32, 64))  # (below so many, rows)
MOST_ROWS = 128


@dataclass(frozen=True)
class Tiles:
    experts: mx.array  # (tiles,) uint32: whose weights; past the last num_experts, whose weights need not be expanded
    tokens: mx.array  # (tiles, rows) uint32: whose values each row holds
    places: mx.array  # (T, K) uint32: the row that holds each choice, counted over all tiles


def tiles_shape(choices: int, num_experts: int) -> tuple[int, int]:
    """(tiles, rows) for so many choices, whatever they are.

    ceil(c / rows) < c / rows + 1, and at most min(num_experts, choices) experts are chosen.
    """
    rows = next((rows for below, rows in ROWS if choices < below * num_experts), MOST_ROWS)
    return choices // rows + min(num_experts, choices), rows


def tiles_of(experts: mx.array, num_experts: int) -> Tiles:
    chosen = experts.reshape(-1)
    tiles, rows = tiles_shape(chosen.size, num_experts)
    order = mx.argsort(chosen)
    counts = (chosen == mx.arange(num_experts, dtype=mx.uint32)[:, None]).sum(axis=1).astype(mx.uint32)
    own = (counts + (rows - 1)) // rows  # tiles of each expert
    ends = mx.cumsum(own)
    # How far the choices of an expert are moved from where they stand when sorted; never back.
    shifts = (ends - own) * rows - (mx.cumsum(counts) - counts)
    of_tile = (ends <= mx.arange(tiles, dtype=mx.uint32)[:, None]).sum(axis=1).astype(mx.uint32)
    places = mx.arange(tiles * rows, dtype=mx.uint32).reshape(tiles, rows)
    at = mx.minimum(places - shifts[mx.minimum(of_tile, num_experts - 1)][:, None], chosen.size - 1)
    return Tiles(of_tile, order[at] // experts.shape[-1], (mx.argsort(order) + shifts[chosen]).reshape(experts.shape))
