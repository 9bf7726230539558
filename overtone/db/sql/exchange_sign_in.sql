-- $1 digest of the token, $2 key_id and $3 digest of the new session, $4 its lifetime in seconds.
WITH used AS (
    UPDATE overtone.api_keys SET revoked_at = now()
    WHERE digest = $1 AND kind = 'sign_in' AND revoked_at IS NULL AND expires_at > now()
    RETURNING key_id, name, scopes
)
INSERT INTO overtone.api_keys (key_id, kind, name, digest, scopes, parent_id, expires_at)
SELECT $2, 'session', name, $3, scopes, key_id, now() + make_interval(secs => $4) FROM used
RETURNING key_id, parent_id
