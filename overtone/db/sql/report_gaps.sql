-- $1 and $2: gaps that were open at any time between, and the seconds of each that lie between.
SELECT state, count(*) AS gaps, sum(repaired_posts) AS repaired_posts,
    sum(extract(epoch FROM least(coalesce(ended_at, $2), $2) - greatest(started_at, $1)))::float8 AS seconds
FROM overtone.stream_gaps
WHERE started_at < $2 AND coalesce(ended_at, $2) >= $1
GROUP BY state
ORDER BY state
