-- Take a queued attempt for one worker process. Needs owner_alive.
-- KEYS: request. ARGV: attempt in the entry, owner, replica, prefix of replica keys, now_us.
-- Returns the attempt in force, or 0: somebody else has it, it is stale, or it has ended.
local held = redis.call('HMGET', KEYS[1], 'state', 'attempt', 'owner', 'queued_attempt')
local state, attempt, owner = held[1], tonumber(held[2] or -1), held[3]
if held[4] ~= ARGV[1] then return 0 end

if state == 'claimed' and owner ~= ARGV[2] then
  -- Read by a worker that died before its first token: whoever is handed the entry may have it, as a new attempt.
  if owner_alive(owner, ARGV[4]) then return 0 end
  attempt = attempt + 1
elseif state ~= 'queued' and state ~= 'claimed' then
  return 0
end
redis.call('HSET', KEYS[1], 'state', 'claimed', 'attempt', attempt, 'owner', ARGV[2], 'replica', ARGV[3],
  'claimed_us', ARGV[5])
return attempt
