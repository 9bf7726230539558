"""What the API takes and gives, as OpenAPI shows it. Requests are checked by `serve.bodies`, to the same limits."""

from datetime import datetime
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from overtone.schema import MAX_BATCH_TEXTS, MAX_REPORT_DAYS, MAX_SINCE_DAYS, MAX_TEXT_CHARS, REPORT_DAYS
from serve.longtext import LongText

Text = Annotated[str, Field(min_length=1, max_length=MAX_TEXT_CHARS)]

_PREDICTION = {
    "label": "positive",
    "confidence": 0.981244,
    "scores": {"negative": 0.003191, "neutral": 0.015565, "positive": 0.981244},
    "model_version": "default-0123abcd",
}


def _examples(*values: Any) -> ConfigDict:
    return ConfigDict(extra="forbid", json_schema_extra={"examples": list(values)})


class _Options(BaseModel):
    """How predictions are made and shown."""

    top_k: Annotated[
        int, Field(ge=1, description="Show this many labels in `scores`, the best first; at most all of the model's.")
    ] = 3
    threshold: Annotated[
        float, Field(ge=0, le=1, description="With less confidence than this, `label` is null and `abstained` true.")
    ] = 0.0
    long_text: Annotated[
        LongText,
        Field(
            description="Of a text with more tokens than the model reads: `truncate` counts the first ones, `reject` "
            "makes it an error, `window` counts all of it, window by window."
        ),
    ] = "truncate"
    explain: Annotated[
        bool,
        Field(description="Tell what each token adds to the probability of the label; for at most 16 texts."),
    ] = False


class PredictRequest(_Options):
    """One text."""

    model_config = _examples({"text": "I love this"}, {"text": "I love this", "top_k": 1, "explain": True})

    text: Text


class BatchRequest(_Options):
    """Many texts."""

    model_config = _examples(
        {"texts": ["I love this", "worst service ever"]},
        {"texts": ["I love this", "it is a phone"], "threshold": 0.8, "long_text": "window"},
    )

    texts: Annotated[list[Text], Field(min_length=1, max_length=MAX_BATCH_TEXTS)]


class TokenShare(BaseModel):
    """What one token adds to a prediction."""

    token: Annotated[str, Field(description="As it stands in the text.")]
    start: Annotated[int, Field(ge=0, description="First character, in Unicode code points.")]
    end: Annotated[int, Field(ge=1, description="The character behind the last.")]
    contribution: Annotated[float, Field(ge=-1, le=1, description="By how much the label's probability falls without.")]


class Prediction(BaseModel):
    """What the model says of one text."""

    model_config = _examples(_PREDICTION)

    label: Annotated[str | None, Field(description="Null only where the model abstained.")]
    confidence: Annotated[float, Field(ge=0, le=1, description="Calibrated probability of the best label.")]
    scores: Annotated[dict[str, float], Field(description="Calibrated probability by label.")]
    model_version: str
    abstained: Annotated[bool | None, Field(description="Whether `threshold`, if given, was missed.")] = None
    explanation: Annotated[list[TokenShare] | None, Field(description="With `explain`.")] = None


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
    error: Annotated[str | None, Field(description="The detail again, under the name that /v2 has for it.")] = None


class FailedPrediction(BaseModel):
    """A text of a batch that the model could not classify."""

    error: Problem


class BatchResponse(BaseModel):
    """A prediction for each text, in order."""

    model_config = _examples({"predictions": [_PREDICTION], "model_version": "default-0123abcd"})

    predictions: list[Prediction | FailedPrediction]
    model_version: str


class Status(BaseModel):
    """Whether the replica lives, or is ready for work."""

    status: str
    model_version: str | None = None


class SessionRequest(BaseModel):
    """An API key, to be exchanged for a browser session."""

    model_config = _examples({"key": "ovt_..."})

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


class ServerMetadata(BaseModel):
    """What the server is, after the Open Inference Protocol v2."""

    model_config = _examples({"name": "overtone", "version": "0.1.0", "extensions": ["binary_tensor_data"]})

    name: str
    version: str
    extensions: list[str]


class Liveness(BaseModel):
    """Whether the server lives."""

    live: bool


class Readiness(BaseModel):
    """Whether the server, or the model named, is ready."""

    name: str | None = None
    ready: bool


class TensorMetadata(BaseModel):
    """An input or output of the model; -1 stands for any number of texts."""

    name: str
    datatype: Literal["BYTES", "FP32"]
    shape: list[int]


class ModelMetadata(BaseModel):
    """What the model takes and gives."""

    name: str
    versions: list[str]
    platform: str
    inputs: list[TensorMetadata]
    outputs: list[TensorMetadata]
    parameters: dict[str, Any] = {}


class InputTensor(BaseModel):
    """The texts."""

    name: Literal["text"]
    datatype: Literal["BYTES"]
    shape: Annotated[list[int], Field(min_length=1, max_length=2, description="[n] or [n, 1].")]
    data: Annotated[list[Text], Field(description="Left out where binary_data_size is given.")] = []
    parameters: dict[str, Any] = {}


class RequestedOutput(BaseModel):
    """An output that is wanted."""

    name: Literal["label", "confidence", "scores"]
    parameters: Annotated[dict[str, Any], Field(description="`binary_data`: true for binary.")] = {}


class InferenceRequest(BaseModel):
    """Texts as a tensor."""

    model_config = ConfigDict(
        json_schema_extra={
            "examples": [
                {
                    "id": "1",
                    "inputs": [{"name": "text", "datatype": "BYTES", "shape": [1], "data": ["I love this"]}],
                    "outputs": [{"name": "label"}],
                }
            ]
        }
    )

    id: str | None = None
    parameters: Annotated[
        dict[str, Any], Field(description="`binary_data_output`: true for binary outputs. `long_text`: as in /predict.")
    ] = {}
    inputs: Annotated[list[InputTensor], Field(min_length=1, max_length=1)]
    outputs: Annotated[list[RequestedOutput], Field(max_length=3, description="All, if none is named.")] = []


class OutputTensor(BaseModel):
    """One output, row by row."""

    name: str
    datatype: Literal["BYTES", "FP32"]
    shape: list[int]
    data: list[str] | list[float] | None = None
    parameters: dict[str, Any] = {}


class InferenceResponse(BaseModel):
    """The predictions as tensors."""

    id: str | None = None
    model_name: str
    model_version: str
    outputs: list[OutputTensor]


class ServedBundle(BaseModel):
    """A bundle in use."""

    name: str
    version: str
    folder: str
    labels: list[str]
    max_length: Annotated[int, Field(description="Longest text, in tokens.")]
    precision: str
    base_model: str
    license: str
    created_at: datetime
    metrics: Annotated[dict[str, Any], Field(description="As measured when the bundle was made.")]


class CanarySide(BaseModel):
    """What the requests of one bundle were like since the canary began."""

    requests: int
    errors: int
    p99_ms: float | None


class CanaryState(BaseModel):
    """How the canary goes in this replica."""

    share: Annotated[float, Field(description="Share of requests the challenger answers now.")]
    configured_share: float
    rollback_reason: Annotated[str | None, Field(description="Why the canary was taken back by itself.")]
    champion: CanarySide
    challenger: CanarySide


class LabelPair(BaseModel):
    """Texts by the labels that the two bundles gave them."""

    champion: str
    challenger: str
    texts: int


class ShadowState(BaseModel):
    """What the challenger says of texts that the champion answered, in this replica."""

    share: float
    compared: int
    agreement: Annotated[float | None, Field(description="Share of texts with the same label.")]
    labels: list[LabelPair]
    dropped: Annotated[int, Field(description="Sampled texts not looked at because the replica was busy.")]
    failed: int


class Challenger(ServedBundle):
    """A bundle on trial."""

    canary: CanaryState
    shadow: ShadowState


class RefusedBundle(BaseModel):
    """A bundle that was not fit for use."""

    role: str
    folder: str
    reason: str
    at: datetime


class Models(BaseModel):
    """The bundles of one replica."""

    replica: str
    revision: Annotated[int, Field(description="Of the last order that this replica carried out.")]
    champion: ServedBundle
    challenger: Challenger | None
    refused: list[RefusedBundle]


_Name = Annotated[str, Field(min_length=1, max_length=200)]


class FeedbackRequest(BaseModel):
    """What the label of a stored post or of a text should be; `post_id` or `text` is given, not both."""

    model_config = _examples(
        {"post_id": "1780000000000000000", "label": "negative"},
        {"text": "not bad at all", "label": "positive", "annotator": "ann"},
    )

    label: Annotated[str, Field(description="One of the labels of the model that is served.")]
    post_id: Annotated[str | None, Field(pattern=r"^[0-9]{1,19}$")] = None
    text: Text | None = None
    annotator: Annotated[_Name | None, Field(description="Who says so, where one key speaks for several.")] = None
    predicted_label: Annotated[
        _Name | None, Field(description="What the model said of the text; of a post, that is known.")
    ] = None
    model_version: _Name | None = None


class FeedbackReceipt(BaseModel):
    """What became of feedback."""

    feedback_id: str
    state: Annotated[
        Literal["created", "changed", "unchanged"],
        Field(description="The same again is `unchanged`; another label by the same key and annotator is `changed`."),
    ]


class LineProblem(BaseModel):
    """What is wrong with a line of an upload."""

    line: Annotated[int, Field(description="From 1.")]
    field: str
    problem: str
    limit: int | None = None
    size: int | None = None


class Job(BaseModel):
    """A job, and how far it is."""

    job_id: str
    kind: str
    state: Literal["queued", "running", "succeeded", "failed", "cancelled"]
    done: Annotated[int, Field(description="Lines of the upload, or stored posts, that were done.")]
    failed: Annotated[int, Field(description="Of these, those with an error.")]
    total: Annotated[int | None, Field(description="How many there are; null until a re-scoring has looked.")]
    progress: Annotated[float, Field(ge=0, le=1)]
    problems: Annotated[list[LineProblem], Field(description="Of the first 20 lines with an error.")]
    outcome: Annotated[
        dict[str, Any] | None,
        Field(
            description="Of retention: what was dropped; of an erasure: the receipt; of a re-scoring: `model_version`, "
            "posts `looked_at` and predictions `written`; of a report: its figures.",
            examples=[{"model_version": "default-0123abcd", "looked_at": 120_000, "written": 45_000}],
        ),
    ]
    error: Annotated[str | None, Field(description="Why a job has failed.")]
    created_at: datetime
    started_at: datetime | None
    finished_at: datetime | None
    expires_at: Annotated[datetime | None, Field(description="When the job and its result are removed.")]


class ErasureRequest(BaseModel):
    """What is to be erased."""

    model_config = _examples({"kind": "author", "id": "1500000042"})

    kind: Literal["post", "author"]
    id: Annotated[str, Field(pattern=r"^[0-9]{1,19}$")]


class RescoringRequest(BaseModel):
    """Which stored posts are to have predictions by the model that is served now."""

    model_config = _examples({"since_days": 30}, {})

    since_days: Annotated[
        int | None, Field(ge=1, le=MAX_SINCE_DAYS, description="Only posts made within so many days; left out: all.")
    ] = None


class ReportRequest(BaseModel):
    """What a report is to be about."""

    model_config = _examples({"days": 7}, {})

    days: Annotated[
        int | None, Field(ge=1, le=MAX_REPORT_DAYS, description=f"So many days until now; left out: {REPORT_DAYS}.")
    ] = None


class Jobs(BaseModel):
    """Jobs, the newest first."""

    jobs: list[Job]


class Erasure(BaseModel):
    """What was erased; the signature of a receipt is over this object."""

    version: int
    receipt_id: str
    kind: Literal["post", "author"]
    id: Annotated[str, Field(description="Of the post or author.")]
    reason: str
    actor: Annotated[str, Field(description="The key that asked.")]
    asked_at: datetime
    removed: Annotated[dict[str, int], Field(description="Rows removed, by table, and lines of files.")]
    posts: Annotated[dict[str, int | str], Field(description="How many, and SHA-256 of their sorted ids, one a line.")]
    left: Annotated[dict[str, int], Field(description="Rows found by a look after the erasure, by table.")]
    done_at: datetime


class Receipt(BaseModel):
    """An erasure and the signature that proves it."""

    body: Erasure
    algorithm: Literal["Ed25519"]
    public_key: Annotated[str, Field(description="32 bytes in base64.")]
    signature: Annotated[str, Field(description="Of `body` as JSON with sorted keys and without spaces; base64.")]
