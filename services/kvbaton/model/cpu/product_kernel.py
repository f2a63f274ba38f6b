"""Matrix products in bfloat16 with float32 sums, for one core with AVX-512's bfloat16 unit.

A decode step's products read every weight once for a handful of rows: they are bound by memory, and by what is done
around them. Here the weights lie in the order in which they are read, and nothing is done around them. The layout is
that of the unit's instruction, which multiplies pairs of neighbours: panels of 64 outputs, [pairs of inputs][64][2].
A tile of up to 6 rows and one panel is summed in registers (Goto and van de Geijn 2008); for many rows the panel is cut
so that its part stays in the first cache while all rows pass over it.
"""

from typing import Any

import numba
import numpy as np
import torch
from llvmlite import ir
from numba import types
from numba.core import cgutils

from kvbaton.model.cpu.numeric import Bfloat, element, intrinsic, kernel

PANEL = 64
"""Outputs of one panel: four registers of 16 sums."""

_LANES = 16
_PANEL_BYTES = PANEL * 4
"""Bytes of a pair of inputs' weights in a panel, and of a row of sums."""
_TILE_ROWS = 6
"""Rows of a full tile: 24 registers of sums, four of weights, and room for an input."""
_BLOCK_ROWS = 252
_BLOCK_BYTES = 640 << 10
"""Rows that pass over all panels together: they, and their sums, must stay in the second cache."""
_FEW_ROWS = 16
"""Up to here a panel streams from memory while rows pass over it, and is cut fine: what the first rows have read the
others find in the first cache."""
_FEW_ROWS_PAIRS = 16
_PAIRS = 128


def pack(weight: torch.Tensor) -> torch.Tensor:
    """`weight` [outputs, inputs], bfloat16, as panels [ceil(outputs / 64), inputs / 2, 64, 2]; inputs must be even."""
    outputs, inputs = weight.shape
    missing = -outputs % PANEL
    padded = torch.cat([weight, weight.new_zeros(missing, inputs)]) if missing else weight
    return padded.view(-1, PANEL, inputs // 2, 2).permute(0, 2, 1, 3).contiguous()


SUMS = ir.VectorType(ir.FloatType(), _LANES)
WORDS = ir.VectorType(ir.IntType(32), _LANES)
PAIRS_OF = ir.VectorType(Bfloat(), 2 * _LANES)
_I64 = ir.IntType(64)
# LLVM turns these memory cells into registers.
registers_of: Any = cgutils.alloca_once
loop_over: Any = cgutils.for_range
_pointer_to: Any = types.CPointer
_array_at: Any = vars(numba)["carray"]
_DOT = "llvm.x86.avx512bf16.dpbf16ps.512"


def dot(module: Any) -> Any:
    """sums + products of pairs: declared once a module."""
    known = module.globals.get(_DOT)
    return known or ir.Function(module, ir.FunctionType(SUMS, [SUMS, PAIRS_OF, PAIRS_OF]), _DOT)


def at(builder: Any, address: Any, offset: int, kind: Any) -> Any:
    """A pointer to `kind`, `offset` bytes after an address."""
    return builder.inttoptr(builder.add(address, _I64(offset)), kind.as_pointer())


def _tile(rows: int) -> Any:
    """The operation that adds `rows` rows times a stretch of one panel to their sums, all in registers.

    Its arguments are addresses and sizes: inputs, bytes from one row of them to the next, weights, pairs of inputs,
    sums (float32), bytes from one row of them to the next, and whether they begin at zero.
    """
    registers = PANEL // _LANES

    def emit(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        inputs, row_bytes, weights, pairs, sums, sum_bytes, fresh = arguments
        product = dot(builder.module)
        places = [(row, part) for row in range(rows) for part in range(registers)]
        kept = {place: registers_of(builder, SUMS) for place in places}
        is_fresh = builder.icmp_signed("!=", fresh, _I64(0))
        starts = [builder.add(sums, builder.mul(sum_bytes, _I64(row))) for row in range(rows)]
        for row, part in places:
            before = builder.load(at(builder, starts[row], part * 4 * _LANES, SUMS), align=4)
            builder.store(builder.select(is_fresh, ir.Constant(SUMS, [0.0] * _LANES), before), kept[row, part])
        lines = [builder.add(inputs, builder.mul(row_bytes, _I64(row))) for row in range(rows)]
        with loop_over(builder, pairs) as loop:
            here = builder.add(weights, builder.mul(loop.index, _I64(_PANEL_BYTES)))
            columns = [
                builder.load(at(builder, here, part * 4 * _LANES, PAIRS_OF), align=2) for part in range(registers)
            ]
            for row in range(rows):
                pair = builder.add(lines[row], builder.mul(loop.index, _I64(4)))
                word = builder.load(at(builder, pair, 0, ir.IntType(32)), align=2)
                everywhere = spread(builder, word)
                for part in range(registers):
                    place = kept[row, part]
                    builder.store(builder.call(product, [builder.load(place), everywhere, columns[part]]), place)
        for row, part in places:
            target = at(builder, starts[row], part * 4 * _LANES, SUMS)
            builder.store(builder.load(kept[row, part]), target, align=4)
        return context.get_dummy_value()

    def build(
        typing_context: Any,
        inputs: Any,
        row_bytes: Any,
        weights: Any,
        pairs: Any,
        sums: Any,
        sum_bytes: Any,
        fresh: Any,
    ) -> Any:
        return types.void(*[types.intp] * 7), emit

    return intrinsic(build)


def spread(builder: Any, word: Any) -> Any:
    """One pair of inputs in all lanes."""
    undefined = ir.Constant(WORDS, ir.Undefined)
    first = builder.insert_element(undefined, word, ir.IntType(32)(0))
    everywhere = builder.shuffle_vector(first, undefined, ir.Constant(WORDS, [0] * _LANES))
    return builder.bitcast(everywhere, PAIRS_OF)


_tile_1, _tile_2, _tile_3, _tile_4, _tile_5, _tile_6 = (_tile(rows) for rows in range(1, _TILE_ROWS + 1))


@intrinsic
def _round_rows(typing_context: Any, sums: Any, rows: Any, target: Any, target_bytes: Any) -> Any:
    """Write `rows` rows of a panel's sums, rounded to bfloat16, to `target` and every `target_bytes` from there on."""

    def emit(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        sums, rows, target, target_bytes = arguments
        half = ir.VectorType(Bfloat(), _LANES)
        with loop_over(builder, rows) as loop:
            source = builder.add(sums, builder.mul(loop.index, _I64(_PANEL_BYTES)))
            place = builder.add(target, builder.mul(loop.index, target_bytes))
            for part in range(PANEL // _LANES):
                wide = builder.load(at(builder, source, part * 4 * _LANES, SUMS), align=4)
                builder.store(builder.fptrunc(wide, half), at(builder, place, part * 2 * _LANES, half), align=2)
        return context.get_dummy_value()

    return types.void(*[types.intp] * 4), emit


def _elements(typing_context: Any, address: Any) -> Any:
    """An address as a pointer to bfloat16 elements."""

    def emit(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return builder.inttoptr(arguments[0], ir.IntType(16).as_pointer())

    return _pointer_to(types.uint16)(types.intp), emit


_pointer = intrinsic(_elements)


@kernel
def _add_rows(
    inputs: int, row_bytes: int, weights: int, pairs: int, rows: int, sums: int, sum_bytes: int, fresh: int
) -> None:
    while rows >= _TILE_ROWS and rows != 8:
        _tile_6(inputs, row_bytes, weights, pairs, sums, sum_bytes, fresh)
        rows, inputs, sums = rows - 6, inputs + 6 * row_bytes, sums + 6 * sum_bytes
    if rows >= 7:
        # Two tiles of nearly one height: the unit is kept busier than by a full one and a rest.
        _tile_4(inputs, row_bytes, weights, pairs, sums, sum_bytes, fresh)
        rows, inputs, sums = rows - 4, inputs + 4 * row_bytes, sums + 4 * sum_bytes
    if rows == 1:
        _tile_1(inputs, row_bytes, weights, pairs, sums, sum_bytes, fresh)
    elif rows == 2:
        _tile_2(inputs, row_bytes, weights, pairs, sums, sum_bytes, fresh)
    elif rows == 3:
        _tile_3(inputs, row_bytes, weights, pairs, sums, sum_bytes, fresh)
    elif rows == 4:
        _tile_4(inputs, row_bytes, weights, pairs, sums, sum_bytes, fresh)
    elif rows == 5:
        _tile_5(inputs, row_bytes, weights, pairs, sums, sum_bytes, fresh)


@kernel
def multiply(inputs: int, rows: int, width: int, weights: int, bias: Any, outputs: int, result: int) -> None:
    """`inputs` [rows, width] times packed `weights`, plus `bias` [outputs] (float32; empty: none), to `result`.

    `inputs`, `weights` and `result` [rows, outputs] are addresses of contiguous bfloat16; `width` must be even.
    """
    pairs, row_bytes = width // 2, width * 2
    output = _array_at(_pointer(result), (rows, outputs), np.uint16)
    most = max(_TILE_ROWS, min(_BLOCK_ROWS, _BLOCK_BYTES // row_bytes // _TILE_ROWS * _TILE_ROWS))
    height = max(1, min(rows, most))
    sums = np.empty((height, PANEL), np.float32)
    for top in range(0, rows, height):
        block = min(height, rows - top)
        cut = pairs if block <= _TILE_ROWS else (_FEW_ROWS_PAIRS if block <= _FEW_ROWS else _PAIRS)
        for first in range(0, outputs, PANEL):
            panel = weights + first // PANEL * pairs * _PANEL_BYTES
            columns = min(PANEL, outputs - first)
            for pair in range(0, pairs, cut):
                _add_rows(
                    inputs + top * row_bytes + pair * 4,
                    row_bytes,
                    panel + pair * _PANEL_BYTES,
                    min(cut, pairs - pair),
                    block,
                    sums.ctypes.data,
                    _PANEL_BYTES,
                    pair == 0,
                )
            if bias.size > 0:
                for i in range(block):
                    for j in range(columns):
                        sums[i, j] += bias[first + j]
            if columns == PANEL:
                target = result + (top * outputs + first) * 2
                _round_rows(sums.ctypes.data, block, target, outputs * 2)
            else:
                for i in range(block):
                    for j in range(columns):
                        output[top + i, first + j] = element(sums[i, j], output[0, 0])


@kernel
def multiply_heads(inputs: Any, rows: int, width: int, panels: Any, first_panel: int, products: Any) -> None:
    """Each head's `inputs` [heads, rows, width] (bfloat16, contiguous) times its packed `panels`, in float32.

    `panels` [heads, panels, width / 2, 64, 2] are what `pack` makes of a head's keys; `products` [heads, rows, outputs]
    are those of the outputs from `first_panel` on, as many as there is room for.
    """
    pairs, row_bytes, outputs = width // 2, width * 2, products.shape[2]
    last = np.empty((rows, PANEL), np.float32)
    for head in range(inputs.shape[0]):
        address = inputs[head].ctypes.data
        for first in range(0, outputs, PANEL):
            panel = panels[head, first_panel + first // PANEL].ctypes.data
            if first + PANEL <= outputs:
                place = products[head].ctypes.data + first * 4
                _add_rows(address, row_bytes, panel, pairs, rows, place, outputs * 4, 1)
            else:
                _add_rows(address, row_bytes, panel, pairs, rows, last.ctypes.data, _PANEL_BYTES, 1)
                products[head, :, first:] = last[:, : outputs - first]
