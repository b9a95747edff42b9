-- The mark of the spool (relay/spool/mark.py).

-- name: advance
UPDATE spool SET mark = mark + 1 RETURNING mark;
