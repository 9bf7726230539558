"""The short form of `python -m benchmarks.fuzz`: spoilt lines are parsed, and none makes anything raise."""

import itertools
import random
from collections import Counter

from benchmarks.fuzz import as_received, check_line, good_lines, spoilt


def test_no_spoilt_line_makes_the_parser_raise() -> None:
    dice = random.Random(11)
    lines = as_received(dice, list(itertools.islice(spoilt(dice, good_lines()), 4_000)))
    seen = Counter(check_line(line) for line in lines)
    assert {"post", "problem", "not_json", "not_an_object", "unknown_message", "no_post_id", "no_text"} <= set(seen)


def test_equal_seeds_spoil_alike() -> None:
    def some(seed: int) -> list[bytes]:
        return list(itertools.islice(spoilt(random.Random(seed), [b'{"data": {"id": "5", "text": "x"}}']), 200))

    assert some(1) == some(1)
    assert some(1) != some(2)
