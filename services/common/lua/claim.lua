-- Take a queued attempt for one worker process. Needs owner_alive.
-- KEYS: request, stream. ARGV: attempt in the entry, owner, replica, prefix of replica keys, now_us, entry, group.
-- Returns the attempt in force; 0: somebody else has it, it is stale, or it has ended (the entry is acknowledged, and
-- deleted unless the request still stands on it); -1: the owner's own lease is gone, so nothing was touched.
if not owner_alive(ARGV[2], ARGV[4]) then return -1 end
local held = redis.call('HMGET', KEYS[1], 'state', 'attempt', 'owner', 'queued_attempt', 'stream', 'entry')
local state, attempt, owner = held[1], tonumber(held[2] or -1), held[3]
local ours = held[4] == ARGV[1]

if ours and state == 'claimed' and owner ~= ARGV[2] then
  -- Read by a worker that died before its first token: whoever is handed the entry may have it, as a new attempt.
  if owner_alive(owner, ARGV[4]) then
    ours = false
  else
    attempt = attempt + 1
    redis.call('HINCRBY', KEYS[1], 'losses', 1)
  end
elseif state ~= 'queued' and state ~= 'claimed' then
  ours = false
end
if not ours then
  redis.pcall('XACK', KEYS[2], ARGV[7], ARGV[6])
  local stands = state == 'queued' or state == 'claimed' or state == 'running'
  if not (stands and held[5] == KEYS[2] and held[6] == ARGV[6]) then redis.call('XDEL', KEYS[2], ARGV[6]) end
  return 0
end
redis.call('HSET', KEYS[1], 'state', 'claimed', 'attempt', attempt, 'owner', ARGV[2], 'replica', ARGV[3],
  'claimed_us', ARGV[5])
return attempt
