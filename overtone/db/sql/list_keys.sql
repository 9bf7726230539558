-- $1 whether to list keys that have ended.
SELECT k.key_id, k.name, k.scopes, k.created_at, k.expires_at, k.revoked_at,
    CASE
        WHEN k.revoked_at IS NOT NULL THEN 'revoked'
        WHEN k.expires_at <= now() THEN 'expired'
        ELSE 'active'
    END AS state,
    (
        SELECT max(r.expires_at) FROM overtone.api_keys r
        WHERE r.parent_id = k.key_id AND r.kind = 'retired' AND r.revoked_at IS NULL AND r.expires_at > now()
    ) AS old_secret_until,
    k.requests_per_minute, k.texts_per_minute, k.texts_per_day
FROM overtone.api_keys k
WHERE k.kind = 'key' AND ($1 OR (k.revoked_at IS NULL AND (k.expires_at IS NULL OR k.expires_at > now())))
ORDER BY k.created_at
