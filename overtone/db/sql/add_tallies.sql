-- Adds to the running minute and to the sum over all minutes, always in the order of the primary key.
INSERT INTO overtone.tallies AS t (kind, minute, label, count)
SELECT $1, m.minute, r.label, r.count
FROM (VALUES ('-infinity'::timestamptz), (date_trunc('minute', now(), 'UTC'))) AS m (minute)
CROSS JOIN unnest($2::text[], $3::bigint[]) AS r (label, count)
ORDER BY m.minute, r.label
ON CONFLICT (kind, minute, label) DO UPDATE SET count = t.count + excluded.count
