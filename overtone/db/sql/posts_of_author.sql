-- $1 author, $2 the last post id of the page before, $3 rows a page.
SELECT p.post_id, p.created_at, p.stored_at, p.text, p.lang, p.rule_tags, p.payload::text AS payload,
    coalesce((
        SELECT jsonb_agg(jsonb_build_object('label', q.label, 'confidence', q.confidence, 'scores', q.scores,
            'model_version', q.model_version, 'stored_at', q.stored_at) ORDER BY q.stored_at)
        FROM overtone.predictions q WHERE q.post_id = p.post_id
    ), '[]')::text AS predictions,
    coalesce((
        SELECT jsonb_agg(jsonb_build_object('label', f.label, 'predicted_label', f.predicted_label,
            'model_version', f.model_version, 'created_at', f.created_at) ORDER BY f.id)
        FROM overtone.feedback f WHERE f.post_id = p.post_id
    ), '[]')::text AS feedback
FROM overtone.posts p
WHERE p.author_id = $1 AND p.post_id > $2
ORDER BY p.post_id
LIMIT $3
