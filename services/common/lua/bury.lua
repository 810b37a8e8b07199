-- Move an entry to the dead letters and fail its request where this entry is what it is queued by. Needs owner_alive.
-- KEYS: request, stream, dead letters. ARGV: entry, group, ttl_s, now_us, reason, deliveries, prefix of replica keys.
-- Returns 1 where the request failed by this, 0 where it stands otherwise, -1 where a live owner has it: left alone.
local held = redis.call('HMGET', KEYS[1], 'state', 'owner', 'stream', 'entry')
local state = held[1]
local current = held[3] == KEYS[2] and held[4] == ARGV[1]
  and (state == 'queued' or state == 'claimed' or state == 'running')
if current and state ~= 'queued' and owner_alive(held[2], ARGV[7]) then return -1 end

local found = redis.call('XRANGE', KEYS[2], ARGV[1], ARGV[1])
if found[1] then
  local fields = found[1][2]
  for _, item in ipairs({'reason', ARGV[5], 'stream', KEYS[2], 'entry', ARGV[1], 'deliveries', ARGV[6],
    'buried_us', ARGV[4]}) do
    fields[#fields + 1] = item
  end
  redis.call('XADD', KEYS[3], '*', unpack(fields))
end
redis.pcall('XACK', KEYS[2], ARGV[2], ARGV[1])
redis.call('XDEL', KEYS[2], ARGV[1])
if not current then return 0 end
redis.call('HSET', KEYS[1], 'state', 'failed', 'error', ARGV[5], 'ended_us', ARGV[4])
redis.call('EXPIRE', KEYS[1], ARGV[3])
return 1
