"""What may no longer be kept: the compliance events of the simulator, and batch compliance jobs."""

import json
import uuid
from collections import deque
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from typing import Any, Literal

JobType = Literal["tweets", "users"]
POST_EVENTS = ("delete", "drop", "undrop", "withhold", "edit")
USER_GONE = {"user_delete": "deactivated", "user_protect": "protected", "user_suspend": "suspended"}
"""Events after which an author's posts must go, and what batch compliance calls them."""
USER_BACK = {"user_undelete": "deactivated", "user_unprotect": "protected", "user_unsuspend": "suspended"}
_MAX_EVENTS = 200_000
_MAX_JOBS = 1_000
PARTITIONS = 4


@dataclass(frozen=True, slots=True)
class Event:
    """One line of a compliance stream."""

    is_of_user: bool
    partition: int
    """1 to 4."""
    at: datetime
    line: Mapping[str, Any]


class EventLog:
    """The newest events, numbered from 0 on for ever."""

    def __init__(self) -> None:
        self._events: deque[Event] = deque(maxlen=_MAX_EVENTS)
        self.end = 0

    def add(self, event: Event) -> None:
        """Append `event`."""
        self._events.append(event)
        self.end += 1

    def since(self, number: int) -> tuple[int, list[Event]]:
        """The events from `number` on that are still kept, and the number of the next one."""
        skip = max(number - (self.end - len(self._events)), 0)
        return self.end, [event for index, event in enumerate(self._events) if index >= skip]

    def number_at(self, instant: datetime) -> int:
        """The number of the first kept event at or after `instant`."""
        older = sum(event.at < instant for event in self._events)
        return self.end - len(self._events) + older


def post_event(kind: str, post_id: int, author_id: int, at: datetime) -> Event:
    """The event of `kind` about a post, as the compliance stream writes it."""
    about = {"tweet": {"id": str(post_id), "author_id": str(author_id)}, "event_at": _shown(at)}
    if kind == "withhold":
        body: dict[str, Any] = {"withheld": {**about, "withheld_in_countries": ["XX"]}}
    elif kind == "edit":
        newer = str(post_id + (60_000 << 22))
        edit = {"initial_tweet_id": str(post_id), "edit_tweet_ids": [str(post_id), newer]}
        body = {"tweet_edit": {"tweet": {"id": newer, "author_id": str(author_id), **edit}, "event_at": _shown(at)}}
    else:
        body = {kind: about}
    return Event(False, post_id % PARTITIONS + 1, at, {"data": body})


def user_event(kind: str, author_id: int, at: datetime, up_to_post_id: int = 0) -> Event:
    """The event of `kind` about an author; `up_to_post_id` is the last post a `scrub_geo` concerns."""
    about: dict[str, Any] = {"user": {"id": str(author_id)}, "event_at": _shown(at)}
    if kind == "scrub_geo":
        about["up_to_tweet_id"] = str(up_to_post_id)
    return Event(True, author_id % PARTITIONS + 1, at, {"data": {kind: about}})


@dataclass(slots=True)
class Job:
    """One batch compliance job."""

    job_id: str
    type: JobType
    name: str | None
    resumable: bool
    created_at: datetime
    status: Literal["created", "in_progress", "complete", "failed"] = "created"
    answer: bytes = b""

    def shown(self, root: str) -> dict[str, Any]:
        """The job as the X API shows it; uploads and downloads go to addresses under `root`."""
        folder = f"{root}/simulator/compliance/{self.job_id}"
        name = {} if self.name is None else {"name": self.name}
        return {
            "id": self.job_id,
            "type": self.type,
            **name,
            "resumable": self.resumable,
            "status": self.status,
            "created_at": _shown(self.created_at),
            "upload_url": f"{folder}/upload",
            "upload_expires_at": _shown(self.created_at + timedelta(minutes=15)),
            "download_url": f"{folder}/download",
            "download_expires_at": _shown(self.created_at + timedelta(days=7)),
        }


@dataclass(slots=True)
class Jobs:
    """Batch compliance jobs; `verdict` says of an id what may no longer be kept about it and why, or None."""

    verdict: Callable[[JobType, int], str | None]
    _jobs: dict[str, Job] = field(default_factory=dict)

    def create(self, body: Any) -> Job | None:
        """A new job for the request `body`; None if that is not one, or too many are kept."""
        if not isinstance(body, dict) or body.get("type") not in ("tweets", "users") or len(self._jobs) >= _MAX_JOBS:
            return None
        job = Job(
            str(uuid.uuid4().int >> 65), body["type"], body.get("name"), bool(body.get("resumable")), datetime.now(UTC)
        )
        self._jobs[job.job_id] = job
        return job

    def find(self, job_id: str) -> Job | None:
        """The job of this id."""
        return self._jobs.get(job_id)

    def of_type(self, type_: str | None) -> Iterable[Job]:
        """The jobs of a type, or all."""
        return [job for job in self._jobs.values() if type_ in (None, job.type)]

    def take(self, job: Job, ids: Iterable[bytes]) -> None:
        """Take the uploaded `ids`, one a line; the job is in progress until it is looked at again."""
        now = datetime.now(UTC)
        lines = []
        for raw in ids:
            if raw.strip().isdigit():
                number = int(raw)
                reason = self.verdict(job.type, number)
                if reason is not None:
                    action = {"id": str(number), "action": "delete", "reason": reason, "created_at": _shown(now)}
                    lines.append(json.dumps({**action, "redacted_at": _shown(now)}))
        job.answer = "".join(f"{line}\n" for line in lines).encode()
        job.status = "in_progress"

    def advance(self, job: Job) -> None:
        """Finish `job`, if its ids are there."""
        if job.status == "in_progress":
            job.status = "complete"


def _shown(instant: datetime) -> str:
    return instant.isoformat(timespec="milliseconds").replace("+00:00", "Z")
