INSERT INTO overtone.dead_letters AS d (digest, raw, reason, post_id)
SELECT DISTINCT ON (sha256(r.raw)) sha256(r.raw), r.raw, r.reason, r.post_id
FROM unnest($1::bytea[], $2::text[], $3::bigint[]) AS r (raw, reason, post_id)
ORDER BY sha256(r.raw)
ON CONFLICT (digest) DO UPDATE
SET attempts = d.attempts + 1, last_seen_at = now(), reason = excluded.reason
