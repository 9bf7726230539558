"""The lock, the state file and the telling apart of processes."""

import os
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

from overtone.cli.cleanup import drop_old_sessions
from overtone.cli.processes import MARK, await_gone, end, home_mark, mark_of, marked_processes
from overtone.cli.state import PartRecord, ProcessRecord, RunFolder, RunState
from overtone.errors import EnvironmentProblemError


@pytest.fixture
def folder(tmp_path: Path) -> RunFolder:
    made = RunFolder(tmp_path)
    made.make()
    return made


def sleeper(**environment: str) -> "subprocess.Popen[bytes]":
    command = [sys.executable, "-c", "import time; print(flush=True); time.sleep(600)"]
    child = subprocess.Popen(command, env={**os.environ, **environment}, stdout=subprocess.PIPE, start_new_session=True)
    assert child.stdout is not None
    child.stdout.readline()
    child.stdout.close()
    return child


def finish(child: "subprocess.Popen[bytes]") -> None:
    child.kill()
    child.wait()


def test_a_state_survives_the_disk(folder: RunFolder) -> None:
    me = ProcessRecord.of(os.getpid())
    state = RunState(
        "abc", me, 12.5, "ready", (PartRecord("ray", "somewhere", me, 1.5),), {"API": "http://x"}, "simulator"
    )
    folder.save(state)
    assert folder.load() == state


def test_a_part_takes_the_place_of_its_predecessor() -> None:
    state = (
        RunState("abc", ProcessRecord(1, 1.0), 0.0).with_part(PartRecord("ray", "old")).with_part(PartRecord("x", "x"))
    )
    assert [part.address for part in state.with_part(PartRecord("ray", "new")).parts] == ["x", "new"]


@pytest.mark.parametrize("content", ["", "{", "[]", "null", '{"format": 1}', '{"format": 99, "run_id": "x"}'])
def test_a_damaged_state_file_counts_as_none(folder: RunFolder, content: str) -> None:
    (folder.path / "state.json").write_text(content)
    assert folder.load() is None


def test_a_forgotten_state_is_gone(folder: RunFolder) -> None:
    folder.save(RunState("abc", ProcessRecord(1, 1.0), 0.0))
    folder.forget()
    folder.forget()
    assert folder.load() is None


def test_one_holder_of_the_lock_at_a_time(folder: RunFolder, tmp_path: Path) -> None:
    other = RunFolder(tmp_path)
    assert folder.try_lock()
    assert not other.try_lock()
    assert not other.lock(60.0, give_up=lambda: True)
    folder.unlock()
    assert other.lock(0.0)
    other.unlock()


def test_a_killed_holder_frees_the_lock(folder: RunFolder, tmp_path: Path) -> None:
    code = f"""
import time
from pathlib import Path
from overtone.cli.state import RunFolder
folder = RunFolder(Path({str(tmp_path)!r}))
print(folder.try_lock(), flush=True)
time.sleep(600)
"""
    holder = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    assert holder.stdout is not None
    assert holder.stdout.readline().strip() == "True"
    assert not folder.try_lock()
    holder.stdout.close()
    holder.kill()
    holder.wait()
    assert folder.lock(10.0)
    folder.unlock()


def test_the_folder_is_for_its_owner_alone(folder: RunFolder) -> None:
    assert folder.path.stat().st_mode & 0o077 == 0


def test_a_home_that_cannot_be_made_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(EnvironmentProblemError, match="OVERTONE_HOME"):
        RunFolder(tmp_path / "file" / "home").make()


def test_a_reused_process_id_is_not_the_process_that_was_recorded() -> None:
    now = ProcessRecord.of(os.getpid())
    assert now.alive() is not None
    assert ProcessRecord(now.pid, now.created - 100).alive() is None


def test_an_ended_process_is_not_alive_even_before_it_is_reaped() -> None:
    child = sleeper()
    record = ProcessRecord.of(child.pid)
    assert record.alive() is not None
    child.kill()
    assert await_gone([psutil.Process(child.pid)], 10.0) == []
    assert record.alive() is None
    child.wait()


def test_marked_processes_are_those_of_the_home_and_part(tmp_path: Path) -> None:
    home, other = tmp_path / "home", tmp_path / "other"
    ours = sleeper(**{MARK: mark_of(home, "run1", "ray")})
    part = sleeper(**{MARK: mark_of(home, "run2", "simulator")})
    theirs = sleeper(**{MARK: mark_of(other, "run1", "ray")})
    unmarked = sleeper(**{MARK: home_mark(home)})
    try:
        assert {process.pid for process in marked_processes(home)} == {ours.pid, part.pid}
        assert {process.pid for process in marked_processes(home, "ray")} == {ours.pid}
    finally:
        for child in (ours, part, theirs, unmarked):
            finish(child)


def test_this_process_and_its_ancestors_are_spared(tmp_path: Path) -> None:
    code = f"""
from pathlib import Path
from overtone.cli.processes import marked_processes
print(marked_processes(Path({str(tmp_path)!r})))
"""
    environment = {**os.environ, MARK: mark_of(tmp_path, "run", "x")}
    said = subprocess.run(
        [sys.executable, "-c", f"import subprocess, sys; subprocess.run([sys.executable, '-c', {code!r}])"],
        env=environment,
        capture_output=True,
        text=True,
        check=True,
    )
    assert said.stdout.strip() == "[]"


def test_what_ignores_sigterm_is_killed() -> None:
    code = "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); print(flush=True); time.sleep(600)"
    child = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE)
    assert child.stdout is not None
    child.stdout.readline()
    child.stdout.close()
    assert end([psutil.Process(child.pid)], patience_s=0.2) == []
    assert child.wait() == -9


def test_old_ray_sessions_go_and_the_last_stay(tmp_path: Path) -> None:
    for name in ("session_2026-01-01", "session_2026-01-02", "session_2026-01-03"):
        (tmp_path / name).mkdir()
    (tmp_path / "session_latest").symlink_to(tmp_path / "session_2026-01-03")
    drop_old_sessions(tmp_path, keep=2)
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "session_2026-01-02",
        "session_2026-01-03",
        "session_latest",
    ]


def test_a_guard_told_that_all_is_well_leaves(tmp_path: Path) -> None:
    reading, writing = os.pipe()
    command = [sys.executable, "-m", "overtone.cli.guard", str(reading), str(tmp_path), "run"]
    guard = subprocess.Popen(command, pass_fds=(reading,))
    os.close(reading)
    os.write(writing, b".")
    os.close(writing)
    assert guard.wait(30) == 0


def test_a_guard_whose_supervisor_died_stops_the_rest(folder: RunFolder, tmp_path: Path) -> None:
    left = sleeper(**{MARK: mark_of(tmp_path, "run", "simulator")})
    folder.save(RunState("run", ProcessRecord(1, 1.0), 0.0))
    reading, writing = os.pipe()
    command = [sys.executable, "-m", "overtone.cli.guard", str(reading), str(tmp_path), "run"]
    guard = subprocess.Popen(command, pass_fds=(reading,))
    os.close(reading)
    assert left.poll() is None
    os.close(writing)
    assert guard.wait(30) == 0
    assert left.wait(10) == -9
    assert folder.load() is None
