-- Appends a batch and moves the mark, only if the mark is where this writer last saw it.
-- KEYS: the mark, then the streams. ARGV: generation, position the mark must have, position it gets, length to keep or '',
-- then for each record: index of its stream in KEYS, entry id, position, key, value.
-- Returns {'ok'}, {'mark', generation, position} when the mark is elsewhere, or {'foreign', stream}.
local mark = redis.call('HMGET', KEYS[1], 'generation', 'position')
if mark[1] ~= ARGV[1] or (mark[2] or '') ~= ARGV[2] then
  return {'mark', mark[1] or '', mark[2] or ''}
end
for i = 5, #ARGV, 5 do
  local stream, id = KEYS[tonumber(ARGV[i])], ARGV[i + 1]
  local added
  if ARGV[4] == '' then
    added = redis.pcall('XADD', stream, id, 'position', ARGV[i + 2], 'key', ARGV[i + 3], 'value', ARGV[i + 4])
  else
    added = redis.pcall('XADD', stream, 'MAXLEN', '~', ARGV[4], id, 'position', ARGV[i + 2], 'key', ARGV[i + 3], 'value', ARGV[i + 4])
  end
  if type(added) == 'table' and added.err then
    -- An id that is not greater than the last: ours from an append that was cut short, if the very same entry is there.
    local there = redis.call('XRANGE', stream, id, id)
    if #there ~= 1 or there[1][2][2] ~= ARGV[i + 2] then
      if string.find(added.err, 'equal or smaller', 1, true) then
        return {'foreign', stream}
      end
      return added
    end
  end
end
redis.call('HSET', KEYS[1], 'position', ARGV[3])
return {'ok'}
