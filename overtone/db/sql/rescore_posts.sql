-- $1 and $2 the first and the last post id, $3 model version.
SELECT p.post_id, p.text
FROM overtone.posts p
WHERE p.post_id BETWEEN $1 AND $2
  AND NOT EXISTS (
      SELECT FROM overtone.predictions q
      WHERE q.post_id = p.post_id AND q.post_id BETWEEN $1 AND $2 AND q.model_version = $3
  )
  AND NOT EXISTS (SELECT FROM overtone.deleted_posts d WHERE d.post_id = p.post_id)
  AND NOT EXISTS (SELECT FROM overtone.deleted_authors a WHERE a.author_id = p.author_id)
ORDER BY p.post_id
