-- Append one attempt of a request to a queue, once, and fence off the attempt before it. Needs owner_alive.
-- KEYS: request, stream, index of queues. ARGV: attempt, queue limit (-1: none), group, the owner that hands it on
-- ('' where nobody does), prefix of replica keys, number of entry items, the entry's fields and values, then the fields
-- and values to store.
-- Returns {OK|SAME, stream, entry}, {STALE, attempt in force}, {ENDED, state}, {HELD, owner}, {UNKNOWN} or
-- {FULL, waiting}. HELD: a live worker runs it, and only that one may hand it on.
local attempt, limit, group, giver = tonumber(ARGV[1]), tonumber(ARGV[2]), ARGV[3], ARGV[4]
local first = 7
local last = first - 1 + tonumber(ARGV[6])
local held = redis.call('HMGET', KEYS[1], 'state', 'attempt', 'stream', 'entry', 'owner')
local state, current, old_stream, old_entry = held[1], tonumber(held[2] or 0), held[3], held[4]

if not state and attempt ~= 1 then return {'UNKNOWN'} end
if state == 'finished' or state == 'failed' or state == 'cancelled' then return {'ENDED', state} end
if old_entry and current == attempt then return {'SAME', old_stream, old_entry} end
if current ~= attempt - 1 then return {'STALE', tostring(current)} end
local taken = state == 'claimed' or state == 'running'
if taken and giver ~= held[5] and owner_alive(held[5], ARGV[5]) then return {'HELD', held[5]} end

if limit >= 0 then
  local waiting = redis.call('XLEN', KEYS[2])
  local pending = redis.pcall('XPENDING', KEYS[2], group)
  if not pending.err then waiting = waiting - pending[1] end  -- an error: no group yet, so nothing was read
  if waiting >= limit then return {'FULL', tostring(waiting)} end
end

if old_entry then
  redis.pcall('XACK', old_stream, group, old_entry)
  redis.call('XDEL', old_stream, old_entry)
end
if taken and giver ~= held[5] then redis.call('HINCRBY', KEYS[1], 'losses', 1) end  -- its worker died with it
local entry = redis.call('XADD', KEYS[2], '*', unpack(ARGV, first, last))
redis.call('SADD', KEYS[3], KEYS[2])
redis.call('HSET', KEYS[1], 'state', 'queued', 'attempt', ARGV[1], 'queued_attempt', ARGV[1], 'owner', '',
  'stream', KEYS[2], 'entry', entry, unpack(ARGV, last + 1))
redis.call('PERSIST', KEYS[1])
return {'OK', KEYS[2], entry}
