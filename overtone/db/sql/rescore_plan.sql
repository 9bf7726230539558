-- $1 and $2 post ids between which to look, $3 posts looked at, $4 model version, $5 posts a slice.
-- One row a slice of what lacks a prediction by that version, and one, without a slice, of all that was looked at.
WITH looked AS (
    SELECT p.post_id, p.author_id
    FROM overtone.posts p
    WHERE p.post_id > $1 AND p.post_id < $2
    ORDER BY p.post_id
    LIMIT $3
), lacking AS (
    SELECT l.post_id, (row_number() OVER (ORDER BY l.post_id) - 1) / $5 AS slice
    FROM looked l
    WHERE NOT EXISTS (
              SELECT FROM overtone.predictions q
              WHERE q.post_id = l.post_id AND q.post_id > $1 AND q.post_id < $2 AND q.model_version = $4
          )
      AND NOT EXISTS (SELECT FROM overtone.deleted_posts d WHERE d.post_id = l.post_id)
      AND NOT EXISTS (SELECT FROM overtone.deleted_authors a WHERE a.author_id = l.author_id)
)
SELECT slice, min(post_id) AS first, max(post_id) AS last, count(*) AS posts FROM lacking GROUP BY slice
UNION ALL
SELECT NULL, min(post_id), max(post_id), count(*) FROM looked
ORDER BY slice NULLS LAST
