-- All live replicas in one reply: {id, {field, value, ...}} each. KEYS: index. ARGV: prefix of replica keys.
-- Members whose lease ran out leave the index.
local found = {}
for _, id in ipairs(redis.call('SMEMBERS', KEYS[1])) do
  local fields = redis.call('HGETALL', ARGV[1] .. id)
  if #fields == 0 then
    redis.call('SREM', KEYS[1], id)
  else
    found[#found + 1] = {id, fields}
  end
end
return found
