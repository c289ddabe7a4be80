-- Sets the count of records, forgets what the field `accept` allowed, and notes phantoms.
-- KEYS: the mark. ARGV: generation, position and `accept` ('' for none) that the mark must have, count of records that it gets, ids of
-- phantoms or ''.
-- Returns 1, or 0 when the mark is not as this writer saw it.
local mark = redis.call('HMGET', KEYS[1], 'generation', 'position', 'accept')
if mark[1] ~= ARGV[1] or (mark[2] or '') ~= ARGV[2] or (mark[3] or '') ~= ARGV[3] then
  return 0
end
redis.call('HSET', KEYS[1], 'records', ARGV[4])
redis.call('HDEL', KEYS[1], 'accept')
if ARGV[5] ~= '' then
  local known = redis.call('HGET', KEYS[1], 'phantoms')
  redis.call('HSET', KEYS[1], 'phantoms', known and known .. ', ' .. ARGV[5] or ARGV[5])
end
return 1
