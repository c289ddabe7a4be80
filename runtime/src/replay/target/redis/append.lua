-- Appends a batch and moves the mark, only if the mark is where this process last saw it, and the streams are as it left them.
-- KEYS: the mark, then the streams. ARGV: attempt, resume token the mark must have ('' for none), resume token, count of records, count of those that
-- the filter left out, and first time that it gets, the range or '' to leave it, the job, then for each record: index of its stream in KEYS, entry id, position, key, value,
-- topic, partition, offset.
-- Returns {'ok'}, {'mark', attempt, resume token} when the mark is elsewhere, {'foreign', stream, its last id, our last id or ''} when somebody else
-- wrote to a stream, or {'lost', stream} when a stream that was written to is gone.
-- All or nothing: Redis refuses for want of memory before the first write of a script, never after it.
-- The mark's fields: attempt, range, resume, delivered, filtered, firstTime, and for each stream `last:NAME`, the id of our last entry.
local FIRST = 9
local mark = redis.call('HMGET', KEYS[1], 'attempt', 'resume')
if mark[1] ~= ARGV[1] or (mark[2] or '') ~= ARGV[2] then
  return {'mark', mark[1] or '', mark[2] or ''}
end

for k = 2, #KEYS do
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

local last = {}
for i = FIRST, #ARGV, 8 do
  local k, id = tonumber(ARGV[i]), ARGV[i + 1]
  redis.call('XADD', KEYS[k], id, 'position', ARGV[i + 2], 'key', ARGV[i + 3], 'value', ARGV[i + 4],
    'meander-replay-job', ARGV[8], 'meander-replay-attempt', ARGV[1],
    'meander-replay-topic', ARGV[i + 5], 'meander-replay-partition', ARGV[i + 6], 'meander-replay-offset', ARGV[i + 7])
  last[k] = id
end
for k, id in pairs(last) do
  redis.call('HSET', KEYS[1], 'last:' .. KEYS[k], id)
end
redis.call('HSET', KEYS[1], 'resume', ARGV[3], 'delivered', ARGV[4], 'filtered', ARGV[5], 'firstTime', ARGV[6])
if ARGV[7] ~= '' then
  redis.call('HSET', KEYS[1], 'range', ARGV[7])
end
return {'ok'}
