-- $1 job, $2 number, $3 holder, $4 seconds. No row: it is done, somebody holds it, or the job has ended.
UPDATE overtone.job_chunks c
SET holder = $3, held_until = now() + make_interval(secs => $4), attempts = c.attempts + 1
FROM overtone.jobs j
WHERE c.job_id = $1 AND c.number = $2 AND j.job_id = c.job_id AND j.state IN ('queued', 'running')
  AND c.done_at IS NULL AND (c.held_until IS NULL OR c.held_until < now())
RETURNING c.items, c.attempts, j.kind, j.parameters, c.first_post_id, c.last_post_id
