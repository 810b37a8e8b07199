-- Progress of an attempt. KEYS: request. ARGV: attempt, owner, state, then fields and values to store.
-- Returns 1, or 0 where this owner no longer holds this attempt.
local held = redis.call('HMGET', KEYS[1], 'state', 'attempt', 'owner')
if held[2] ~= ARGV[1] or held[3] ~= ARGV[2] then return 0 end
if held[1] ~= 'claimed' and held[1] ~= 'running' then return 0 end
redis.call('HSET', KEYS[1], 'state', ARGV[3], unpack(ARGV, 4))
return 1
