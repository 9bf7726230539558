"""Billing periods and what they will cost."""

from datetime import date, timedelta
from decimal import Decimal

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ingest.spend import forecast, period_of
from overtone.db.usage import DayOfUse


@pytest.mark.parametrize(
    ("day", "resets_on_day", "first", "end"),
    [
        (date(2026, 8, 15), 1, date(2026, 8, 1), date(2026, 9, 1)),
        (date(2026, 8, 7), 8, date(2026, 7, 8), date(2026, 8, 8)),
        (date(2026, 8, 8), 8, date(2026, 8, 8), date(2026, 9, 8)),
        (date(2026, 1, 3), 28, date(2025, 12, 28), date(2026, 1, 28)),
    ],
)
def test_a_period_begins_on_its_day(day: date, resets_on_day: int, first: date, end: date) -> None:
    assert period_of(day, resets_on_day) == (first, end)


@given(day=st.dates(date(2000, 1, 1), date(2100, 1, 1)), resets_on_day=st.integers(1, 28))
def test_periods_follow_each_other(day: date, resets_on_day: int) -> None:
    first, end = period_of(day, resets_on_day)
    assert first <= day < end
    assert period_of(end, resets_on_day)[0] == end
    assert 28 <= (end - first).days <= 31


def used(day: date, count: int) -> DayOfUse:
    return DayOfUse(day, "posts", count, Decimal(count) / 200)


def test_the_rest_of_the_month_goes_on_as_the_last_week() -> None:
    today = date(2026, 6, 11)
    days = [used(today - timedelta(days=back), 100) for back in range(1, 8)] + [used(today, 40)]
    seen = forecast(days, today, 1, 0.005)
    assert (seen.first_day, seen.next_period) == (date(2026, 6, 1), date(2026, 7, 1))
    assert (seen.today, seen.used, seen.cost_usd) == (40, 740, Decimal("3.7"))
    assert seen.projected == 740 + 60 + 19 * 100
    assert seen.projected_usd == Decimal("13.5")


def test_a_first_day_stands_for_the_rest() -> None:
    seen = forecast([used(date(2026, 6, 29), 10)], date(2026, 6, 29), 1, 0.005)
    assert seen.projected == 20
    assert forecast([], date(2026, 6, 29), 1, 0.005).projected == 0
