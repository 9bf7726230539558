-- No row comes back when a leader with a higher epoch has been here: the caller's transaction must not commit.
INSERT INTO overtone.stream_cursor AS c (stream, post_id, epoch, moved_at)
VALUES ($1, $2, coalesce($3, 0), now())
ON CONFLICT (stream) DO UPDATE
SET post_id = greatest(c.post_id, excluded.post_id), epoch = greatest(c.epoch, excluded.epoch), moved_at = now()
WHERE $3::bigint IS NULL OR c.epoch <= $3
RETURNING c.epoch
