SELECT p.post_id, p.text, p.created_at, q.label, q.confidence, q.model_version
FROM (
    SELECT post_id, text, created_at FROM overtone.posts ORDER BY post_id DESC LIMIT $1
) p
LEFT JOIN LATERAL (
    SELECT label, confidence, model_version
    FROM overtone.predictions
    WHERE post_id = p.post_id
    ORDER BY stored_at DESC
    LIMIT 1
) q ON true
ORDER BY p.post_id DESC
