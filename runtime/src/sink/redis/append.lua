-- Appends a batch and moves the mark, only if the mark is where this writer last saw it, and the streams are as it left them.
-- KEYS: the mark, the claim, then the streams. ARGV: generation, pipeline, position the mark must have, position, timestamp and count of
-- records that it gets, length to keep or '', then for each record: index of its stream in KEYS, entry id, position, key, value.
-- Returns {'ok', phantoms}, {'claimed', pipeline} when the streams' prefix is another's, {'mark', generation, position} when the mark is
-- elsewhere, {'foreign', stream, its last id, our last id or ''} when somebody else wrote to a stream, or {'lost', stream} when a stream
-- that was written to is gone.
-- All or nothing: Redis refuses for want of memory before the first write of a script, never after it.
-- The mark's fields: generation, position, timestamp, records, for each stream `last:NAME`, the id of our last entry, `accept`, by
-- which a person allows a gap at this position, and `phantoms`, the ids of entries that stand for nothing, until a person removes it.
local FIRST, STREAMS = 8, 3
local holder = redis.call('HGET', KEYS[2], 'pipeline')
if holder and holder ~= ARGV[2] then
  return {'claimed', holder}
end
local mark = redis.call('HMGET', KEYS[1], 'generation', 'position', 'phantoms')
if mark[1] ~= ARGV[1] or (mark[2] or '') ~= ARGV[3] then
  return {'mark', mark[1] or '', mark[2] or ''}
end

for k = STREAMS, #KEYS do
  local known = redis.call('HGET', KEYS[1], 'last:' .. KEYS[k])
  local found = false
  if redis.call('EXISTS', KEYS[k]) == 1 then
    local info = redis.call('XINFO', 'STREAM', KEYS[k])
    for i = 1, #info, 2 do
      if info[i] == 'last-generated-id' then found = info[i + 1] end
    end
  end
  if known and not found then
    return {'lost', KEYS[k]}
  end
  if found ~= known then
    return {'foreign', KEYS[k], found, known or ''}
  end
end

if not holder then
  redis.call('HSET', KEYS[2], 'pipeline', ARGV[2])
end
local last = {}
for i = FIRST, #ARGV, 5 do
  local k, id = tonumber(ARGV[i]), ARGV[i + 1]
  if ARGV[7] == '' then
    redis.call('XADD', KEYS[k], id, 'position', ARGV[i + 2], 'key', ARGV[i + 3], 'value', ARGV[i + 4])
  else
    redis.call('XADD', KEYS[k], 'MAXLEN', '~', ARGV[7], id, 'position', ARGV[i + 2], 'key', ARGV[i + 3], 'value', ARGV[i + 4])
  end
  last[k] = id
end
for k, id in pairs(last) do
  redis.call('HSET', KEYS[1], 'last:' .. KEYS[k], id)
end
redis.call('HSET', KEYS[1], 'position', ARGV[4], 'timestamp', ARGV[5], 'records', ARGV[6])
redis.call('HDEL', KEYS[1], 'accept')
return {'ok', mark[3] or ''}
