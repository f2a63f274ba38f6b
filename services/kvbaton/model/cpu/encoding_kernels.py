"""KV converted for its way and back: rows of one token's head to bfloat16, or to int8 or float8 with a scale for each.

A row is divided by its scale, the bfloat16 nearest to its largest magnitude over the largest code, and rounded to
nearest even. What holds for any row:

    all magnitudes below 2^-100    zeros: scale and codes are 0
    an infinity or a NaN in it     NaN throughout: the scale is, codes are 0. What is no number must not come out as one

float8 is e4m3 as in Micikevicius et al. 2022, "FP8 Formats for Deep Learning": 4 bits of exponent, 3 of mantissa, no
infinities, 448 the largest, 0x7f and 0xff NaN.
"""

from typing import Any

import numpy as np

from kvbaton.model.cpu.numeric import bits_of, element, float_of, inlined, kernel, load

INT8_LARGEST = np.float32(127)
FLOAT8_LARGEST = np.float32(448)

_SMALLEST = np.float32(2.0**-100)
_MAGNITUDE, _INFINITY = np.uint32(0x7FFFFFFF), np.uint32(0x7F800000)

# 1.5 * 2^23: added to a small float, it leaves the nearest integer in the sum's last bits.
_ROUNDING = np.float32(12582912)

_FLOAT8_NORMAL = np.float32(2.0**-6)
_FLOAT8_STEP = np.float32(2.0**-9)
_BIAS = np.uint32((127 - 7) << 3)


@inlined
def largest_magnitude(row: Any) -> Any:
    """Bits of the largest magnitude in `row` [n], NaN counting as larger than infinity."""
    largest = np.uint32(0)
    for i in range(row.shape[0]):
        largest = max(largest, bits_of(load(row[i])) & _MAGNITUDE)
    return largest


@inlined
def scale_of(magnitude: Any, largest_code: Any, scales: Any, at: int) -> Any:
    """Write the scale of a row whose `magnitude` is the largest, and return the factor from values to codes."""
    if magnitude >= _INFINITY:
        scales[at] = np.uint16(0x7FC0)
        return np.float32(0)
    largest = float_of(np.int32(magnitude))
    if largest < _SMALLEST:
        scales[at] = np.uint16(0)
        return np.float32(0)
    scales[at] = element(largest / largest_code, np.uint16(0))
    return np.float32(1) / load(scales[at])


@kernel
def encode_int8(rows: Any, codes: Any, scales: Any) -> None:
    """`rows` [n, dim] to `codes` [n, dim] uint8, two's complement, and `scales` [n] bfloat16."""
    for n in range(rows.shape[0]):
        factor = scale_of(largest_magnitude(rows[n]), INT8_LARGEST, scales, n)
        if factor == 0:
            codes[n] = 0
            continue
        for d in range(rows.shape[1]):
            codes[n, d] = np.uint8(bits_of(load(rows[n, d]) * factor + _ROUNDING) & np.uint32(0xFF))


@kernel
def decode_int8(codes: Any, scales: Any, rows: Any) -> None:
    """The inverse of `encode_int8`, for any codes and scales."""
    for n in range(rows.shape[0]):
        scale = load(scales[n])
        for d in range(rows.shape[1]):
            rows[n, d] = element(np.float32(np.int8(codes[n, d])) * scale, rows[n, d])


@kernel
def encode_float8(rows: Any, codes: Any, scales: Any) -> None:
    """`rows` [n, dim] to `codes` [n, dim] uint8, e4m3, and `scales` [n] bfloat16."""
    for n in range(rows.shape[0]):
        factor = scale_of(largest_magnitude(rows[n]), FLOAT8_LARGEST, scales, n)
        if factor == 0:
            codes[n] = 0
            continue
        for d in range(rows.shape[1]):
            bits = bits_of(load(rows[n, d]) * factor)
            magnitude = bits & _MAGNITUDE
            normal = (
                (magnitude + np.uint32(0x7FFFF) + ((magnitude >> np.uint32(20)) & np.uint32(1))) >> np.uint32(20)
            ) - _BIAS
            value = float_of(np.int32(magnitude))
            # Eight of the smallest steps are the code of the smallest normal number.
            subnormal = bits_of(value / _FLOAT8_STEP + _ROUNDING) & np.uint32(0xFF)
            code = subnormal if value < _FLOAT8_NORMAL else normal
            codes[n, d] = np.uint8((code & np.uint32(0x7F)) | ((bits >> np.uint32(24)) & np.uint32(0x80)))


@kernel
def decode_float8(codes: Any, scales: Any, rows: Any) -> None:
    """The inverse of `encode_float8`, for any codes and scales."""
    for n in range(rows.shape[0]):
        scale = load(scales[n])
        for d in range(rows.shape[1]):
            code = np.uint32(codes[n, d])
            magnitude = code & np.uint32(0x7F)
            normal = float_of(np.int32((magnitude + _BIAS) << np.uint32(20)))
            subnormal = np.float32(np.int32(magnitude)) * _FLOAT8_STEP
            value = subnormal if magnitude < np.uint32(8) else normal
            value = np.float32(np.nan) if magnitude == np.uint32(0x7F) else value
            value = -value if code >= np.uint32(0x80) else value
            rows[n, d] = element(value * scale, rows[n, d])


@kernel
def convert(rows: Any, converted: Any) -> None:
    """`rows` [n, dim] to `converted` [n, dim], either of them float32 or bfloat16."""
    for n in range(rows.shape[0]):
        for d in range(rows.shape[1]):
            converted[n, d] = element(load(rows[n, d]), converted[n, d])
