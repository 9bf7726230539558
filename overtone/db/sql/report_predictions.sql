-- $1 and $2 the times between which they were stored, $3 what is little confidence. As with posts, by the time's blocks.
SELECT model_version, label, count(*) AS predictions, sum(confidence::float8) AS confidence,
    count(*) FILTER (WHERE confidence < $3::real) AS unsure
FROM overtone.predictions
WHERE stored_at >= $1 AND stored_at < $2
GROUP BY model_version, label
ORDER BY model_version, label
