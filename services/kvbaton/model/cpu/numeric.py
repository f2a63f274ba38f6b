"""What the compiled kernels are written in: numba, with bfloat16 as the integers that it is stored as.

Numba has no bfloat16, and needs none: widening is a shift, narrowing a rounding. A kernel's arrays are `uint16` for
bfloat16 and `float32` for float32, and `load` and `store` know which.
"""

import fcntl
import functools
import hashlib
import logging
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar, cast

import numpy as np
import torch
from llvmlite import ir
from numba import njit, types
from numba.core import config as _config
from numba.core.registry import cpu_target
from numba.extending import intrinsic as _numba_intrinsic

logger = logging.getLogger(__name__)

F = TypeVar("F", bound=Callable[..., Any])

_FAST = {"nsz", "arcp", "contract", "afn", "reassoc"}
"""Sums may be reordered, so that they run in vector registers; infinities and NaN keep their meaning."""


def _cache_folder() -> Path | None:
    """Where machine code is kept, one folder for each state of the sources here; None when it cannot be kept.

    Numba by itself notices a change in a kernel's own file only, and kernels are made of parts from several.
    """
    digest = hashlib.blake2b(digest_size=8)
    for path in sorted(Path(__file__).parent.glob("*.py")):
        digest.update(path.read_bytes())
    try:
        folder = Path.home() / ".cache" / "kvbaton" / f"kernels-{digest.hexdigest()}"
        folder.mkdir(parents=True, exist_ok=True)
    except (OSError, RuntimeError):
        return None
    return folder if os.access(folder, os.W_OK) else None


_FOLDER = _cache_folder()


@functools.cache
def has_bfloat16_unit() -> bool:
    """Whether kernels are compiled for a processor with AVX-512's bfloat16 unit: this one, or what numba was told."""
    return _has_unit(cpu_target.target_context.codegen())


def _has_unit(codegen: Any) -> bool:
    features: str = codegen.magic_tuple()[2]
    return "+avx512bf16" in features.split(",")


def kernel(function: F) -> F:
    """Compile `function` for the types that it is called with; it runs without the interpreter lock."""
    return _compiled(function, fastmath=_FAST)


def _compiled(function: F, **options: Any) -> F:
    config: Any = _config
    own, config.CACHE_DIR = config.CACHE_DIR, str(_FOLDER or "")
    try:
        dispatcher = njit(cache=_FOLDER is not None, nogil=True, error_model="numpy", **options)(function)
    finally:
        config.CACHE_DIR = own
    if _FOLDER is not None:
        _save_alone(dispatcher, _FOLDER / "lock")
    return cast(F, dispatcher)


def _save_alone(dispatcher: Any, lock: Path) -> None:
    """Let one process at a time add to a kernel's cache.

    Numba reads the index, chooses the next file name, and writes both: two processes that start together could give one
    name to two kernels, and one of them would be found under the other's types for ever after.
    """
    cache = dispatcher._cache
    save = cache.save_overload

    def save_alone(signature: Any, data: Any) -> None:
        try:
            with lock.open("w") as file:
                fcntl.flock(file, fcntl.LOCK_EX)
                save(signature, data)
        except OSError as error:
            # A full disk: it is compiled again at the next start.
            logger.warning("a compiled kernel cannot be kept in %s: %s", lock.parent, error)

    cache.save_overload = save_alone


def inlined(function: F) -> F:
    """A part of kernels."""
    return cast(F, njit(inline="always", fastmath=_FAST)(function))


def _largest_of(row: Any, start: Any) -> Any:
    """The largest of `start` and `row` [n]. NaN may or may not be overlooked: whatever follows must carry it on."""
    largest = start
    for i in range(row.shape[0]):
        largest = max(largest, row[i])
    return largest


# Vector registers have no maximum that heeds NaN.
largest_of = _compiled(_largest_of, fastmath=True)


def intrinsic(build: Callable[..., Any]) -> Any:
    """An operation that kernels can call, from a function that gives its type and builds its instructions."""
    return _numba_intrinsic(build)


class Bfloat(ir.Type):  # type: ignore[misc]
    """LLVM's bfloat, which llvmlite does not name."""

    def _to_string(self) -> str:
        return "bfloat"

    def __str__(self) -> str:
        return "bfloat"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Bfloat)

    def __hash__(self) -> int:
        return hash(Bfloat)


@intrinsic
def load(typing_context: Any, value: Any) -> Any:
    """An array's element as float32."""

    def widen(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        if signature.args[0] == types.float32:
            return arguments[0]
        word = builder.zext(arguments[0], ir.IntType(32))
        return builder.bitcast(builder.shl(word, ir.Constant(ir.IntType(32), 16)), ir.FloatType())

    return types.float32(value), widen


@intrinsic
def bits_of(typing_context: Any, value: Any) -> Any:
    """A float32 as the integer with its bits."""

    def reinterpret(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return builder.bitcast(arguments[0], ir.IntType(32))

    return types.uint32(types.float32), reinterpret


@intrinsic
def float_of(typing_context: Any, bits: Any) -> Any:
    """The float32 with an integer's bits."""

    def reinterpret(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return builder.bitcast(arguments[0], ir.FloatType())

    return types.float32(types.int32), reinterpret


@intrinsic
def element(typing_context: Any, value: Any, like: Any) -> Any:
    """`value` for an array whose elements are of the type of `like`: float32, or bfloat16 rounded to nearest even."""

    def narrow(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        if signature.args[1] == types.float32:
            return arguments[0]
        if _has_unit(context.codegen()):
            return builder.bitcast(builder.fptrunc(arguments[0], Bfloat()), ir.IntType(16))
        return _rounded(builder, builder.bitcast(arguments[0], ir.IntType(32)))

    return like(types.float32, like), narrow


def _rounded(builder: Any, bits: Any) -> Any:
    """Rounding in integers: for other processors LLVM calls a function of the C library, which few have."""
    word, half = ir.IntType(32), ir.IntType(16)
    high = builder.lshr(bits, word(16))
    nearest = builder.add(builder.add(bits, word(0x7FFF)), builder.and_(high, word(1)))
    is_nan = builder.icmp_unsigned(">", builder.and_(bits, word(0x7FFFFFFF)), word(0x7F800000))
    # A NaN must not carry over into infinity, and stays one without the bits that are cut off.
    chosen = builder.select(is_nan, builder.or_(high, word(0x40)), builder.lshr(nearest, word(16)))
    return builder.trunc(chosen, half)


@inlined
def exp(x: Any) -> Any:
    """e**x for x of at most 88 in vector registers; relative error below 3e-7, 0 below -87, NaN for NaN.

    Cody and Waite's reduction (1980) to |r| <= ln 2 / 2, and the Taylor polynomial of degree 6 there.
    """
    clipped = np.float32(-87) if x < np.float32(-87) else x
    power = np.floor(clipped * np.float32(1.4426950408889634) + np.float32(0.5))
    r = clipped - power * np.float32(0.693359375) + power * np.float32(2.12194440e-4)
    p = np.float32(1 / 720)
    p = p * r + np.float32(1 / 120)
    p = p * r + np.float32(1 / 24)
    p = p * r + np.float32(1 / 6)
    p = p * r + np.float32(0.5)
    p = p * r + np.float32(1)
    p = p * r + np.float32(1)
    scaled = p * float_of((np.int32(power) + np.int32(127)) << np.int32(23))
    return np.float32(0) if x < np.float32(-87) else scaled


def as_array(tensor: torch.Tensor) -> np.ndarray[Any, Any]:
    """A kernel's view of a CPU tensor: float32 as it is, bfloat16 as uint16. Shares memory."""
    if tensor.dtype is torch.bfloat16:
        return tensor.view(torch.uint16).numpy()
    return tensor.numpy()
