"""What the default bundle must be able to do, whatever it was trained on: behaviour first, then figures."""

from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import pytest

from overtone.bundle import DEFAULT_BUNDLE, Bundle, TextEncoder, load_bundle
from overtone.engine import Engine, check_golden, classify_sorted, open_engine
from overtone.schema import LABELS

VALIDATION = Path(__file__).parents[3] / "shared" / "data" / "sentiment" / "val.tsv"
NEGATIVE, NEUTRAL, POSITIVE = range(3)


class Model:
    """The bundle behind one verb."""

    def __init__(self, bundle: Bundle, engine: Engine) -> None:
        self.bundle, self.engine = bundle, engine
        self._encoder = TextEncoder(bundle)

    def scores(self, *texts: str) -> np.ndarray:
        return classify_sorted(self.engine, self._encoder.encode(texts))

    def labels(self, texts: Sequence[str]) -> list[str]:
        return [LABELS[row.argmax()] for row in self.scores(*texts)]


@pytest.fixture(scope="module")
def model() -> Iterator[Model]:
    bundle = load_bundle()
    engine = open_engine(bundle, threads=2)
    yield Model(bundle, engine)
    engine.close()


def test_it_is_small_and_as_it_was_measured(model: Model) -> None:
    assert sum(file.stat().st_size for file in DEFAULT_BUNDLE.iterdir()) <= 25 * 10**6
    assert model.bundle.labels == LABELS
    check_golden(model.bundle, model.engine)


def test_the_number_of_threads_changes_no_score(model: Model) -> None:
    narrow, lone = open_engine(model.bundle), open_engine(model.bundle, lone_threads=2)
    for ids in TextEncoder(model.bundle).encode(["I love this", "x " * 200, "Is the train late again? http://t.co/x"]):
        expected = narrow.classify([ids])
        np.testing.assert_array_equal(lone.classify([ids]), expected)
        np.testing.assert_array_equal(model.engine.classify([ids]), expected)
    narrow.close()
    lone.close()


def test_its_card_tells_its_own_version(model: Model) -> None:
    assert model.bundle.version in (DEFAULT_BUNDLE / "README.md").read_text()


@pytest.mark.parametrize(
    ("text", "label"),
    [
        ("I love this", "positive"),
        ("worst service ever", "negative"),
        ("What a wonderful day, so happy right now!", "positive"),
        ("This is the best concert I have ever been to", "positive"),
        ("thank you so much, you made my week", "positive"),
        ("I hate waiting in line for hours", "negative"),
        ("so sad and disappointed, never buying from them again", "negative"),
        ("the food was disgusting and the staff were rude", "negative"),
        ("The meeting starts at 10 on Tuesday.", "neutral"),
        ("The library is on Main Street, next to the post office.", "neutral"),
        ("Does anyone know what time the game starts tomorrow?", "neutral"),
    ],
)
def test_plain_cases(model: Model, text: str, label: str) -> None:
    assert model.labels([text]) == [label]


def test_the_two_showpieces_are_clear(model: Model) -> None:
    love, worst = model.scores("I love this", "worst service ever")
    assert love[POSITIVE] > 0.7
    assert worst[NEGATIVE] > 0.7


@pytest.mark.parametrize(
    ("good", "bad"),
    [
        ("The new phone is great", "The new phone is terrible"),
        ("I am happy with the update", "I am not happy with the update"),
        ("Loved every minute of the show", "Hated every minute of the show"),
        ("The flight was on time, well done", "The flight was cancelled again, well done"),
    ],
)
def test_the_word_that_matters_moves_the_scores(model: Model, good: str, bad: str) -> None:
    first, second = model.scores(good, bad)
    assert first[POSITIVE] > second[POSITIVE] + 0.2
    assert second[NEGATIVE] > first[NEGATIVE] + 0.2


@pytest.mark.parametrize(
    ("text", "worse"),
    [("The hotel was fine", "The hotel was fine. But the room smelled awful and was dirty."), ("ok", "ok, I hate it")],
)
def test_a_complaint_never_makes_a_text_better(model: Model, text: str, worse: str) -> None:
    before, after = model.scores(text, worse)
    assert after[NEGATIVE] > before[NEGATIVE]


TEXTS = [
    "I love the new album",
    "the service was awful today",
    "Our shop opens at nine on Monday",
    "so proud of this team, what a win",
    "stuck in traffic again, I hate mornings",
]


@pytest.mark.parametrize(
    "change",
    [
        lambda text: text.upper(),
        lambda text: text.replace(" ", "   ") + "\n",
        lambda text: "\u200b" + text,
    ],
    ids=["case", "white space", "invisible characters"],
)
def test_form_does_not_matter(model: Model, change: object) -> None:
    assert callable(change)
    np.testing.assert_allclose(model.scores(*TEXTS), model.scores(*map(change, TEXTS)), atol=1e-4)


def test_who_is_mentioned_and_what_is_linked_does_not_matter(model: Model) -> None:
    first = model.scores(*(f"@ann {text} https://t.co/a1" for text in TEXTS))
    second = model.scores(*(f"@another_user {text} http://example.com/some/page?x=1" for text in TEXTS))
    np.testing.assert_allclose(first, second, atol=1e-4)


def test_a_mention_or_a_link_more_does_not_turn_a_label(model: Model) -> None:
    plain = model.labels(TEXTS)
    assert model.labels([f"@ann {text}" for text in TEXTS]) == plain
    assert model.labels([f"{text} https://t.co/a1" for text in TEXTS]) == plain


def test_company_in_a_batch_does_not_matter(model: Model) -> None:
    alone = np.concatenate([model.scores(text) for text in TEXTS])
    np.testing.assert_allclose(alone, model.scores(*TEXTS, "x " * 100)[:-1], atol=1e-4)


@pytest.mark.parametrize("text", ["?", "\U0001f600", "\u0915\u094d\u092f\u093e", "a" * 25_000, "no " * 8_000, "\ufffd"])
def test_any_text_gets_scores(model: Model, text: str) -> None:
    scores = model.scores(text)
    assert scores.shape == (1, 3)
    assert scores.sum() == pytest.approx(1, abs=1e-4)


@pytest.mark.skipif(not VALIDATION.is_file(), reason=f"the validation tweets are not distributed ({VALIDATION})")
def test_figures_on_the_validation_tweets(model: Model) -> None:
    from train.evaluate import evaluate

    scores = evaluate(model.bundle, VALIDATION, with_robustness=False).scores
    assert scores.macro_recall >= 0.755
    assert scores.macro_recall == pytest.approx(model.bundle.metrics["validation"]["macro_recall"], abs=0.005)
    assert scores.macro_recall >= model.bundle.metrics["fp32"]["macro_recall"] - 0.005
    assert scores.ece <= 0.03
