-- True while the worker process `owner` ("replica/started_us") holds its replica's lease. `prefix` is of replica keys.
local function owner_alive(owner, prefix)
  if not owner then return false end
  local replica, started = string.match(owner, '^(.*)/(%d+)$')
  local lease = redis.call('HGET', prefix .. (replica or owner), 'started_us')
  return lease and (not started or lease == started)
end

