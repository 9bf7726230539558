SELECT p.post_id, p.text
FROM overtone.posts p
WHERE p.post_id > $1
  AND NOT EXISTS (
      SELECT FROM overtone.predictions q
      WHERE q.post_id = p.post_id AND q.post_id > $1 AND ($2::text IS NULL OR q.model_version = $2)
  )
ORDER BY p.post_id
LIMIT $3
