-- $1 the first post id, $2 the one after the last, $3 slices of that span, $4 rows of each, $5 model version or null,
-- $6 buckets of confidence. The first rows of each slice: what it costs does not grow with the stream.
SELECT p.model_version, p.label, least(width_bucket(p.confidence::float8, 0, 1, $6), $6) AS bucket,
    count(*) AS count, sum(p.confidence::float8) AS confidence
FROM generate_series(0, $3::bigint - 1) AS s (slice)
CROSS JOIN LATERAL (
    SELECT q.model_version, q.label, q.confidence FROM overtone.predictions q
    WHERE q.post_id >= $1::bigint + s.slice * (($2::bigint - $1) / $3)
      AND q.post_id < $1 + (s.slice + 1) * (($2 - $1) / $3)
      AND ($5::text IS NULL OR q.model_version = $5)
    ORDER BY q.post_id LIMIT $4
) p
GROUP BY 1, 2, 3
