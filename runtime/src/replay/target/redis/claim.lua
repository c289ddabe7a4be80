-- Makes this process the one that delivers the replay, and says how far it is.
-- KEYS: the mark of the replay, then the claims by which a pipeline would own the streams. ARGV: none.
-- Returns {'ok', attempt, range, reached}, each '' where the mark does not say it, or {'claimed', number of the claim from 0, pipeline}.
for k = 2, #KEYS do
  local owner = redis.call('HGET', KEYS[k], 'pipeline')
  if owner and owner ~= '' then
    return {'claimed', tostring(k - 2), owner}
  end
end
local attempt = redis.call('HINCRBY', KEYS[1], 'attempt', 1)
local mark = redis.call('HMGET', KEYS[1], 'range', 'reached')
return {'ok', tostring(attempt), mark[1] or '', mark[2] or ''}
