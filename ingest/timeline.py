"""The simulator's posts in time: which have been published, under which ids, and how they look on the wire.

Posts appear on the clock, at a set rate, whether or not anyone is connected. Only ids are kept; the text of a post
is asked of its source again whenever it is sent.
"""

import json
from array import array
from bisect import bisect_left, bisect_right
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

from ingest.posts import Draft, PostSource
from overtone.schema import datetime_to_snowflake, snowflake_to_datetime

_LONGEST_CATCH_UP_S = 10.0
_MINUTE_OF_IDS = 60_000 << 22
_FIRST_AUTHOR_ID = 1_500_000_000
_WITH_PLACE = 20
"""One author in so many says where posts were made."""


@dataclass(frozen=True, slots=True)
class Page:
    """One page of a search: positions in the timeline, newest first, and where the next page begins."""

    positions: tuple[int, ...]
    next_until_id: int | None


class Timeline:
    """Publishes posts at `rate` a second from `started_at` (unix seconds) on, at most `limit` of them.

    Keeps the ids of the newest `keep` posts or more; older ones can no longer be searched for.
    """

    def __init__(
        self, source: PostSource, *, rate: float, started_at: float, limit: int | None = None, keep: int = 2_000_000
    ) -> None:
        self._source = source
        self._rate = rate
        self._origin = started_at
        self._limit = limit
        self._keep = keep
        self._ids = array("q")
        self._forgotten = 0
        self._last_id = 0

    @property
    def end(self) -> int:
        """The position that the next post will have; equally the number of posts published."""
        return self._forgotten + len(self._ids)

    @property
    def start(self) -> int:
        """The oldest position that is still kept."""
        return self._forgotten

    def publish_due(self, now: float) -> int:
        """Publish what is due at `now` (unix seconds) and return how many posts that is.

        After a pause of more than ten seconds (a suspended machine) the posts of the pause are left out instead of
        coming in one burst.
        """
        due = self._due_at(now)
        if due - self.end > self._rate * _LONGEST_CATCH_UP_S + 1:
            self._origin += (due - self.end) / self._rate
            due = self._due_at(now)
        count = max(due - self.end, 0)
        for _ in range(count):
            self._publish(self._origin + (self.end + 1) / self._rate)
        if len(self._ids) > 2 * self._keep:
            del self._ids[: self._keep]
            self._forgotten += self._keep
        return count

    def publish_until(self, now: float) -> None:
        """Publish all that is due at `now`, however long ago it was."""
        moment = self._origin
        while moment < now:
            moment = min(moment + _LONGEST_CATCH_UP_S, now)
            self.publish_due(moment)

    def silence(self) -> None:
        """Publish nothing more; what was published stays."""
        self._limit = self.end

    def ids(self, since_id: int = 0) -> list[int]:
        """The kept ids above `since_id`, ascending."""
        return self._ids[bisect_right(self._ids, since_id) :].tolist()

    def search(
        self,
        *,
        since_id: int | None,
        until_id: int | None,
        max_results: int,
        accepts: Callable[[int], bool] | None = None,
    ) -> Page:
        """The newest posts with since_id < id < until_id, of those whose position `accepts` lets through."""
        low = 0 if since_id is None else bisect_right(self._ids, since_id)
        offset = len(self._ids) if until_id is None else bisect_left(self._ids, until_id)
        found: list[int] = []
        while offset > low and len(found) < max_results:
            offset -= 1
            if accepts is None or accepts(self._forgotten + offset):
                found.append(self._forgotten + offset)
        return Page(tuple(found), self._ids[offset] if offset > low and found else None)

    def position_of(self, post_id: int) -> int | None:
        """Where the post with this id stands; None for one that is not kept."""
        offset = bisect_left(self._ids, post_id)
        is_there = offset < len(self._ids) and self._ids[offset] == post_id
        return self._forgotten + offset if is_there else None

    def position_at(self, instant: datetime) -> int:
        """The position of the first kept post made at `instant` or after it."""
        return self._forgotten + bisect_left(self._ids, datetime_to_snowflake(instant))

    def post_id(self, position: int) -> int:
        """The id of the post at `position`."""
        return self._ids[position - self._forgotten]

    def post(self, position: int, fields: frozenset[str]) -> dict[str, Any]:
        """The post at `position` as the X API's `data` object with the default fields and `fields`."""
        post_id, draft = self.post_id(position), self._source.draft(position)
        shown: dict[str, Any] = {
            "id": str(post_id),
            "text": draft.short_text,
            "edit_history_tweet_ids": [str(post_id)],
        }
        shown.update({name: value for name, value in _optional(post_id, draft).items() if name in fields})
        return shown

    def user(self, position: int) -> dict[str, Any]:
        """The author of the post at `position` as an object of `includes.users`."""
        author = self._source.draft(position).author
        return {"id": str(_FIRST_AUTHOR_ID + author), "name": f"Author {author}", "username": f"author_{author:04d}"}

    def _due_at(self, now: float) -> int:
        due = int((now - self._origin) * self._rate)
        return due if self._limit is None else min(due, self._limit)

    def _publish(self, instant: float) -> None:
        by_clock = datetime_to_snowflake(datetime.fromtimestamp(instant, tz=UTC))
        self._last_id = max(by_clock, self._last_id + 1)
        self._ids.append(self._last_id)


def author_id_of(author: int) -> int:
    """The id of the author with this number."""
    return _FIRST_AUTHOR_ID + author


def author_of(author_id: int) -> int:
    """The number of the author with this id."""
    return author_id - _FIRST_AUTHOR_ID


def to_line(message: dict[str, Any]) -> bytes:
    """`message` as one line of the stream. Escapes whatever is not ASCII, so that any string can be sent."""
    return json.dumps(message, separators=(",", ":")).encode("ascii") + b"\r\n"


def seven_days_before(now: float) -> int:
    """The smallest post id that recent search still knows at `now` (unix seconds)."""
    return datetime_to_snowflake(datetime.fromtimestamp(now - 7 * 86_400, tz=UTC))


def _optional(post_id: int, draft: Draft) -> dict[str, Any]:
    created = snowflake_to_datetime(post_id)
    fields: dict[str, Any] = {
        "author_id": str(_FIRST_AUTHOR_ID + draft.author),
        "created_at": created.strftime("%Y-%m-%dT%H:%M:%S.") + f"{created.microsecond // 1000:03d}Z",
        "lang": draft.lang,
        "conversation_id": str(post_id),
        "possibly_sensitive": False,
        "public_metrics": {"retweet_count": 0, "reply_count": 0, "like_count": 0, "quote_count": 0},
    }
    if draft.author % _WITH_PLACE == 0:
        fields["geo"] = {"place_id": f"{draft.author:016x}"}
    if draft.is_long:
        fields["note_tweet"] = {"text": draft.text}
    if draft.is_reply:
        parent = post_id - _MINUTE_OF_IDS
        fields["referenced_tweets"] = [{"type": "replied_to", "id": str(parent)}]
        fields["in_reply_to_user_id"] = str(_FIRST_AUTHOR_ID + (draft.author * 7) % 10_000)
        fields["conversation_id"] = str(parent)
    return fields
