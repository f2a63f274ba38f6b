"""What stands between a layer's matrix products: each one pass over its rows, where torch would make five to ten."""

from typing import Any

import numpy as np

from kvbaton.model.cpu.numeric import element, exp, kernel, largest_of, load


@kernel
def rms_norm(rows: Any, weight: Any, epsilon: Any, output: Any) -> None:
    """`rows` [n, dim] divided by their root mean square, times `weight` [dim] (float32), into `output` [n, dim]."""
    dim = rows.shape[1]
    for n in range(rows.shape[0]):
        total = np.float32(0)
        for d in range(dim):
            x = load(rows[n, d])
            total += x * x
        scale = np.float32(1) / np.sqrt(total / np.float32(dim) + epsilon)
        for d in range(dim):
            output[n, d] = element(load(rows[n, d]) * scale * weight[d], output[n, d])


@kernel
def rotate_heads(
    projected: Any, query_weight: Any, key_weight: Any, epsilon: Any, cos: Any, sin: Any, query: Any, key: Any
) -> None:
    """Query and key heads out of `projected` [n, heads * dim + kv_heads * dim + …], normalised and rotated.

    Each head is RMS-normalised with `query_weight` or `key_weight` [dim] (float32; empty: not), and its first
    `cos.shape[1]` dimensions are turned by rotary position embedding (Su et al. 2021) in the half-split form: dimension
    i with i + half, by `cos` and `sin` [n, 2 * half]. Into `query` [n, heads, dim] and `key` [n, kv_heads, dim].
    """
    heads = query.shape[1]
    for n in range(projected.shape[0]):
        for h in range(heads):
            _rotate_head(projected[n], h, query_weight, epsilon, cos[n], sin[n], query[n, h])
        for h in range(key.shape[1]):
            _rotate_head(projected[n], heads + h, key_weight, epsilon, cos[n], sin[n], key[n, h])


@kernel
def _rotate_head(row: Any, head: int, weight: Any, epsilon: Any, cos: Any, sin: Any, output: Any) -> None:
    dim = output.shape[0]
    half = min(cos.shape[0], dim) // 2
    values = np.empty(dim, np.float32)
    source = row[head * dim : head * dim + dim]
    for d in range(dim):
        values[d] = load(source[d])
    if weight.size > 0:
        total = np.float32(0)
        for d in range(dim):
            total += values[d] * values[d]
        scale = np.float32(1) / np.sqrt(total / np.float32(dim) + epsilon)
        for d in range(dim):
            values[d] = values[d] * scale * weight[d]
    for d in range(half):
        low, high = values[d], values[half + d]
        output[d] = element(low * load(cos[d]) - high * load(sin[d]), output[d])
        output[half + d] = element(high * load(cos[half + d]) + low * load(sin[half + d]), output[half + d])
    for d in range(2 * half, dim):
        output[d] = element(values[d], output[d])


@kernel
def silu_gate(gate_up: Any, output: Any) -> None:
    """SiLU of the first half of each row of `gate_up` [n, 2 * dim], times the second, into `output` [n, dim]."""
    dim = output.shape[1]
    for n in range(output.shape[0]):
        for d in range(dim):
            gate = load(gate_up[n, d])
            # Below -87 the quotient is 0 either way, and above 87 it is the gate.
            divisor = np.float32(1) + exp(min(-gate, np.float32(87)))
            output[n, d] = element(gate / divisor * load(gate_up[n, dim + d]), output[n, d])


@kernel
def softmax(scores: Any, softcap: Any, sink: Any) -> None:
    """`scores` [n], float32, become weights: capped (0: not), of sum one less what a `sink` takes (-inf: nothing)."""
    if softcap > 0:
        for j in range(scores.shape[0]):
            scores[j] = softcap * np.tanh(scores[j] / softcap)
    largest = largest_of(scores, sink)
    total = exp(sink - largest)
    for j in range(scores.shape[0]):
        weight = exp(scores[j] - largest)
        scores[j] = weight
        total += weight
    inverse = np.float32(1) / total
    for j in range(scores.shape[0]):
        scores[j] *= inverse


@kernel
def masked_softmax(
    scores: Any, first_query: int, first_key: int, window: int, scale: Any, softcap: Any, sinks: Any, weights: Any
) -> None:
    """Attention `weights` of `scores` (float32, used up), both [kv_heads, group, queries, keys].

    Query i stands at position `first_query + i`, key j at `first_key + j`; a query sees keys up to its own position,
    and with a `window` (0: none) only that many. `scale` comes first, then `softcap` (0: none). `sinks` [heads],
    float32 (empty: none), take their share of the weight. Weights may lie where the scores do.
    """
    kv_heads, group, queries, keys = scores.shape
    for head in range(kv_heads * group):
        sink = sinks[head] if sinks.size > 0 else np.float32(-np.inf)
        for i in range(queries):
            output = weights[head // group, head % group, i]
            stop = min(keys, first_query + i + 1 - first_key)
            start = max(0, first_query + i + 1 - window - first_key) if window > 0 else 0
            row, seen = scores[head // group, head % group, i][start:stop], output[start:stop]
            for j in range(row.shape[0]):
                row[j] *= scale
            softmax(row, softcap, sink)
            for j in range(row.shape[0]):
                seen[j] = element(row[j], seen[j])
            output[:start] = element(np.float32(0), output[0])
            output[stop:] = element(np.float32(0), output[0])
