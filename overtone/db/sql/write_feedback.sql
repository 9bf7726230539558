-- $8 key, $9 source. The caller holds the lock that keeps out erasures.
INSERT INTO overtone.feedback AS f
    (post_id, text, subject, label, predicted_label, model_version, annotator, key_id, source)
SELECT r.post_id, r.text, r.subject, r.label, coalesce(r.predicted_label, q.label),
    coalesce(r.model_version, q.model_version), r.annotator, $8, $9
FROM unnest($1::bigint[], $2::text[], $3::bytea[], $4::text[], $5::text[], $6::text[], $7::text[])
    AS r (post_id, text, subject, label, predicted_label, model_version, annotator)
LEFT JOIN LATERAL (
    SELECT p.label, p.model_version FROM overtone.predictions p
    WHERE p.post_id = r.post_id ORDER BY p.stored_at DESC LIMIT 1
) q ON true
WHERE r.post_id IS NULL OR (
    EXISTS (
        SELECT FROM overtone.posts p
        WHERE p.post_id = r.post_id
          AND NOT EXISTS (SELECT FROM overtone.deleted_authors a WHERE a.author_id = p.author_id)
    )
    AND NOT EXISTS (SELECT FROM overtone.deleted_posts d WHERE d.post_id = r.post_id)
)
ON CONFLICT (key_id, annotator, subject) DO UPDATE
SET label = EXCLUDED.label, predicted_label = EXCLUDED.predicted_label, model_version = EXCLUDED.model_version,
    source = EXCLUDED.source, created_at = now()
WHERE f.label <> EXCLUDED.label
RETURNING f.id, f.subject, f.annotator, f.xmax = 0 AS is_new
