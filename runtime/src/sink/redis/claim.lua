-- Claims the streams' prefix, makes this writer the owner of the mark, unless a later owner has it, and looks whether every stream ends as
-- the mark says.
-- KEYS: the mark, the claim. ARGV: generation, pipeline, 1 to write in any case or 0, and whose the prefix was when it was last seen to
-- be another's, or ''. A claim that was given up is there and empty; one that is gone was lost, and is its holder's to make again.
-- Returns {'ok', position, timestamp, records, accept, phantoms}, each '' where the mark does not say it, {'claimed', pipeline} when the
-- prefix is another's, {'taken', generation}, or what streams.lua says of a stream that is not as it was left.
local holder = redis.call('HGET', KEYS[2], 'pipeline')
if not holder and ARGV[4] ~= '' then
  holder = ARGV[4]
end
if holder and holder ~= '' and holder ~= ARGV[2] then
  return {'claimed', holder}
end
local owner = redis.call('HGET', KEYS[1], 'generation')
if owner and tonumber(owner) > tonumber(ARGV[1]) then
  return {'taken', owner}
end
-- A server that is out of memory refuses to write, even what is there already.
if holder ~= ARGV[2] then
  redis.call('HSET', KEYS[2], 'pipeline', ARGV[2])
end
if owner ~= ARGV[1] or ARGV[3] == '1' then
  redis.call('HSET', KEYS[1], 'generation', ARGV[1])
end

local answer = {'ok', '', '', '', '', ''}
local place = {position = 2, timestamp = 3, records = 4, accept = 5, phantoms = 6}
local fields = redis.call('HGETALL', KEYS[1])
for f = 1, #fields, 2 do
  local name, value = fields[f], fields[f + 1]
  if place[name] then answer[place[name]] = value end
  if string.sub(name, 1, 5) == 'last:' then
    local wrong = disturbed(string.sub(name, 6), value)
    if wrong then return wrong end
  end
end
return answer
