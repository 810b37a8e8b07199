-- Prolong a lease. KEYS: replica, index. ARGV: replica id, started_us, lease_ms, then fields and values that changed.
-- Returns 0 where the lease is gone or belongs to another process.
if redis.call('HGET', KEYS[1], 'started_us') ~= ARGV[2] then return 0 end
if ARGV[4] then redis.call('HSET', KEYS[1], unpack(ARGV, 4)) end
redis.call('PEXPIRE', KEYS[1], ARGV[3])
redis.call('SADD', KEYS[2], ARGV[1])
return 1
