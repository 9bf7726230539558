-- Rows come sorted by post_id, so that two writers of the same posts wait for each other and never deadlock.
WITH stored AS (
    INSERT INTO overtone.posts (post_id, author_id, text, created_at, lang, rule_tags, payload, stream)
    SELECT r.post_id, r.author_id, r.text, r.created_at, r.lang,
           string_to_array(r.rule_tags, chr(31)), r.payload::jsonb, $8
    FROM unnest($1::bigint[], $2::bigint[], $3::text[], $4::timestamptz[], $5::text[], $6::text[], $7::text[])
        AS r (post_id, author_id, text, created_at, lang, rule_tags, payload)
    WHERE NOT EXISTS (SELECT FROM overtone.deleted_posts d WHERE d.post_id = r.post_id)
      AND NOT EXISTS (SELECT FROM overtone.deleted_authors a WHERE a.author_id = r.author_id)
    ON CONFLICT (post_id) DO NOTHING
    RETURNING post_id
)
SELECT count(*) FROM stored
