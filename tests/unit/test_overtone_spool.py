"""The spool: in order, bounded, whole after a crash, honest about damage."""

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from overtone.erasure_files import erase_from_folder
from overtone.spool import SUFFIX, Record, Spool

MIB = 1024 * 1024


@pytest.fixture
def spool(tmp_path: Path) -> Iterator[Spool]:
    made = Spool(tmp_path / "s", MIB, segment_bytes=200)
    yield made
    made.close()


def records(*payloads: bytes) -> list[Record]:
    return [Record(0, payload) for payload in payloads]


def drained(spool: Spool, limit: int = 3) -> list[bytes]:
    """Everything in it, with damage as b'?'."""
    payloads: list[bytes] = []
    while not spool.is_empty:
        chunk = spool.read(limit)
        payloads += [record.payload for record in chunk.records] or [b"?"] * bool(chunk.damaged_bytes)
        spool.commit(chunk.end)
    return payloads


def segments(folder: Path) -> list[Path]:
    return sorted(folder.glob(f"*{SUFFIX}"))


def test_what_was_put_in_comes_out_once_and_in_order(spool: Spool, tmp_path: Path) -> None:
    wanted = [b"%d" % number * 9 for number in range(100)]
    for start in range(0, 100, 10):
        assert spool.append(records(*wanted[start : start + 10])) == 10
    assert len(segments(tmp_path / "s")) > 2
    assert drained(spool) == wanted
    assert segments(tmp_path / "s") == []
    assert spool.append(records(b"later")) == 1
    assert drained(spool) == [b"later"]


def test_what_is_not_committed_is_read_again(spool: Spool) -> None:
    spool.append(records(b"a", b"b", b"c"))
    assert spool.read(2) == spool.read(2)
    spool.commit(spool.read(2).end)
    assert [record.payload for record in spool.read(9).records] == [b"c"]


def test_a_new_owner_goes_on_where_the_last_one_was(tmp_path: Path) -> None:
    first = Spool(tmp_path, MIB, segment_bytes=100)
    first.append(records(*[b"%d" % number for number in range(20)]))
    first.append(records(b"end"))
    first.commit(first.read(5).end)
    first.close()
    second = Spool(tmp_path, MIB)
    second.append(records(b"more"))
    assert drained(second) == [b"%d" % number for number in range(5, 20)] + [b"end", b"more"]
    second.close()


def test_one_process_owns_it_at_a_time(tmp_path: Path) -> None:
    first = Spool.claim(tmp_path, "x", MIB)
    first.append(records(b"mine"))
    with pytest.raises(BlockingIOError):
        Spool(tmp_path / "x-0", MIB)
    second = Spool.claim(tmp_path, "x", MIB)
    assert second.is_empty
    first.close()
    second.close()
    again = Spool.claim(tmp_path, "x", MIB)
    assert drained(again) == [b"mine"]
    again.close()


def test_it_takes_what_there_is_room_for(tmp_path: Path) -> None:
    spool = Spool(tmp_path, 100)
    assert spool.append(records(b"x" * 40, b"y" * 30, b"z" * 30)) == 2
    assert spool.append(records(b"z" * 30)) == 0
    spool.commit(spool.read(1).end)
    assert spool.append(records(b"z" * 30)) == 1
    assert drained(spool) == [b"y" * 30, b"z" * 30]
    spool.close()


@settings(max_examples=40)
@given(cut=st.integers(1, 200))
def test_an_end_that_was_torn_off_costs_no_more_than_that(tmp_path_factory: pytest.TempPathFactory, cut: int) -> None:
    folder = tmp_path_factory.mktemp("torn")
    spool = Spool(folder, MIB)
    payloads = [b"%d" % number * 7 for number in range(10)]
    spool.append(records(*payloads))
    spool.close()
    path = segments(folder)[0]
    os.truncate(path, max(path.stat().st_size - cut, 0))
    again = Spool(folder, MIB)
    again.append(records(b"after"))
    left = drained(again)
    assert left == [*payloads[: len(left) - 1], b"after"]
    again.close()


@settings(max_examples=40)
@given(at=st.integers(0, 10_000), bit=st.integers(0, 7))
def test_damage_is_reported_and_what_follows_it_is_read(
    tmp_path_factory: pytest.TempPathFactory, at: int, bit: int
) -> None:
    folder = tmp_path_factory.mktemp("damaged")
    spool = Spool(folder, MIB)
    payloads = [b"%d" % number * 7 for number in range(10)]
    spool.append(records(*payloads))
    spool.close()
    path = segments(folder)[0]
    raw = bytearray(path.read_bytes())
    position = at % (len(raw) - 20)
    raw[position] ^= 1 << bit
    path.write_bytes(raw)
    again = Spool(folder, MIB)
    left = drained(again)
    assert [one for one in left if one != b"?"] == [one for one in payloads if one in left]
    assert left.count(b"?") == 1
    assert len(left) == 10
    again.close()


def test_erasure_reaches_what_waits_in_it(tmp_path: Path) -> None:
    spool = Spool(tmp_path / "spool" / "x-0", MIB)
    spool.append(records(b'{"id":"17","text":"secret"}', b'{"id":"170","text":"kept"}'))
    assert erase_from_folder(tmp_path, [17]) == 1
    assert b"secret" not in segments(tmp_path / "spool" / "x-0")[0].read_bytes()
    spool.append(records(b"after"))
    assert [one.strip() for one in drained(spool)] == [b"", b'{"id":"170","text":"kept"}', b"after"]
    spool.close()


def test_what_waits_is_for_its_owner_alone(spool: Spool, tmp_path: Path) -> None:
    spool.append(records(b"x"))
    assert segments(tmp_path / "s")[0].stat().st_mode & 0o077 == 0
    assert (tmp_path / "s").stat().st_mode & 0o077 == 0
