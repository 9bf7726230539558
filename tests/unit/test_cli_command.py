"""The command line itself: durations, exit codes, options, help."""

import io
import json
import math
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from overtone import errors
from overtone.cli.durations import in_words, parse_duration
from overtone.cli.exits import EXIT_CODES, error_of, exit_code, tell
from overtone.cli.plan import require_free_port
from overtone.cli.reports import JsonReport, TextReport, curl_line
from overtone.cli.state import PartRecord
from overtone.cli.supervisor import secret_file
from overtone.ports import free_ports
from overtone.settings import Settings


def overtone(*arguments: str, home: Path) -> "subprocess.CompletedProcess[str]":
    return subprocess.run(
        [sys.executable, "-m", "overtone.cli", *arguments],
        env={"OVERTONE_HOME": str(home), "PATH": "/usr/bin:/bin", "API_PORT": str(free_ports(1)[0]), "COLUMNS": "200"},
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.mark.parametrize(
    ("text", "seconds"),
    [("90", 90), ("90s", 90), ("1.5m", 90), ("1h30m", 5400), (" 2 M ", 120), ("1d", 86_400), ("0.5", 0.5)],
)
def test_a_duration_is_read(text: str, seconds: float) -> None:
    assert parse_duration(text) == seconds


@pytest.mark.parametrize("text", ["", "x", "s", "1x", "-5", "0", "1m2", "31d", "nan", "1e3"])
def test_what_is_no_duration_is_refused(text: str) -> None:
    with pytest.raises(errors.ConfigurationError):
        parse_duration(text)


@given(st.floats(min_value=0.01, max_value=86_400))
def test_seconds_are_read_as_they_are_written(seconds: float) -> None:
    assert math.isclose(parse_duration(f"{seconds:.3f}s"), round(seconds, 3), rel_tol=1e-9)


@pytest.mark.parametrize(
    ("seconds", "words"), [(4.21, "4.2 s"), (60, "1 min"), (200, "3 min 20 s"), (7500, "2 h 5 min"), (7200, "2 h")]
)
def test_a_duration_in_words(seconds: float, words: str) -> None:
    assert in_words(seconds) == words


def every_error() -> list[type[errors.OvertoneError]]:
    def below(cls: type[errors.OvertoneError]) -> list[type[errors.OvertoneError]]:
        return [cls, *(each for child in cls.__subclasses__() for each in below(child))]

    return below(errors.OvertoneError)


@pytest.mark.parametrize("cls", every_error())
def test_every_error_has_an_exit_code_of_its_kind(cls: type[errors.OvertoneError]) -> None:
    code = exit_code(cls())
    assert 1 <= code <= 125
    assert code == next(EXIT_CODES[base] for base in cls.__mro__ if base in EXIT_CODES)
    if cls.__base__ is errors.OvertoneError:
        assert code != EXIT_CODES[errors.OvertoneError], "a kind of error without a code of its own"


@pytest.mark.parametrize("cls", every_error())
def test_an_error_is_found_by_its_code(cls: type[errors.OvertoneError]) -> None:
    assert error_of(cls.code) is cls


def test_an_unknown_code_is_an_error_all_the_same() -> None:
    assert error_of("nonsense") is errors.OvertoneError


def test_an_error_that_is_not_ours_is_1() -> None:
    assert exit_code(ZeroDivisionError()) == 1


def test_an_error_is_told_without_a_trace_and_without_markup() -> None:
    console = Console(record=True, width=200)
    assert tell(errors.BundleError("no [bold] file"), console, with_trace=False) == EXIT_CODES[errors.BundleError]
    assert console.export_text() == "Error: no [bold] file\n"


def test_help_needs_none_of_the_heavy_libraries(tmp_path: Path) -> None:
    code = (
        "import sys; sys.argv = ['overtone', '--help']\n"
        "from overtone.cli.app import app\n"
        "app(standalone_mode=False)\n"
        "heavy = {'ray', 'asyncpg', 'sqlalchemy', 'onnxruntime', 'numpy', 'pydantic', 'httpx'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "Start everything" in done.stdout


def test_a_wrong_option_is_2(tmp_path: Path) -> None:
    done = overtone("up", "--nope", home=tmp_path)
    assert done.returncode == 2
    assert "--nope" in done.stderr


def test_a_wrong_duration_is_2_and_starts_nothing(tmp_path: Path) -> None:
    done = overtone("up", "--for", "soon", home=tmp_path)
    assert done.returncode == 2
    assert "soon" in done.stderr
    assert "Traceback" not in done.stderr
    assert list(tmp_path.iterdir()) == []


def test_status_of_nothing_says_so(tmp_path: Path) -> None:
    done = overtone("status", "--json", home=tmp_path)
    assert done.returncode == EXIT_CODES[errors.UnavailableError]
    assert json.loads(done.stdout) == {"running": False, "phase": None}
    assert "overtone up" in done.stderr


def test_down_of_nothing_is_fine(tmp_path: Path) -> None:
    assert overtone("down", home=tmp_path / "absent").returncode == 0
    assert overtone("down", home=tmp_path).returncode == 0


def test_doctor_in_json_has_advice_for_every_problem(tmp_path: Path) -> None:
    done = overtone("doctor", "--json", home=tmp_path / "home")
    findings = json.loads(done.stdout)
    assert {"python", "api port", "bundle", "disk"} <= {finding["name"] for finding in findings}
    assert all(finding["advice"] for finding in findings if finding["level"] == "problem")
    assert (done.returncode == 0) == all(finding["level"] != "problem" for finding in findings)


def test_a_taken_port_is_named_with_the_way_out() -> None:
    import socket

    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        with pytest.raises(errors.EnvironmentProblemError, match="API_PORT"):
            require_free_port("127.0.0.1", taken.getsockname()[1])


@pytest.mark.parametrize(
    ("host", "url"),
    [("127.0.0.1", "http://127.0.0.1:8000"), ("0.0.0.0", "http://127.0.0.1:8000"), ("::", "http://[::1]:8000")],
)
def test_people_are_given_an_address_that_can_be_opened(host: str, url: str) -> None:
    assert Settings(api_host=host, api_port=8000, _env_file=None).api_url == url


def test_a_secret_is_made_once_and_for_its_owner_alone(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "api_key"
    assert secret_file(path, lambda: "first") == "first"
    assert secret_file(path, lambda: "second") == "first"
    assert path.stat().st_mode & 0o777 == 0o600
    path.chmod(0o644)
    secret_file(path, lambda: "third")
    assert path.stat().st_mode & 0o777 == 0o600
    path.write_text("")
    assert secret_file(path, lambda: "fourth") == "fourth"


def test_the_curl_line_does_not_hold_the_key() -> None:
    line = curl_line("http://127.0.0.1:8000", "X-API-Key", Path("/home/o'brien/api_key"))
    assert "http://127.0.0.1:8000/predict" in line
    assert "$(cat " in line


def test_a_report_that_goes_to_a_log_holds_no_link(capsys: pytest.CaptureFixture[str]) -> None:
    for shows_link in (True, False):
        JsonReport(shows_link=shows_link).ready({"Page": "secret", "API": "x"}, "simulator", 1.0)
    first, second = (json.loads(line)["addresses"] for line in capsys.readouterr().out.splitlines())
    assert (first, second) == ({"Page": "secret", "API": "x"}, {"API": "x"})


def test_a_report_in_json_is_one_object_a_line(capsys: pytest.CaptureFixture[str]) -> None:
    report = JsonReport()
    report.started(PartRecord("ray", "here", None, 1.234))
    report.finished({"posts_stored": 3, "predictions_stored": 3})
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert lines[0] == {"event": "part.started", "part": "ray", "address": "here", "seconds": 1.23}
    assert lines[-1]["posts_stored"] == lines[-1]["predictions_stored"] == 3


@pytest.mark.parametrize(
    ("figures", "told"),
    [
        ({"posts_stored": 1200, "predictions_stored": 3}, ": 1,200 posts and 3 predictions are stored."),
        ({}, "."),  # the database was away when the stack was stopped
    ],
)
def test_the_end_is_told_with_what_is_known_of_the_database(figures: dict[str, int], told: str) -> None:
    console = Console(file=io.StringIO(), width=200)
    TextReport(console).finished({"seconds": 5.0, **figures, "addresses": {}})

    assert console.file.getvalue().rstrip() == f"Stopped after 5.0 s{told}"  # type: ignore[attr-defined]
