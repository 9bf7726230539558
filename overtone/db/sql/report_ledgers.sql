-- $1 and $2 the times between which rows were made; letters that wait are all that there are.
SELECT
    (SELECT count(*) FROM overtone.dead_letters WHERE first_seen_at >= $1 AND first_seen_at < $2) AS new_letters,
    (SELECT count(*) FROM overtone.dead_letters) AS waiting_letters,
    (SELECT count(*) FROM overtone.deleted_posts WHERE deleted_at >= $1 AND deleted_at < $2) AS erased_posts,
    (SELECT count(*) FROM overtone.deleted_authors WHERE deleted_at >= $1 AND deleted_at < $2) AS erased_authors
