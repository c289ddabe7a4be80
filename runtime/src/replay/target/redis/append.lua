-- Appends a batch and moves the mark, only if the mark is where this process last saw it, and the streams are as it left them.
-- KEYS: the mark, then the streams. ARGV: attempt, resume token the mark must have ('' for none), resume token and place that it gets, the range or '' to leave
-- it, the job, then for each run of records that go into one stream with as many headers: index of the stream in KEYS, its topic, how many records, how many
-- arguments the headers of each take, and for each record: entry id, position, key, value, partition, offset, and of each header name and value.
-- Returns {'ok'}, {'mark', attempt, resume token} when the mark is elsewhere, or what streams.lua says of a stream that is not as it was left.
-- All or nothing: Redis refuses for want of memory before the first write of a script, never after it.
-- The mark's fields: attempt, range, resume, reached, and for each stream `last:NAME`, the id of our last entry.
local FIRST, STREAMS = 7, 2
local mark = redis.call('HMGET', KEYS[1], 'attempt', 'resume')
if mark[1] ~= ARGV[1] or (mark[2] or '') ~= ARGV[2] then
  return {'mark', mark[1] or '', mark[2] or ''}
end
local answer = any_disturbed(STREAMS)
if answer then return answer end

local last, i = {}, FIRST
while i <= #ARGV do
  local k, topic, headers = tonumber(ARGV[i]), ARGV[i + 1], tonumber(ARGV[i + 3])
  local first, width = i + 4, 6 + headers
  local stream = KEYS[k]
  i = first + ARGV[i + 2] * width
  for r = first, i - 1, width do
    redis.call('XADD', stream, ARGV[r], 'position', ARGV[r + 1], 'key', ARGV[r + 2], 'value', ARGV[r + 3],
      'meander-replay-job', ARGV[6], 'meander-replay-attempt', ARGV[1],
      'meander-replay-topic', topic, 'meander-replay-partition', ARGV[r + 4], 'meander-replay-offset', ARGV[r + 5],
      unpack(ARGV, r + 6, r + 5 + headers))
  end
  last[k] = ARGV[i - width]
end
remember(last)
redis.call('HSET', KEYS[1], 'resume', ARGV[3], 'reached', ARGV[4])
if ARGV[5] ~= '' then
  redis.call('HSET', KEYS[1], 'range', ARGV[5])
end
return {'ok'}
