"""Denormals: taken for zero while an engine runs, on its thread alone, and by nobody after it."""

import platform
import sys
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from overtone.bundle import Bundle
from overtone.denormals import flushed_denormals
from overtone.engine import OnnxEngine

pytestmark = pytest.mark.skipif(
    sys.platform != "linux" or platform.machine() != "x86_64" or not platform.libc_ver()[0],
    reason="denormals are flushed on x86-64 with glibc alone",
)


def _survives() -> bool:
    """Whether a denormal keeps its value on this thread."""
    return bool((np.full(64, 1e-39, dtype=np.float32) * np.float32(1)).any())


def test_denormals_are_zero_within_the_block_alone() -> None:
    assert _survives()
    with flushed_denormals():
        assert not _survives()
        with flushed_denormals():
            assert not _survives()
        assert not _survives()
    assert _survives()


def test_an_error_within_the_block_ends_it() -> None:
    with pytest.raises(ValueError, match="within"), flushed_denormals():
        raise ValueError("within")
    assert _survives()


def test_other_threads_keep_theirs() -> None:
    with ThreadPoolExecutor(1) as other:
        assert other.submit(_survives).result()
        with flushed_denormals():
            assert other.submit(_survives).result()


def test_other_numbers_are_rounded_as_before() -> None:
    with flushed_denormals():
        assert np.float32(1) / np.float32(3) == np.float32(0.33333334)
    assert np.float32(1) / np.float32(3) == np.float32(0.33333334)
    assert np.finfo(np.float32).smallest_subnormal > 0


def test_an_engine_leaves_its_threads_as_they_were(tiny_bundle: Bundle) -> None:
    engine = OnnxEngine(tiny_bundle)
    assert _survives()
    engine.classify([[1, 2], [1, 4, 4, 2]])
    assert _survives()
