-- Counts changes that are gone for good as if they were here, because somebody said so in the field `accept`.
-- KEYS: the mark. ARGV: generation, position the mark must have, how many are gone, count of changes with them.
-- Returns 1, or 0 when the mark is not as this writer saw it.
local mark = redis.call('HMGET', KEYS[1], 'generation', 'position', 'accept')
if mark[1] ~= ARGV[1] or (mark[2] or '') ~= ARGV[2] or mark[3] ~= ARGV[3] then
  return 0
end
redis.call('HSET', KEYS[1], 'events', ARGV[4])
redis.call('HDEL', KEYS[1], 'accept')
return 1
