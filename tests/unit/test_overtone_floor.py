"""The small rooms of the floor: errors, schema, logging, metrics."""

import inspect
import io
import json
import pickle
from contextlib import redirect_stderr
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from overtone import errors, logging, metrics, schema

CLASSES = [cls for _, cls in inspect.getmembers(errors, inspect.isclass) if issubclass(cls, errors.OvertoneError)]


@pytest.mark.parametrize("cls", CLASSES)
def test_an_error_crosses_a_process_boundary_whole(cls: type[errors.OvertoneError]) -> None:
    copy = pickle.loads(pickle.dumps(cls("what happened", field="text", limit=3)))
    assert (type(copy), copy.message, copy.details) == (cls, "what happened", {"field": "text", "limit": 3})


def test_error_codes_are_unique() -> None:
    codes = [cls.code for cls in CLASSES]
    assert len(codes) == len(set(codes))


@pytest.mark.parametrize("cls", CLASSES)
def test_an_error_without_words_says_its_docstring(cls: type[errors.OvertoneError]) -> None:
    assert cls().message == (cls.__doc__ or "").strip().splitlines()[0]
    assert f" {cls.__name__} " in f"{errors.__doc__}".replace("\n", " ")


@given(st.datetimes(min_value=datetime(2011, 1, 1), max_value=datetime(2040, 1, 1)))
def test_snowflakes_carry_their_time(instant: datetime) -> None:
    instant = instant.replace(tzinfo=UTC)
    back = schema.snowflake_to_datetime(schema.datetime_to_snowflake(instant))
    assert abs(back - instant) < timedelta(milliseconds=1.01)


def test_a_known_snowflake() -> None:
    assert schema.snowflake_to_datetime(1212092628029698048).isoformat() == "2019-12-31T19:26:16.771000+00:00"


def test_log_lines_are_json_with_the_guide_fields_and_mask_what_is_private() -> None:
    out = io.StringIO()
    with redirect_stderr(out):
        logging.configure("serve", "INFO", "json")
        log = logging.get_logger(trace_id="abc")
        log.debug("not.shown")
        log.info("request.answered", duration_ms=1.5, text="secret words", author_id=7)
    line = json.loads(out.getvalue())
    assert line["service"] == "serve"
    assert line["level"] == "info"
    assert line["message"] == "request.answered"
    assert line["trace_id"] == "abc"
    assert line["text"] == line["author_id"] == "***"
    assert datetime.fromisoformat(line["timestamp"]).tzinfo is not None


def test_exposition_of_one_process() -> None:
    metrics.HTTP_REQUESTS.labels("POST", "/predict", "200").inc()
    shown = metrics.exposition(None).decode()
    assert 'http_requests_total{method="POST",route="/predict",status="200"}' in shown


def test_gauges_of_dead_processes_are_forgotten(tmp_path: Path) -> None:
    dead, counter = tmp_path / "gauge_livesum_999999999.db", tmp_path / "counter_999999999.db"
    dead.touch()
    counter.touch()
    metrics.forget_dead_processes(tmp_path)
    assert not dead.exists()
    assert counter.exists()
