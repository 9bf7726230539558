"""Simple classifiers on the same data, so that a model's figures can be read against something."""

from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray

from overtone.errors import EnvironmentProblemError
from overtone.schema import LABELS
from train.data import LabelledTexts
from train.scores import Scores, score

_VADER_NEUTRAL = 0.05
"""The bound that VADER's authors advise between neutral and the rest, of the compound score -1 to 1."""


def baseline_scores(train: LabelledTexts, data: LabelledTexts, names: tuple[str, ...]) -> dict[str, Scores]:
    """Scores on `data` of a linear model trained on `train`, and of VADER where `names` are its labels.

    The linear model is logistic regression on TF-IDF of words and of letters, its classes weighted evenly. VADER is a
    lexicon with rules and learns nothing.

    Raises:
        EnvironmentProblemError: scikit-learn or VADER is not installed.
    """
    found = {"tfidf_linear": score(_linear(train, data), data.labels, names)}
    if names == LABELS:
        found["vader"] = score(_vader(data), data.labels, names)
    return found


def _linear(train: LabelledTexts, data: LabelledTexts) -> NDArray[np.float32]:
    try:
        from sklearn.feature_extraction.text import TfidfVectorizer
        from sklearn.linear_model import LogisticRegression
        from sklearn.pipeline import make_pipeline, make_union
    except ImportError as error:
        raise _missing(error) from None
    words = TfidfVectorizer(ngram_range=(1, 2), min_df=2, sublinear_tf=True)
    letters = TfidfVectorizer(analyzer="char_wb", ngram_range=(3, 4), min_df=3, sublinear_tf=True, max_features=100_000)
    model = make_pipeline(make_union(words, letters), LogisticRegression(class_weight="balanced", max_iter=300))
    model.fit(train.texts, train.labels)
    return np.asarray(model.predict_proba(data.texts), dtype=np.float32)


def _vader(data: LabelledTexts) -> NDArray[np.float32]:
    try:
        from vaderSentiment.vaderSentiment import SentimentIntensityAnalyzer
    except ImportError as error:
        raise _missing(error) from None
    analyser = SentimentIntensityAnalyzer()
    # It knows emoji and marks that normalising changes.
    compound = [analyser.polarity_scores(text)["compound"] for text in data.raw]
    order: Mapping[bool | None, int] = {False: 0, None: 1, True: 2}
    sides = [None if abs(one) < _VADER_NEUTRAL else one > 0 for one in compound]
    return np.eye(3, dtype=np.float32)[[order[side] for side in sides]]


def _missing(error: ImportError) -> EnvironmentProblemError:
    return EnvironmentProblemError(f"{error.name} is not installed; pip install 'overtone[train]'")
