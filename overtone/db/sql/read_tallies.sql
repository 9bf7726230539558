-- The sums over all minutes come with a null minute.
SELECT kind, nullif(minute, '-infinity') AS minute, label, count, now() AS now
FROM overtone.tallies
WHERE kind IN ('posts', 'predictions')
  AND (minute = '-infinity' OR minute > date_trunc('minute', now(), 'UTC') - make_interval(mins => $1))
ORDER BY kind, minute, label
