-- Appends a batch and moves the mark, only if the mark is where this writer last saw it, and the streams are as it left them.
-- KEYS: the mark, the claim, then the streams. ARGV: generation, pipeline, position the mark must have, position, timestamp and count of
-- records that it gets, length to keep or '', then for each record: index of its stream in KEYS, entry id, position, key, value, how many
-- arguments its headers take, and of each header name and value.
-- Returns {'ok', phantoms}, {'claimed', pipeline} when the streams' prefix is another's, {'mark', generation, position} when the mark is
-- elsewhere, or what streams.lua says of a stream that is not as it was left.
-- All or nothing: Redis refuses for want of memory before the first write of a script, never after it.
-- The mark's fields: generation, position, timestamp, records, for each stream `last:NAME`, the id of our last entry, `accept`, by
-- which a person allows a gap at this position, and `phantoms`, the ids of entries that stand for nothing, until a person removes it.
local FIRST, STREAMS = 8, 3
local holder = redis.call('HGET', KEYS[2], 'pipeline')
if holder and holder ~= '' and holder ~= ARGV[2] then
  return {'claimed', holder}
end
local mark = redis.call('HMGET', KEYS[1], 'generation', 'position', 'phantoms')
if mark[1] ~= ARGV[1] or (mark[2] or '') ~= ARGV[3] then
  return {'mark', mark[1] or '', mark[2] or ''}
end
local answer = any_disturbed(STREAMS)
if answer then return answer end

if holder ~= ARGV[2] then
  redis.call('HSET', KEYS[2], 'pipeline', ARGV[2])
end
local last, i = {}, FIRST
while i <= #ARGV do
  local k, id, record, headers = tonumber(ARGV[i]), ARGV[i + 1], i + 2, i + 6
  i = headers + ARGV[i + 5]
  if ARGV[7] == '' then
    redis.call('XADD', KEYS[k], id, 'position', ARGV[record], 'key', ARGV[record + 1], 'value', ARGV[record + 2],
      unpack(ARGV, headers, i - 1))
  else
    redis.call('XADD', KEYS[k], 'MAXLEN', '~', ARGV[7], id, 'position', ARGV[record], 'key', ARGV[record + 1], 'value', ARGV[record + 2],
      unpack(ARGV, headers, i - 1))
  end
  last[k] = id
end
remember(last)
redis.call('HSET', KEYS[1], 'position', ARGV[4], 'timestamp', ARGV[5], 'records', ARGV[6])
redis.call('HDEL', KEYS[1], 'accept')
return {'ok', mark[3] or ''}
