"""What the API takes and gives, as OpenAPI shows it. Requests are checked by `serve.bodies`, to the same limits."""

from datetime import datetime
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field

from overtone.schema import MAX_BATCH_TEXTS, MAX_TEXT_CHARS

Text = Annotated[str, Field(min_length=1, max_length=MAX_TEXT_CHARS)]

_PREDICTION = {
    "label": "positive",
    "confidence": 0.981244,
    "scores": {"negative": 0.003191, "neutral": 0.015565, "positive": 0.981244},
    "model_version": "default-0123abcd",
}


def _example(value: Any) -> ConfigDict:
    return ConfigDict(extra="forbid", json_schema_extra={"examples": [value]})


class PredictRequest(BaseModel):
    """One text."""

    model_config = _example({"text": "I love this"})

    text: Text


class BatchRequest(BaseModel):
    """Many texts."""

    model_config = _example({"texts": ["I love this", "worst service ever"]})

    texts: Annotated[list[Text], Field(min_length=1, max_length=MAX_BATCH_TEXTS)]


class Prediction(BaseModel):
    """What the model says of one text."""

    model_config = _example(_PREDICTION)

    label: str
    confidence: Annotated[float, Field(ge=0, le=1, description="Calibrated probability of `label`.")]
    scores: Annotated[dict[str, float], Field(description="Calibrated probability by label.")]
    model_version: str


class FieldProblem(BaseModel):
    """One thing that is wrong with a request."""

    field: Annotated[str, Field(examples=["texts[3]"])]
    problem: str
    limit: int | None = None
    size: int | None = None


class Problem(BaseModel):
    """An error, after RFC 9457."""

    type: Annotated[str, Field(examples=["urn:overtone:problem:invalid_input"])]
    title: str
    status: int
    detail: str
    code: Annotated[str, Field(description="Stable name of the kind of error.", examples=["invalid_input"])]
    request_id: str
    errors: list[FieldProblem] = []


class FailedPrediction(BaseModel):
    """A text of a batch that the model could not classify."""

    error: Problem


class BatchResponse(BaseModel):
    """A prediction for each text, in order."""

    model_config = _example({"predictions": [_PREDICTION], "model_version": "default-0123abcd"})

    predictions: list[Prediction | FailedPrediction]
    model_version: str


class Status(BaseModel):
    """Whether the replica lives, or is ready for work."""

    status: str
    model_version: str | None = None


class SessionRequest(BaseModel):
    """An API key, to be exchanged for a browser session."""

    model_config = _example({"key": "ovt_..."})

    key: Annotated[str, Field(min_length=1, max_length=512)]


class Rates(BaseModel):
    """Rows a second over the last minutes."""

    posts: float
    predictions: float


class NewestPost(BaseModel):
    """A stored post with its prediction, if there is one yet."""

    post_id: str
    text: str
    created_at: datetime
    label: str | None
    confidence: float | None
    model_version: str | None


class Stats(BaseModel):
    """Figures of what is stored."""

    posts: int
    predictions: int
    labels: dict[str, int]
    per_second: Rates
    series: Annotated[list[dict[str, Any]], Field(description="A minute each: `minute` and the count of each label.")]
    newest: list[NewestPost]
    model_version: str | None
    source: str | None
