-- End a request from outside and remove its queue entry, read or not.
-- KEYS: request. ARGV: group, ttl_s, now_us. Returns {state before, replica, attempt, owner}; {} where it is unknown.
local held = redis.call('HMGET', KEYS[1], 'state', 'replica', 'attempt', 'owner', 'stream', 'entry')
local state, stream, entry = held[1], held[5], held[6]
if not state then return {} end
if state ~= 'finished' and state ~= 'failed' and state ~= 'cancelled' then
  redis.call('HSET', KEYS[1], 'state', 'cancelled', 'ended_us', ARGV[3])
  redis.call('EXPIRE', KEYS[1], ARGV[2])
  if entry then
    redis.pcall('XACK', stream, ARGV[1], entry)
    redis.call('XDEL', stream, entry)
  end
end
return {state, held[2] or '', held[3] or '0', held[4] or ''}
