"""What an earlier process of this machine left on disk, stored by a standby.

The leader has opened a gap over the time in question, so the marks of connections mean nothing here: lines alone count,
and they move no cursor. Where search cannot fill the gap this is the only copy.
"""

import asyncio
from collections.abc import Sequence

from ingest.backlog import Backlog
from ingest.parse import Bad, parse_line
from ingest.store import PostStore
from ingest.waiting import until_it_works
from overtone.logging import get_logger
from overtone.schema import Post

_BATCH_EVENTS = 500

_log = get_logger()


async def salvage(backlogs: Sequence[Backlog], store: PostStore, *, stream: str) -> int:
    """Store the lines of `backlogs` as coming from `stream`, and return how many were posts; then the disk is free."""
    posts = 0
    for backlog in backlogs:
        while not backlog.is_empty:
            batch = await backlog.peek(_BATCH_EVENTS)
            posts += await _store(store, [event for event in batch.events if isinstance(event, bytes)], stream)
            await backlog.drop(batch, len(batch.events))
    if posts:
        _log.info("spool.salvaged", posts=posts)
    return posts


async def _store(store: PostStore, lines: Sequence[bytes], stream: str) -> int:
    parsed = await asyncio.to_thread(lambda: [parse_line(line) for line in lines])
    posts = [one for one in parsed if isinstance(one, Post)]
    await store.store(posts, stream=stream)
    for bad in parsed:
        if isinstance(bad, Bad):
            await until_it_works(lambda bad=bad: store.put_aside(bad), store.note)  # type: ignore[misc]
    return len(posts)
