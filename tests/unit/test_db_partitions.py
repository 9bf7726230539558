"""Which partition a post falls into."""

from datetime import UTC, datetime, timedelta

import pytest
from hypothesis import given
from hypothesis import strategies as st

from overtone.db.partitions import bounds, month_of, months_between, partition_name, plausible_ids
from overtone.schema import datetime_to_snowflake

NOW = datetime(2026, 11, 23, 12, tzinfo=UTC)


@given(st.integers(1, datetime_to_snowflake(datetime(2060, 1, 1, tzinfo=UTC))))
def test_every_post_id_lies_within_the_bounds_of_its_month(post_id: int) -> None:
    first, end = bounds(month_of(post_id))
    assert first <= post_id < end


@given(st.integers(2010 * 12 + 10, 2090 * 12))
def test_months_meet_without_a_hole(month: int) -> None:
    assert bounds(month)[1] == bounds(month + 1)[0]


def test_the_first_month_takes_the_ids_before_snowflakes() -> None:
    assert bounds(month_of(20))[0] == 0
    assert partition_name("posts", month_of(20)) == "posts_2010_11"


def test_months_between_crosses_the_year() -> None:
    names = [partition_name("posts", month) for month in months_between(NOW, NOW + timedelta(days=45))]
    assert names == ["posts_2026_11", "posts_2026_12", "posts_2027_01"]


@pytest.mark.parametrize(
    ("post_id", "plausible"),
    [
        (0, False),
        (-5, False),
        (20, True),
        (datetime_to_snowflake(NOW), True),
        (datetime_to_snowflake(NOW + timedelta(hours=23)), True),
        (datetime_to_snowflake(NOW + timedelta(hours=25)), False),
        (2**70, False),
    ],
)
def test_plausible_ids(post_id: int, plausible: bool) -> None:
    assert (post_id in plausible_ids(NOW)) is plausible
