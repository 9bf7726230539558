-- $1 whether posts of the stream join, $2 when labels were last counted. As `training_labels` picks them.
SELECT now() AS counted_at, count(*) AS total, min(f.created_at) AS first_at,
    count(*) FILTER (WHERE $2::timestamptz IS NULL OR f.created_at > $2) AS fresh
FROM overtone.feedback f
LEFT JOIN overtone.posts p ON p.post_id = f.post_id
WHERE f.created_at <= now()
  AND (f.post_id IS NULL OR ($1 AND p.post_id IS NOT NULL))
  AND NOT EXISTS (SELECT FROM overtone.deleted_posts d WHERE d.post_id = f.post_id)
  AND NOT EXISTS (SELECT FROM overtone.deleted_authors a WHERE a.author_id = p.author_id)
