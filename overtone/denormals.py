"""Floating point without denormals: the numbers nearest to zero, which Intel's processors take 150 cycles for.

The softmax of attention gives padding such numbers: ONNX Runtime's exponential ends at 1e-38, the smallest normal one,
and the sum that divides it makes it smaller. ONNX Runtime's own switch for them reaches threads of its pools alone, not
the one that runs a session of one thread.
"""

import ctypes
import platform
import struct
import sys
from collections.abc import Iterator
from contextlib import contextmanager

_ENVIRONMENT_BYTES, _MXCSR_AT = 32, 28
"""Of `fenv_t` on x86-64: the state of the x87 unit, then the register MXCSR (glibc, `bits/fenv.h`)."""
_FLUSH = 1 << 15 | 1 << 6
"""Results that are denormal become zero, and so do operands (Intel SDM, volume 1, section 10.2.3)."""


def _library() -> ctypes.PyDLL | None:
    if sys.platform != "linux" or platform.machine() != "x86_64":
        return None
    try:
        return ctypes.PyDLL("libm.so.6")
    except OSError:
        # Another C library than glibc.
        return None


_LIBRARY = _library()


@contextmanager
def flushed_denormals() -> Iterator[None]:
    """Take denormals for zero on this thread during the block; elsewhere than on x86-64 with glibc it does nothing."""
    if _LIBRARY is None:
        yield
        return
    before = ctypes.create_string_buffer(_ENVIRONMENT_BYTES)
    _LIBRARY.fegetenv(before)
    flushed = ctypes.create_string_buffer(before.raw, _ENVIRONMENT_BYTES)
    (register,) = struct.unpack_from("I", before, _MXCSR_AT)
    struct.pack_into("I", flushed, _MXCSR_AT, register | _FLUSH)
    _LIBRARY.fesetenv(flushed)
    try:
        yield
    finally:
        _LIBRARY.fesetenv(before)
