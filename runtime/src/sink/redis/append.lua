-- Appends a batch and moves the mark, only if the mark is where this writer last saw it, and the streams are as it left them.
-- KEYS: the mark, the claim, then the streams. ARGV: generation, pipeline, position the mark must have, position, timestamp and count of
-- records that it gets, length to keep or '', then for each run of records that go into one stream with as many headers: index of the stream
-- in KEYS, how many records, how many arguments the headers of each take, and for each record: entry id, position, key, value, and of each
-- header name and value. The last of a run trims its stream.
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
  local k, headers = tonumber(ARGV[i]), tonumber(ARGV[i + 2])
  local first, width = i + 3, 4 + headers
  local stream = KEYS[k]
  i = first + ARGV[i + 1] * width
  for r = first, i - 1, width do
    if ARGV[7] == '' or r + width < i then
      redis.call('XADD', stream, ARGV[r], 'position', ARGV[r + 1], 'key', ARGV[r + 2], 'value', ARGV[r + 3],
        unpack(ARGV, r + 4, r + 3 + headers))
    else
      redis.call('XADD', stream, 'MAXLEN', '~', ARGV[7], ARGV[r], 'position', ARGV[r + 1], 'key', ARGV[r + 2], 'value', ARGV[r + 3],
        unpack(ARGV, r + 4, r + 3 + headers))
    end
  end
  last[k] = ARGV[i - width]
end
remember(last)
redis.call('HSET', KEYS[1], 'position', ARGV[4], 'timestamp', ARGV[5], 'records', ARGV[6])
redis.call('HDEL', KEYS[1], 'accept')
return {'ok', mark[3] or ''}
