"""Changes that leave the meaning of a text."""

from hypothesis import given
from hypothesis import strategies as st

from overtone.text import normalise
from train.robustness import perturbations

TEXTS = ["I really love this phone, @Ann_1!", "@a @b no", "Nothing to see https://t.co/AbC", "ok"]


def test_the_same_seed_gives_the_same_texts() -> None:
    assert perturbations(TEXTS, seed=3) == perturbations(TEXTS, seed=3)
    assert perturbations(TEXTS, seed=3) != perturbations(TEXTS, seed=4)


def test_each_change_does_what_its_name_says() -> None:
    found = perturbations(TEXTS)
    assert found["lower_case"][0] == "i really love this phone, @ann_1!"
    assert found["upper_case"][0] == "I REALLY LOVE THIS PHONE, @Ann_1!"
    assert found["upper_case"][2].endswith("https://t.co/AbC")
    assert found["mentions_removed"][1] == "no"
    assert all(text.startswith("@") for text in found["mention_added"])


def test_a_typo_changes_a_word_and_no_mention_or_link() -> None:
    for seed in range(30):
        typed = perturbations(TEXTS, seed)["typos"]
        assert typed[0] != TEXTS[0]
        assert "@Ann_1" in typed[0]
        assert typed[2].endswith("https://t.co/AbC")
        assert typed[3] == "ok"


def test_the_name_in_a_mention_does_not_reach_the_model() -> None:
    for before, after in zip(TEXTS, perturbations(TEXTS)["mentions_renamed"], strict=True):
        assert normalise(before) == normalise(after)


@given(text=st.text(min_size=1, max_size=80))
def test_no_text_becomes_empty(text: str) -> None:
    for name, (changed,) in perturbations([text]).items():
        assert changed, name
