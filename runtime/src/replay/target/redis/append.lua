-- Appends a batch and moves the mark, only if the mark is where this process last saw it, and the streams are as it left them.
-- KEYS: the mark, then the streams. ARGV: attempt, resume token the mark must have ('' for none), resume token and place that it gets, the range or '' to leave
-- it, the job, then for each record: index of its stream in KEYS, entry id, position, key, value, topic, partition, offset, how many arguments its headers take,
-- and of each header name and value.
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
  local k, id, record, headers = tonumber(ARGV[i]), ARGV[i + 1], i + 2, i + 9
  i = headers + ARGV[i + 8]
  redis.call('XADD', KEYS[k], id, 'position', ARGV[record], 'key', ARGV[record + 1], 'value', ARGV[record + 2],
    'meander-replay-job', ARGV[6], 'meander-replay-attempt', ARGV[1],
    'meander-replay-topic', ARGV[record + 3], 'meander-replay-partition', ARGV[record + 4], 'meander-replay-offset', ARGV[record + 5],
    unpack(ARGV, headers, i - 1))
  last[k] = id
end
remember(last)
redis.call('HSET', KEYS[1], 'resume', ARGV[3], 'reached', ARGV[4])
if ARGV[5] ~= '' then
  redis.call('HSET', KEYS[1], 'range', ARGV[5])
end
return {'ok'}
