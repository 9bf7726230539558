-- $1 and $2 the times between which they were stored. Of each partition only the blocks of that time are read.
SELECT count(*) AS posts FROM overtone.posts WHERE stored_at >= $1 AND stored_at < $2
