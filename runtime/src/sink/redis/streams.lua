-- What every script has before it that looks at streams and appends to them. KEYS[1] is the mark: its field `last:NAME` is the id of our last
-- entry in the stream NAME.

-- What to answer when a stream does not end with our last entry (false where there is none): {'foreign', stream, its last id, our last id or
-- ''} when somebody else wrote to it, or {'lost', stream} when it is gone.
local function disturbed(stream, known)
  local found = false
  if redis.call('EXISTS', stream) == 1 then
    local info = redis.call('XINFO', 'STREAM', stream)
    for i = 1, #info, 2 do
      if info[i] == 'last-generated-id' then found = info[i + 1] end
    end
  end
  if known and not found then
    return {'lost', stream}
  end
  if found ~= known then
    return {'foreign', stream, found, known or ''}
  end
end

-- The same of all streams among the keys.
local function any_disturbed(first)
  for k = first, #KEYS do
    local answer = disturbed(KEYS[k], redis.call('HGET', KEYS[1], 'last:' .. KEYS[k]))
    if answer then return answer end
  end
end

-- Keeps the ids of our last entries, each under the index of its stream.
local function remember(last)
  for k, id in pairs(last) do
    redis.call('HSET', KEYS[1], 'last:' .. KEYS[k], id)
  end
end

