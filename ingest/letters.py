"""Trying again what was put aside: after a mended parser, another model, or a limit that was raised."""

import json
from collections.abc import Callable
from datetime import datetime
from enum import StrEnum
from typing import Any

import orjson

from ingest.classify import NOT_CLASSIFIED
from ingest.parse import message_tags, parse_line
from ingest.predict import PredictClient, Refused
from overtone.db.database import Database
from overtone.db.letters import Choice, Letter, chosen_letters, settle_letters
from overtone.db.payload import raw_of
from overtone.db.posts import are_stored, write_dead_letter, write_posts
from overtone.db.predictions import write_predictions
from overtone.db.tombstones import erased_among
from overtone.errors import InvalidInputError
from overtone.schema import Post, Prediction

STREAM = "dead_letters"
"""Where posts come from that were stored after all."""

_PAGE_LETTERS = 200


class Fate(StrEnum):
    """What became of a letter."""

    STORED = "stored"
    CLASSIFIED = "classified"
    ERASED = "erased"
    """What it holds was erased meanwhile, and so is the letter."""
    REFUSED = "refused"
    """It stays, with one more attempt."""
    POSTPONED = "postponed"
    """It stays: the API cannot say now."""


class Retrier:
    """Stores posts from letters, and has those classified that the API refused."""

    def __init__(self, db: Database, client: PredictClient) -> None:
        self._db = db
        self._client = client

    async def retry(self, choice: Choice, note: Callable[[Letter, Fate], None]) -> None:
        """Try each letter of `choice` once, and tell `note` what became of it.

        Raises:
            OvertoneError: the database or the API cannot be reached; letters not noted are as before.
        """
        last = 0
        while page := await chosen_letters(self._db, choice, limit=_PAGE_LETTERS, above_id=last):
            for letter in page:
                note(letter, await self._retry_one(letter))
            last = page[-1].letter_id

    async def _retry_one(self, letter: Letter) -> Fate:
        if letter.reason.startswith(NOT_CLASSIFIED):
            fate = await self._classify(letter)
        else:
            fate = await self._store(letter)
        if fate not in {Fate.REFUSED, Fate.POSTPONED}:
            await settle_letters(self._db, [letter.letter_id])
        return fate

    async def _store(self, letter: Letter) -> Fate:
        post = post_in(letter.raw)
        if post is None:
            await write_dead_letter(self._db, letter.raw, letter.reason)
            return Fate.REFUSED
        await write_posts(self._db, [post], stream=STREAM)
        if await are_stored(self._db, [post.post_id]):
            return Fate.STORED
        if await erased_among(self._db, [post.post_id], [post.author_id]):
            return Fate.ERASED
        if raw_of(post) != letter.raw:
            # The refusal was written down as a letter of its own, which says why.
            await settle_letters(self._db, [letter.letter_id])
        return Fate.REFUSED

    async def _classify(self, letter: Letter) -> Fate:
        held = orjson.loads(letter.raw)
        post_id, text = int(held["post_id"]), str(held["text"])
        if not await are_stored(self._db, [post_id]):
            return Fate.ERASED
        try:
            outcome = (await self._client.predict([text]))[0]
        except InvalidInputError as error:
            outcome = Refused(error.code)
        if isinstance(outcome, Prediction):
            await write_predictions(self._db, [(post_id, outcome)])
            return Fate.CLASSIFIED
        if isinstance(outcome, Refused):
            await write_dead_letter(self._db, letter.raw, f"{NOT_CLASSIFIED}{outcome.reason}", post_id=post_id)
            return Fate.REFUSED
        return Fate.POSTPONED


def post_in(raw: bytes) -> Post | None:
    """The post of a letter: a line as it came, or a post that was read and could not be stored."""
    parsed = parse_line(raw)
    if isinstance(parsed, Post):
        return parsed
    try:
        # The standard library takes the half pairs that orjson refuses; storing replaces them.
        fields: Any = json.loads(raw)
        payload = fields["payload"] or {}
        lang = (payload.get("data") or {}).get("lang")
        return Post(
            post_id=fields["post_id"],
            author_id=fields["author_id"],
            text=fields["text"],
            created_at=datetime.fromisoformat(fields["created_at"]),
            lang=lang if isinstance(lang, str) else None,
            rule_tags=message_tags(payload),
            payload=payload,
        )
    except (ValueError, TypeError, KeyError, AttributeError):
        return None
