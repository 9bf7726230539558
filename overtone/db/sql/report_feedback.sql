-- $1 and $2 the times between which it was given. `compared` is what is known to be about a prediction.
SELECT model_version, count(*) AS given, count(predicted_label) AS compared,
    count(*) FILTER (WHERE label = predicted_label) AS agreeing
FROM overtone.feedback
WHERE created_at >= $1 AND created_at < $2
GROUP BY model_version
ORDER BY model_version NULLS LAST
