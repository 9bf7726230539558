"""The route by which people correct the model."""

from collections.abc import Mapping, Sequence
from typing import Any

from fastapi import Request
from starlette.responses import Response

from overtone.db.feedback import Feedback
from overtone.errors import NotFoundError
from serve import bodies
from serve.bodies import FieldError
from serve.service import Service, json_response

_FIELDS = ("label", "post_id", "text", "annotator", "predicted_label", "model_version")
_NAMES = ("annotator", "predicted_label", "model_version")
_MAX_NAME_CHARS = 200
_MAX_ID = 2**63 - 1
_MAX_BYTES = 256 * 1024
"""The longest text, with every character escaped, and the names beside it."""


class FeedbackRoutes:
    """The handler."""

    def __init__(self, service: Service) -> None:
        self._service = service

    async def give_feedback(self, request: Request) -> Response:
        identity = await self._service.gate.authorise(request, "feedback")
        body = await bodies.read_json(request, max_bytes=_MAX_BYTES)
        item = parse_feedback(body, self._service.classifier.bundle.labels)
        # A person keeps an account through keys and sessions that come and go.
        written = await self._service.records.give_feedback(item, key_id=identity.account or identity.key_id)
        if written is None:
            raise NotFoundError("No post is stored under that id.")
        return json_response({"feedback_id": str(written.feedback_id), "state": written.state}, cached=False)


def parse_feedback(body: Any, labels: Sequence[str]) -> Feedback:
    """`body` as feedback.

    Raises:
        InvalidInputError: naming every field that is wrong.
    """
    if not isinstance(body, Mapping):
        raise bodies.invalid([FieldError("body", "must be an object")])
    strange = sum(name not in _FIELDS for name in body)
    problems = [FieldError("body", f"holds {strange} fields besides {', '.join(_FIELDS)}")] if strange else []
    if body.get("label") not in labels:
        problems.append(FieldError("label", f"must be one of {', '.join(labels)}"))
    post_id, text = body.get("post_id"), body.get("text")
    if (post_id is None) == (text is None):
        problems.append(FieldError("post_id", "or text must be given, and not both"))
    elif text is not None:
        problems += [problem for problem in (bodies.text_problem(text),) if problem]
    elif not _is_id(post_id):
        problems.append(FieldError("post_id", f"must be a number from 1 to {_MAX_ID}, as a string"))
    problems += [problem for name in _NAMES if (problem := _name_problem(name, body.get(name)))]
    if problems:
        raise bodies.invalid(problems)
    return Feedback(
        label=body["label"],
        post_id=None if post_id is None else int(post_id),
        text=text,
        annotator=body.get("annotator") or "",
        predicted_label=body.get("predicted_label"),
        model_version=body.get("model_version"),
    )


def _is_id(value: Any) -> bool:
    # int() takes signs, spaces and the digits of other scripts too.
    is_number = isinstance(value, str) and value.isascii() and value.isdigit() and len(value) <= 19
    return is_number and 0 < int(value) <= _MAX_ID


def _name_problem(field: str, value: Any) -> FieldError | None:
    if value is None:
        return None
    problem = bodies.text_problem(value, field)
    if problem is None and len(value) > _MAX_NAME_CHARS:
        too_long = f"holds {len(value)} characters, at most {_MAX_NAME_CHARS} are allowed"
        return FieldError(field, too_long, _MAX_NAME_CHARS, len(value))
    return problem
