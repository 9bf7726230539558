-- $6 and $7 bound the ids, so that only the partitions that hold them are looked at.
WITH stored AS (
    INSERT INTO overtone.predictions (post_id, model_version, label, confidence, scores)
    SELECT r.post_id, r.model_version, r.label, r.confidence, r.scores::jsonb
    FROM unnest($1::bigint[], $2::text[], $3::text[], $4::real[], $5::text[])
        AS r (post_id, model_version, label, confidence, scores)
    WHERE EXISTS (SELECT FROM overtone.posts p WHERE p.post_id = r.post_id AND p.post_id BETWEEN $6 AND $7)
      AND NOT EXISTS (SELECT FROM overtone.deleted_posts d WHERE d.post_id = r.post_id)
    ON CONFLICT (post_id, model_version) DO NOTHING
    RETURNING label
)
SELECT label, count(*) AS count FROM stored GROUP BY label ORDER BY label
