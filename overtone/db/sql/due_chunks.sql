-- Chunks to give to the broker: of each job the first $1 that are open, less those that somebody holds and those that
-- were queued within the last $2 seconds. The caller holds the lock that lets one do this at a time.
WITH due AS (
    SELECT c.job_id, c.number, j.kind
    FROM overtone.jobs j
    CROSS JOIN LATERAL (
        SELECT o.job_id, o.number, o.queued_at, o.held_until FROM overtone.job_chunks o
        WHERE o.job_id = j.job_id AND o.done_at IS NULL
        ORDER BY o.number LIMIT $1
    ) c
    WHERE j.state IN ('queued', 'running')
      AND CASE WHEN c.held_until IS NOT NULL THEN c.held_until < now()
               ELSE c.queued_at IS NULL OR c.queued_at < now() - make_interval(secs => $2) END
)
UPDATE overtone.job_chunks c SET queued_at = now(), holder = NULL, held_until = NULL
FROM due
WHERE c.job_id = due.job_id AND c.number = due.number
  AND c.done_at IS NULL AND (c.held_until IS NULL OR c.held_until < now())
RETURNING c.job_id, c.number, due.kind
