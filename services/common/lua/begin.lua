-- Register a request under the id its client chose.
-- KEYS: request. ARGV: digest, tenant, ttl_s until it must have been queued, then the fields to store.
-- Returns NEW, SAME (a retry of the same request) or CONFLICT (the id belongs to another one).
local held = redis.call('HMGET', KEYS[1], 'digest', 'tenant', 'state')
if held[1] then
  if held[1] == ARGV[1] and held[2] == ARGV[2] then return 'SAME' end
  return 'CONFLICT'
end
if held[3] then  -- queued before it was registered: its life goes on as it is
  redis.call('HSET', KEYS[1], 'digest', ARGV[1], 'tenant', ARGV[2])
  return 'NEW'
end
redis.call('HSET', KEYS[1], 'state', 'new', 'attempt', '0', 'digest', ARGV[1], 'tenant', ARGV[2], unpack(ARGV, 4))
redis.call('EXPIRE', KEYS[1], ARGV[3])
return 'NEW'
