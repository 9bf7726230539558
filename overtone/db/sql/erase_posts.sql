-- One snapshot serves every part: the caller holds the erasure lock, so no writer is under way.
WITH ids AS (
    SELECT DISTINCT post_id FROM unnest($1::bigint[]) AS r (post_id)
), tombstones AS (
    INSERT INTO overtone.deleted_posts (post_id, reason) SELECT post_id, $2 FROM ids ON CONFLICT DO NOTHING
), gone_posts AS (
    DELETE FROM overtone.posts USING ids WHERE posts.post_id = ids.post_id RETURNING posts.stored_at
), gone_predictions AS (
    DELETE FROM overtone.predictions USING ids
    WHERE predictions.post_id = ids.post_id RETURNING predictions.stored_at, predictions.label
), gone_feedback AS (
    DELETE FROM overtone.feedback USING ids WHERE feedback.post_id = ids.post_id RETURNING 1
), gone_letters AS (
    DELETE FROM overtone.dead_letters USING ids WHERE dead_letters.post_id = ids.post_id RETURNING 1
), lost AS (
    SELECT 'posts' AS kind, date_trunc('minute', stored_at, 'UTC') AS minute, '' AS label FROM gone_posts
    UNION ALL
    SELECT 'predictions', date_trunc('minute', stored_at, 'UTC'), label FROM gone_predictions
), changes AS (
    SELECT kind, minute, label, count(*) AS count FROM lost GROUP BY kind, minute, label
    UNION ALL
    SELECT kind, '-infinity', label, count(*) FROM lost GROUP BY kind, label
), tallied AS (
    UPDATE overtone.tallies t SET count = t.count - c.count
    FROM changes c WHERE t.kind = c.kind AND t.minute = c.minute AND t.label = c.label
)
SELECT
    (SELECT count(*) FROM gone_posts) AS posts,
    (SELECT count(*) FROM gone_predictions) AS predictions,
    (SELECT count(*) FROM gone_feedback) AS feedback,
    (SELECT count(*) FROM gone_letters) AS dead_letters
