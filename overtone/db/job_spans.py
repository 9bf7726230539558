"""Jobs over stored posts, whose chunks are spans of post ids: planned by their first chunk, then done span by span."""

from collections.abc import Sequence

import orjson

from overtone.db.database import Database
from overtone.db.jobs import ChunkName, Finished, State, count_chunk, finishing
from overtone.db.predictions import insert_predictions
from overtone.db.rescoring import Plan
from overtone.schema import Prediction


async def plan_job(db: Database, name: ChunkName, model_version: str, plan: Plan) -> State | None:
    """Make the slices of `plan`, the newest posts first, the chunks that follow `name`, and count that as done.

    The job's state then: it has succeeded if there is nothing to do. None if it was planned before or has ended.

    Raises:
        DatabaseUnavailableError: it is not planned, or the answer was lost; do it again.
    """
    newest_first = plan.slices[::-1]
    outcome = {"model_version": model_version, "looked_at": plan.stored, "written": 0}
    async with finishing(db, name) as connection:
        if connection is None:
            return None
        await connection.execute(
            "INSERT INTO overtone.job_chunks (job_id, number, items, first_post_id, last_post_id)"
            " SELECT $1, $2 + place, items, first, last"
            " FROM unnest($3::int[], $4::bigint[], $5::bigint[]) WITH ORDINALITY AS s (items, first, last, place)",
            name.job_id,
            name.number,
            [one.posts for one in newest_first],
            [one.first for one in newest_first],
            [one.last for one in newest_first],
        )
        state: State = await connection.fetchval(
            "UPDATE overtone.jobs SET total = $2, result = coalesce(result, '{}') || jsonb_build_object('outcome',"
            " $3::jsonb), state = CASE $2::bigint WHEN 0 THEN 'succeeded' ELSE 'running' END,"
            " finished_at = CASE $2::bigint WHEN 0 THEN now() END WHERE job_id = $1 RETURNING state",
            name.job_id,
            plan.posts,
            orjson.dumps(outcome).decode(),
        )
    return state


async def finish_span(
    db: Database, name: ChunkName, done: Finished, predictions: Sequence[tuple[int, Prediction]]
) -> State | None:
    """Store the predictions (post id, prediction) of a span and count it, all or nothing; the job's state then.

    What was erased is not stored; see `overtone.db.predictions`. None, and nothing stored, if the span was done before
    or the job has ended.

    Raises:
        DatabaseUnavailableError: the span is not counted, or the answer was lost; do it again.
    """
    async with finishing(db, name) as connection:
        if connection is None:
            return None
        written = await insert_predictions(connection, predictions)
        await connection.execute(
            "UPDATE overtone.jobs SET result = jsonb_set(result, '{outcome,written}',"
            " to_jsonb((result #>> '{outcome,written}')::bigint + $2)) WHERE job_id = $1",
            name.job_id,
            written,
        )
        return await count_chunk(connection, name, done)
