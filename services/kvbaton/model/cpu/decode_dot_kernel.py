"""`attend_decodes` for machines with AVX-512's bfloat16 unit: K and V are multiplied as they lie in the blocks.

Scores: the sums of eight tokens for two heads stay in 16 registers and are added up across lanes together, in a tree.
Values: two tokens' rows are interleaved, so that the unit multiplies them by a pair of weights; weights are rounded to
bfloat16, as flash attention rounds them.
"""

from typing import Any

import numpy as np
from llvmlite import ir
from numba import types

from kvbaton.model.cpu.kernels import softmax
from kvbaton.model.cpu.numeric import Bfloat, element, intrinsic, kernel
from kvbaton.model.cpu.product_kernel import PAIRS_OF, SUMS, WORDS, at, dot, loop_over, registers_of, spread

TOKENS = 8
"""Tokens that are scored together; blocks must hold a multiple of them."""
LANES = 32
"""Elements that the unit takes at once; K and V must be a multiple of it wide."""

# llvm.prefetch's words.
_READ, _SECOND_CACHE, _DATA = 0, 2, 1

_I64 = ir.IntType(64)
_HALVES = ir.VectorType(ir.IntType(16), LANES)


@intrinsic
def _score(
    typing_context: Any, query: Any, other: Any, keys: Any, token_bytes: Any, steps: Any, out: Any, next_out: Any
) -> Any:
    """Scores of two heads' queries (at `query` and `other`) for eight tokens, to `out` and `next_out` (float32).

    `keys` is the first token's row, `token_bytes` lead to the next, `steps` of 32 elements are in each.
    """

    def emit(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        *queries, keys, token_bytes, steps, out, next_out = arguments
        product = dot(builder.module)
        zero = ir.Constant(SUMS, [0.0] * 16)
        kept = [registers_of(builder, SUMS) for _ in range(2 * TOKENS)]
        for place in kept:
            builder.store(zero, place)
        rows = [builder.add(keys, builder.mul(token_bytes, _I64(token))) for token in range(TOKENS)]
        with loop_over(builder, steps) as loop:
            here = builder.mul(loop.index, _I64(2 * LANES))
            asked = [builder.load(at(builder, builder.add(q, here), 0, PAIRS_OF), align=2) for q in queries]
            for token, row in enumerate(rows):
                key = builder.load(at(builder, builder.add(row, here), 0, PAIRS_OF), align=2)
                for head in range(2):
                    place = kept[head * TOKENS + token]
                    builder.store(builder.call(product, [builder.load(place), asked[head], key]), place)
        sums = _across([builder.load(place) for place in kept], builder)
        half = ir.VectorType(ir.FloatType(), TOKENS)
        for head, target in enumerate((out, next_out)):
            mask = ir.Constant(ir.VectorType(ir.IntType(32), TOKENS), [head * TOKENS + lane for lane in range(TOKENS)])
            part = builder.shuffle_vector(sums, ir.Constant(SUMS, ir.Undefined), mask)
            builder.store(part, at(builder, target, 0, half), align=4)
        return context.get_dummy_value()

    return types.void(*[types.intp] * 7), emit


@intrinsic
def _prefetch(typing_context: Any, address: Any, lines: Any) -> Any:
    """Ask for `lines` cache lines from `address` on, ahead of their use."""

    def emit(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        address, lines = arguments
        word, pointer = ir.IntType(32), ir.IntType(8).as_pointer()
        kind = ir.FunctionType(ir.VoidType(), [pointer, word, word, word])
        function = builder.module.declare_intrinsic("llvm.prefetch", [pointer], kind)
        with loop_over(builder, lines) as loop:
            line = at(builder, builder.add(address, builder.mul(loop.index, _I64(64))), 0, ir.IntType(8))
            builder.call(function, [line, word(_READ), word(_SECOND_CACHE), word(_DATA)])
        return context.get_dummy_value()

    return types.void(*[types.intp] * 2), emit


def _across(vectors: list[Any], builder: Any) -> Any:
    """Sixteen vectors of 16 lanes to one: lane i is the sum of vector i."""
    even, odd = (ir.Constant(WORDS, list(range(start, 32, 2))) for start in range(2))
    while len(vectors) > 1:
        pairs = zip(vectors[::2], vectors[1::2], strict=True)
        vectors = [
            builder.fadd(builder.shuffle_vector(a, b, even), builder.shuffle_vector(a, b, odd)) for a, b in pairs
        ]
    return vectors[0]


@intrinsic
def _weigh(
    typing_context: Any,
    weights: Any,
    other: Any,
    values: Any,
    token_bytes: Any,
    second: Any,
    pairs: Any,
    sums: Any,
    next_sums: Any,
) -> Any:
    """Add two heads' weights (bfloat16 pairs at `weights` and `other`) times 32 elements of `pairs` pairs of tokens.

    `values` is the first token's row, `token_bytes` lead to the next pair's, `second` to the pair's other token. The
    sums at `sums` and `next_sums` are 32 float32 each.
    """

    def emit(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        *weights, values, token_bytes, second, pairs, sums, next_sums = arguments
        product = dot(builder.module)
        places = [(target, part) for target in (sums, next_sums) for part in range(2)]
        kept = [registers_of(builder, SUMS) for _ in places]
        for (target, part), place in zip(places, kept, strict=True):
            builder.store(builder.load(at(builder, target, part * 64, SUMS), align=4), place)
        with loop_over(builder, pairs) as loop:
            row = builder.add(values, builder.mul(loop.index, token_bytes))
            first = builder.load(at(builder, row, 0, _HALVES), align=2)
            then = builder.load(at(builder, builder.add(row, second), 0, _HALVES), align=2)
            woven = [_weave(builder, first, then, part) for part in range(2)]
            for head in range(2):
                pair = builder.add(weights[head], builder.mul(loop.index, _I64(4)))
                both = spread(builder, builder.load(at(builder, pair, 0, ir.IntType(32)), align=2))
                for part in range(2):
                    place = kept[2 * head + part]
                    builder.store(builder.call(product, [builder.load(place), both, woven[part]]), place)
        for (target, part), place in zip(places, kept, strict=True):
            builder.store(builder.load(place), at(builder, target, part * 64, SUMS), align=4)
        return context.get_dummy_value()

    return types.void(*[types.intp] * 8), emit


def _weave(builder: Any, first: Any, then: Any, part: int) -> Any:
    """Elements of two rows in turns: those of the first or of the second half."""
    order = [lane for at in range(16 * part, 16 * part + 16) for lane in (at, LANES + at)]
    mask = ir.Constant(ir.VectorType(ir.IntType(32), LANES), order)
    return builder.bitcast(builder.shuffle_vector(first, then, mask), ir.VectorType(Bfloat(), LANES))


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
    """As `decode_kernel.attend_decodes`, for bfloat16 and the sizes that `TOKENS` and `LANES` allow."""
    heads = query.shape[1]
    block_size, kv_heads, v_dim = keys.shape[1], keys.shape[2], values.shape[3]
    group = heads // kv_heads
    longest = 0
    for n in range(query.shape[0]):
        longest = max(longest, lengths[n])
    room = (longest // block_size + 1) * block_size
    # One row more than heads, for the second head of an odd group.
    scores = np.empty((heads + 1, room), np.float32)
    weights = np.empty((heads + 1, room), np.uint16)
    sums = np.empty((heads + 1, v_dim), np.float32)
    for n in range(query.shape[0]):
        length = lengths[n]
        first = max(0, length - window) if window > 0 else 0
        start = first // block_size * block_size
        for t in range(start, length, block_size):
            if t + block_size < length:
                _prefetch(keys[tables[n, t // block_size + 1]].ctypes.data, keys.strides[0] // 64)
            _score_block(query[n], keys[tables[n, t // block_size]], group, scores, t)
        for h in range(heads):
            sink = sinks[h] if sinks.size > 0 else np.float32(-np.inf)
            _round_weights(scores[h, first:length], scale, softcap, sink, weights[h], first)
            weights[h, start:first] = np.uint16(0)
        sums[:] = np.float32(0)
        for t in range(start, length, block_size):
            if t + block_size < length:
                _prefetch(values[tables[n, t // block_size + 1]].ctypes.data, values.strides[0] // 64)
            tokens = min(block_size, length - t)
            _weigh_block(weights, values[tables[n, t // block_size]], group, tokens, sums, t)
        for h in range(heads):
            for d in range(v_dim):
                output[n, h, d] = element(sums[h, d], output[n, h, d])


@kernel
def _round_weights(scores: Any, scale: Any, softcap: Any, sink: Any, weights: Any, first: int) -> None:
    """The softmax of `scores`, in bfloat16, in `weights` from `first` on, and a zero after it: half of a last pair."""
    for i in range(scores.shape[0]):
        scores[i] *= scale
    softmax(scores, softcap, sink)
    seen = weights[first : first + scores.shape[0]]
    for i in range(seen.shape[0]):
        seen[i] = element(scores[i], seen[i])
    weights[first + scores.shape[0]] = np.uint16(0)


@kernel
def _score_block(query: Any, keys: Any, group: int, scores: Any, position: int) -> None:
    heads, token_bytes, steps = query.shape[0], keys.strides[0], keys.shape[2] // 32
    query_at, query_bytes = query.ctypes.data, query.strides[0]
    scores_at, score_bytes = scores.ctypes.data + position * 4, scores.strides[0]
    for t in range(0, keys.shape[0], 8):
        for h in range(0, heads, group):
            row = keys.ctypes.data + t * token_bytes + h // group * keys.strides[1]
            for g in range(h, h + group, 2):
                other = min(g + 1, h + group - 1)
                spare = g + 1 if g + 1 < h + group else heads
                _score(
                    query_at + g * query_bytes,
                    query_at + other * query_bytes,
                    row,
                    token_bytes,
                    steps,
                    scores_at + g * score_bytes + t * 4,
                    scores_at + spare * score_bytes + t * 4,
                )


@kernel
def _weigh_block(weights: Any, values: Any, group: int, tokens: int, sums: Any, position: int) -> None:
    heads, token_bytes = weights.shape[0] - 1, values.strides[0]
    weights_at, weight_bytes = weights.ctypes.data + position * 2, weights.strides[0]
    sums_at, sum_bytes = sums.ctypes.data, sums.strides[0]
    pairs, odd = tokens // 2, tokens % 2
    for h in range(0, heads, group):
        for g in range(h, h + group, 2):
            one, two = weights_at + g * weight_bytes, weights_at + min(g + 1, h + group - 1) * weight_bytes
            spare = g + 1 if g + 1 < h + group else heads
            for d in range(0, values.shape[2], 32):
                row = values.ctypes.data + h // group * values.strides[1] + d * 2
                target, other = sums_at + g * sum_bytes + d * 4, sums_at + spare * sum_bytes + d * 4
                _weigh(one, two, row, 2 * token_bytes, token_bytes, pairs, target, other)
                if odd:
                    # The token after the last was written by nobody, or by another: a weight of zero would not make
                    # a NaN harmless. The last one stands in for it.
                    last = row + (tokens - 1) * token_bytes
                    place = (tokens - 1) * 2
                    _weigh(one + place, two + place, last, 0, 0, 1, target, other)
