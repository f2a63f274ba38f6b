"""What CRC32C (Castagnoli) is made of: the processor's instruction, and tables that put checksums of pieces together.

The instruction takes three cycles and a new one can begin in each, so three pieces are summed side by side (Gopal et
al., "Fast CRC Computation for iSCSI Polynomial Using CRC32 Instruction", 2011). A checksum's state is a vector over
GF(2), and zeros that follow it are a matrix: the state after a piece that follows is the first one's, moved on by as
many zeros, plus the state of the piece by itself (as in zlib's crc32_combine).
"""

import functools
from typing import Any

import numpy as np
from llvmlite import ir
from numba import types
from numba.core.registry import cpu_target

from kvbaton.model.cpu.numeric import intrinsic

_POLYNOMIAL = 0x82F63B78
"""Bits reversed."""

_I64, _I8 = ir.IntType(64), ir.IntType(8)
_LINE = 64
_STATES: Any = types.UniTuple(types.int64, 3)  # type: ignore[no-untyped-call]
_VECTOR = ir.VectorType(_I64, 8)

NOTHING, WRITE, STREAM = 0, 1, 2
"""What becomes of the bytes that are summed: nothing, a copy, or a copy that goes past the caches."""


@functools.cache
def has_crc32c_unit() -> bool:
    """Whether kernels are compiled for a processor with the instruction: this one, or what numba was told."""
    features: str = cpu_target.target_context.codegen().magic_tuple()[2]
    return "+sse4.2" in features.split(",")


def zeros_table(num_bytes: int) -> np.ndarray[Any, Any]:
    """Tables [4, 256], int64: a state moved on by `num_bytes` zeros is the sum of those of its four bytes.

    `num_bytes` is a power of two.
    """
    columns = [1 << bit for bit in range(32)]
    for _ in range(8):
        columns = [column >> 1 ^ (_POLYNOMIAL if column & 1 else 0) for column in columns]
    # That was one byte; a matrix times itself is twice as many.
    while num_bytes > 1:
        columns = [_times(columns, column) for column in columns]
        num_bytes //= 2
    return np.array([[_times(columns, value << 8 * byte) for value in range(256)] for byte in range(4)], dtype=np.int64)


def _times(columns: list[int], state: int) -> int:
    total = 0
    for bit, column in enumerate(columns):
        if state >> bit & 1:
            total ^= column
    return total


@intrinsic
def add_word(typing_context: Any, state: Any, address: Any) -> Any:
    """The state after the eight bytes at an address."""

    def build(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return builder.call(_instruction(builder.module), [arguments[0], _load_word(builder, arguments[1])])

    return types.int64(types.int64, types.int64), build


@intrinsic
def add_byte(typing_context: Any, state: Any, address: Any) -> Any:
    """The state after the byte at an address."""

    def build(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        word = ir.IntType(32)
        name = "llvm.x86.sse42.crc32.32.8"
        known = builder.module.globals.get(name)
        function = known or ir.Function(builder.module, ir.FunctionType(word, [word, _I8]), name)
        byte = builder.load(builder.inttoptr(arguments[1], _I8.as_pointer()), align=1)
        return builder.zext(builder.call(function, [builder.trunc(arguments[0], word), byte]), _I64)

    return types.int64(types.int64, types.int64), build


def _mover(kind: Any) -> Any:
    """The operation that copies a value of an LLVM type from the second address to the first."""

    def build(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        target, source = (builder.inttoptr(argument, kind.as_pointer()) for argument in arguments)
        builder.store(builder.load(source, align=1), target, align=1)
        return context.get_dummy_value()

    def move(typing_context: Any, target: Any, source: Any) -> Any:
        return types.none(types.int64, types.int64), build

    return intrinsic(move)


move_word, move_byte = _mover(_I64), _mover(_I8)


@intrinsic
def fence(typing_context: Any) -> Any:
    """What went past the caches is seen by every other processor from here on."""

    def build(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        name = "llvm.x86.sse.sfence"
        known = builder.module.globals.get(name)
        builder.call(known or ir.Function(builder.module, ir.FunctionType(ir.VoidType(), []), name), [])
        return context.get_dummy_value()

    return types.none(), build


def _instruction(module: Any) -> Any:
    name = "llvm.x86.sse42.crc32.64.64"
    return module.globals.get(name) or ir.Function(module, ir.FunctionType(_I64, [_I64, _I64]), name)


def _prefetch(builder: Any, address: Any) -> None:
    """Read the line at an address into the first cache; one that is not mapped does no harm."""
    module, word, pointer = builder.module, ir.IntType(32), _I8.as_pointer()
    name = "llvm.prefetch.p0"
    kind = ir.FunctionType(ir.VoidType(), [pointer, word, word, word])
    function = module.globals.get(name) or ir.Function(module, kind, name)
    builder.call(function, [builder.inttoptr(address, pointer), word(0), word(3), word(1)])


def _three_lines(mode: int) -> Any:
    """The operation that takes in a line of 64 bytes from each of three pieces, `lane` bytes apart.

    Its arguments are target, source, lane, `reach`, `stop`, `jump` and three states, and its result the new states. The
    lines `reach` bytes further on are fetched into the cache; past `stop` they lie `jump` bytes further still. To go
    past the caches the target must be aligned to a line.
    """

    def build(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        target, source, lane, reach, stop, jump, *states = arguments
        function = _instruction(builder.module)
        starts = [builder.mul(lane, _I64(number)) for number in range(3)]
        places = [builder.add(source, start) for start in starts]
        for place in places:
            ahead = builder.add(place, reach)
            within = builder.icmp_signed("<", ahead, stop)
            _prefetch(builder, builder.select(within, ahead, builder.add(ahead, jump)))
        lines = [builder.load(builder.inttoptr(place, _VECTOR.as_pointer()), align=1) for place in places]
        words = [[_load_word(builder, builder.add(place, _I64(8 * word))) for word in range(8)] for place in places]
        for word in range(8):
            states = [builder.call(function, [state, words[number][word]]) for number, state in enumerate(states)]
        if mode != NOTHING:
            for start, line in zip(starts, lines, strict=True):
                place = builder.inttoptr(builder.add(target, start), _VECTOR.as_pointer())
                stored = builder.store(line, place, align=_LINE if mode == STREAM else 1)
                if mode == STREAM:
                    stored.set_metadata("nontemporal", builder.module.add_metadata([ir.IntType(32)(1)]))
        return context.make_tuple(builder, signature.return_type, states)

    def three_lines(
        typing_context: Any,
        target: Any,
        source: Any,
        lane: Any,
        reach: Any,
        stop: Any,
        jump: Any,
        first: Any,
        second: Any,
        third: Any,
    ) -> Any:
        return _STATES(*[types.int64] * 9), build

    return intrinsic(three_lines)


def _load_word(builder: Any, address: Any) -> Any:
    return builder.load(builder.inttoptr(address, _I64.as_pointer()), align=1)


sum_lines, copy_lines, stream_lines = _three_lines(NOTHING), _three_lines(WRITE), _three_lines(STREAM)
