-- $1 and $2 the times between which they were asked for.
SELECT state, count(*) AS jobs FROM overtone.jobs WHERE created_at >= $1 AND created_at < $2 GROUP BY state ORDER BY state
