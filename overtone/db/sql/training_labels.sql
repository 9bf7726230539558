-- $1 whether posts of the stream join, $2 the last id of the page before, $3 rows a page, $4 the newest id.
SELECT f.id, f.label, coalesce(f.text, p.text) AS text, f.post_id, p.author_id,
    f.annotator, coalesce(f.key_id, '') AS key_id
FROM overtone.feedback f
LEFT JOIN overtone.posts p ON p.post_id = f.post_id
WHERE f.id > $2 AND f.id <= $4
  AND (f.post_id IS NULL OR ($1 AND p.post_id IS NOT NULL))
  AND NOT EXISTS (SELECT FROM overtone.deleted_posts d WHERE d.post_id = f.post_id)
  AND NOT EXISTS (SELECT FROM overtone.deleted_authors a WHERE a.author_id = p.author_id)
ORDER BY f.id
LIMIT $3
