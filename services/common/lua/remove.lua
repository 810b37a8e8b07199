-- Give a lease up. KEYS: replica, index. ARGV: replica id, started_us. Leaves another process's lease alone.
if redis.call('HGET', KEYS[1], 'started_us') ~= ARGV[2] then return 0 end
redis.call('DEL', KEYS[1])
redis.call('SREM', KEYS[2], ARGV[1])
return 1
