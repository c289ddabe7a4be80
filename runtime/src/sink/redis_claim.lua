-- Makes this writer the owner of the mark, only if the mark is as it was read.
-- KEYS: the mark. ARGV: generation and position as read ('' for none), generation to set.
local mark = redis.call('HMGET', KEYS[1], 'generation', 'position')
if (mark[1] or '') ~= ARGV[1] or (mark[2] or '') ~= ARGV[2] then
  return 0
end
redis.call('HSET', KEYS[1], 'generation', ARGV[3])
return 1
