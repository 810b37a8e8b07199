-- End of an attempt: the state, the time to live, and the queue entry's removal.
-- KEYS: request, stream. ARGV: attempt, owner, state, entry, group, ttl_s, then fields and values to store.
-- Returns 1, or 0 where this owner no longer holds this attempt: then nothing is touched.
local held = redis.call('HMGET', KEYS[1], 'state', 'attempt', 'owner')
local state = held[1]
if held[2] ~= ARGV[1] or held[3] ~= ARGV[2] then return 0 end
if state == 'claimed' or state == 'running' then
  redis.call('HSET', KEYS[1], 'state', ARGV[3], unpack(ARGV, 7))
elseif state == 'cancelled' then
  redis.call('HSET', KEYS[1], unpack(ARGV, 7))  -- cancelled stays cancelled; keep what was delivered until then
elseif state ~= ARGV[3] then
  return 0
end
redis.pcall('XACK', KEYS[2], ARGV[5], ARGV[4])
redis.call('XDEL', KEYS[2], ARGV[4])
redis.call('EXPIRE', KEYS[1], ARGV[6])
return 1
