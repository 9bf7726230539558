"""Which texts are of which kind."""

import pytest

from train.slices import SLICES, slices_of


@pytest.mark.parametrize(
    ("name", "of_it", "not_of_it"),
    [
        ("short", "love it", "word " * 11),
        ("medium", "word " * 15, "love it"),
        ("long", "word " * 30, "word " * 15),
        ("emoji", "so good \U0001f600", "so good :) é"),
        ("negation", "this isn't good", "notable knots"),
        ("negation", "I don’t know", "I know"),
        ("hashtag", "so #good", "# 1"),
        ("mention", "hi @ann", "mail me at a@b.example"),
        ("link", "see https://t.co/a1", "see there"),
        ("all_caps", "THIS IS BAD", "NASA said so"),
        ("question", "really?", "really"),
        (
            "not_english",
            "Ich habe heute wirklich sehr schlechte Laune und keine Lust",
            "I am in a really bad mood today, sorry",
        ),
    ],
)
def test_kinds_of_text(name: str, of_it: str, not_of_it: str) -> None:
    assert slices_of([of_it, not_of_it])[name].tolist() == [True, False]


def test_every_slice_has_a_row_for_every_text() -> None:
    found = slices_of(["a", "b", "c"])
    assert tuple(found) == SLICES
    assert {rows.shape for rows in found.values()} == {(3,)}
