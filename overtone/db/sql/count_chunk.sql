-- $1 job, $2 items done, $3 of them failed, $4 their problems, of which a job shows the first $5.
UPDATE overtone.jobs
SET done = done + $2,
    failed = failed + $3,
    result = CASE WHEN jsonb_array_length($4::jsonb) = 0 THEN result ELSE jsonb_build_object('problems', (
        SELECT jsonb_agg(p ORDER BY (p ->> 'line')::bigint) FROM (
            SELECT p FROM jsonb_array_elements(coalesce(result -> 'problems', '[]') || $4::jsonb) AS p
            ORDER BY (p ->> 'line')::bigint LIMIT $5
        ) AS first
    )) END,
    state = CASE WHEN done + $2 >= total THEN 'succeeded' ELSE 'running' END,
    finished_at = CASE WHEN done + $2 >= total THEN now() END
WHERE job_id = $1
RETURNING state
