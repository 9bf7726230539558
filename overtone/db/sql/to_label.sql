-- $1 the first post id, $2 rows of each kind. Least certain: by the newest prediction. Most disagreeing: versions of the
-- model that gave a post different labels, the surest of them first, and posts that people labelled differently.
WITH stored AS NOT MATERIALIZED (
    SELECT p.post_id, p.text FROM overtone.posts p
    WHERE p.post_id >= $1
      AND NOT EXISTS (SELECT FROM overtone.deleted_posts d WHERE d.post_id = p.post_id)
      AND NOT EXISTS (SELECT FROM overtone.deleted_authors a WHERE a.author_id = p.author_id)
), newest AS (
    SELECT DISTINCT ON (q.post_id) q.post_id, q.label, q.confidence, q.model_version
    FROM overtone.predictions q JOIN stored USING (post_id)
    WHERE q.post_id >= $1
    ORDER BY q.post_id, q.stored_at DESC
), unlabelled AS (
    SELECT n.* FROM newest n
    WHERE NOT EXISTS (SELECT FROM overtone.feedback f WHERE f.post_id = n.post_id)
), uncertain AS (
    SELECT post_id, 'uncertain' AS reason FROM unlabelled ORDER BY confidence, post_id LIMIT $2
), versions AS (
    SELECT q.post_id, 'versions disagree' AS reason
    FROM overtone.predictions q JOIN unlabelled USING (post_id)
    WHERE q.post_id >= $1
    GROUP BY q.post_id HAVING count(DISTINCT q.label) > 1
    ORDER BY min(q.confidence) DESC, q.post_id LIMIT $2
), people AS (
    SELECT f.post_id, 'annotators disagree' AS reason
    FROM overtone.feedback f JOIN stored USING (post_id)
    GROUP BY f.post_id HAVING count(DISTINCT f.label) > 1
    ORDER BY count(*) DESC, f.post_id LIMIT $2
), chosen AS (
    SELECT post_id, min(reason) AS reason
    FROM (SELECT * FROM people UNION ALL SELECT * FROM versions UNION ALL SELECT * FROM uncertain) every
    GROUP BY post_id
)
SELECT c.post_id, s.text, n.label AS predicted_label, n.confidence, n.model_version, c.reason
FROM chosen c
JOIN stored s USING (post_id)
LEFT JOIN newest n USING (post_id)
ORDER BY c.reason, n.confidence, c.post_id
