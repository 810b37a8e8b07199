-- Cut a lease short because its worker was not reached: one that lives renews it in time, a dead one is gone sooner.
-- KEYS: replica. ARGV: started_us, left_ms. Returns 1 where it was cut.
if redis.call('HGET', KEYS[1], 'started_us') ~= ARGV[1] then return 0 end
if redis.call('PTTL', KEYS[1]) <= tonumber(ARGV[2]) then return 0 end
return redis.call('PEXPIRE', KEYS[1], ARGV[2])
