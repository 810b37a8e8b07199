-- Append one attempt of a request to a queue, once, and fence off the attempt before it.
-- KEYS: request, stream. ARGV: attempt, queue limit (-1: none), group, number of entry items, the entry's fields and
-- values, then the fields and values to store.
-- Returns {OK|SAME, stream, entry}, {STALE, attempt in force}, {ENDED, state}, {UNKNOWN} or {FULL, waiting}.
local attempt, limit, group = tonumber(ARGV[1]), tonumber(ARGV[2]), ARGV[3]
local last = 4 + tonumber(ARGV[4])
local held = redis.call('HMGET', KEYS[1], 'state', 'attempt', 'stream', 'entry')
local state, current, old_stream, old_entry = held[1], tonumber(held[2] or 0), held[3], held[4]

if not state and attempt ~= 1 then return {'UNKNOWN'} end
if state == 'finished' or state == 'failed' or state == 'cancelled' then return {'ENDED', state} end
if old_entry and current == attempt then return {'SAME', old_stream, old_entry} end
if current ~= attempt - 1 then return {'STALE', tostring(current)} end

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
local entry = redis.call('XADD', KEYS[2], '*', unpack(ARGV, 5, last))
redis.call('HSET', KEYS[1], 'state', 'queued', 'attempt', ARGV[1], 'queued_attempt', ARGV[1], 'owner', '',
  'stream', KEYS[2], 'entry', entry, unpack(ARGV, last + 1))
redis.call('PERSIST', KEYS[1])
return {'OK', KEYS[2], entry}
