"""Attention of decoding sequences over their paged KV, without gathering it.

For each sequence: scores of all its tokens, a softmax, and the weighted sum of values, straight from the blocks. Tokens
are taken four at a time and query heads two, so that a row of K or V is widened once for all of them.
"""

from typing import Any

import numpy as np

from kvbaton.model.cpu.kernels import softmax
from kvbaton.model.cpu.numeric import element, kernel, load


@kernel
def score_tokens(query: Any, keys: Any, group: int, num_tokens: int, scores: Any) -> None:
    """`scores` [heads, tokens] of `query` [heads + 1, dim] and one block's `keys` [block_size, kv_heads, dim]."""
    kv_heads, dim = keys.shape[1], keys.shape[2]
    whole = num_tokens - num_tokens % 4
    for t in range(0, whole, 4):
        for kv in range(kv_heads):
            for g in range(0, group, 2):
                h = kv * group + g
                a0 = a1 = a2 = a3 = b0 = b1 = b2 = b3 = np.float32(0)
                for d in range(dim):
                    k0, k1 = load(keys[t, kv, d]), load(keys[t + 1, kv, d])
                    k2, k3 = load(keys[t + 2, kv, d]), load(keys[t + 3, kv, d])
                    a, b = query[h, d], query[h + 1, d]
                    a0 += a * k0
                    a1 += a * k1
                    a2 += a * k2
                    a3 += a * k3
                    b0 += b * k0
                    b1 += b * k1
                    b2 += b * k2
                    b3 += b * k3
                scores[h, t], scores[h, t + 1], scores[h, t + 2], scores[h, t + 3] = a0, a1, a2, a3
                if g + 1 < group:
                    scores[h + 1, t], scores[h + 1, t + 1], scores[h + 1, t + 2], scores[h + 1, t + 3] = b0, b1, b2, b3
    for t in range(whole, num_tokens):
        for h in range(kv_heads * group):
            total = np.float32(0)
            for d in range(dim):
                total += query[h, d] * load(keys[t, h // group, d])
            scores[h, t] = total


@kernel
def add_values(weights: Any, values: Any, group: int, num_tokens: int, sums: Any) -> None:
    """Add `weights` [heads, tokens] times one block's `values` [block_size, kv_heads, dim] to `sums`."""
    kv_heads, dim = values.shape[1], values.shape[2]
    whole = num_tokens - num_tokens % 4
    for t in range(0, whole, 4):
        for kv in range(kv_heads):
            for g in range(0, group, 2):
                h = kv * group + g
                # The row after the last head belongs to nobody: an odd group's second head adds zeros there.
                other = np.float32(1) if g + 1 < group else np.float32(0)
                i = h + 1 if g + 1 < group else h
                a0, a1, a2, a3 = weights[h, t], weights[h, t + 1], weights[h, t + 2], weights[h, t + 3]
                b0, b1 = weights[i, t] * other, weights[i, t + 1] * other
                b2, b3 = weights[i, t + 2] * other, weights[i, t + 3] * other
                for d in range(dim):
                    v0, v1 = load(values[t, kv, d]), load(values[t + 1, kv, d])
                    v2, v3 = load(values[t + 2, kv, d]), load(values[t + 3, kv, d])
                    sums[h, d] += a0 * v0 + a1 * v1 + a2 * v2 + a3 * v3
                    sums[h + 1, d] += b0 * v0 + b1 * v1 + b2 * v2 + b3 * v3
    for t in range(whole, num_tokens):
        for h in range(kv_heads * group):
            for d in range(dim):
                sums[h, d] += weights[h, t] * load(values[t, h // group, d])


@kernel
def attend_decodes(
    query: Any,
    keys: Any,
    values: Any,
    tables: Any,
    lengths: Any,
    window: int,
    scale: Any,
    softcap: Any,
    sinks: Any,
    output: Any,
) -> None:
    """Attention of each sequence's newest token.

    `query` [n, heads, k_dim], `keys` [blocks, block_size, kv_heads, k_dim], `values` alike with v_dim, `tables` [n,
    blocks of the longest], `lengths` [n] with the new token, `window` tokens that it sees with itself (0: all), `scale`
    and `softcap` (0: none) float32, `sinks` [heads] float32 (empty: none), `output` [n, heads, v_dim].
    """
    heads, k_dim = query.shape[1], query.shape[2]
    block_size, kv_heads, v_dim = keys.shape[1], keys.shape[2], values.shape[3]
    group = heads // kv_heads
    longest = 0
    for n in range(query.shape[0]):
        longest = max(longest, lengths[n])
    scores = np.empty((heads, longest), np.float32)
    # One row more than heads: the kernels take heads in pairs.
    scaled = np.zeros((heads + 1, k_dim), np.float32)
    sums = np.empty((heads + 1, v_dim), np.float32)
    for n in range(query.shape[0]):
        length = lengths[n]
        first = max(0, length - window) if window > 0 else 0
        for h in range(heads):
            for d in range(k_dim):
                scaled[h, d] = load(query[n, h, d]) * scale
        start = first // block_size * block_size
        for t in range(start, length, block_size):
            num_tokens = min(block_size, length - t)
            score_tokens(scaled, keys[tables[n, t // block_size]], group, num_tokens, scores[:, t:])
        for h in range(heads):
            softmax(scores[h, first:length], softcap, sinks[h] if sinks.size > 0 else np.float32(-np.inf))
            scores[h, start:first] = np.float32(0)
        sums[:] = np.float32(0)
        for t in range(start, length, block_size):
            num_tokens = min(block_size, length - t)
            add_values(scores[:, t:], values[tables[n, t // block_size]], group, num_tokens, sums)
        for h in range(heads):
            for d in range(v_dim):
                output[n, h, d] = element(sums[h, d], output[n, h, d])
