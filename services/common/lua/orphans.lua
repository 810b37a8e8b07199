-- One page of a queue, looked through for entries nobody cares for. Needs owner_alive.
-- KEYS: stream, index of queues. ARGV: first id of the page, entries per page, group, prefix of request keys, prefix of
-- replica keys, prefix of admission keys.
-- Entries that no request stands on are deleted, and so is an empty queue whose replica has no lease.
-- Returns {id after the page ('' at the end), deleted, {request, attempt, LOST|KEPT, admission alive, grace_us}...} for
-- every entry that no live worker holds or will read, or whose admission process is gone. KEPT: a live worker has it.
local deleted, found = 0, {}
local replica = string.match(KEYS[1], '^slos:q:(.*):[^:]*$')  -- none for the shared queue
local page = redis.call('XRANGE', KEYS[1], ARGV[1], '+', 'COUNT', ARGV[2])
for _, item in ipairs(page) do
  local entry, fields, request = item[1], item[2], nil
  for i = 1, #fields, 2 do
    if fields[i] == 'id' then request = fields[i + 1] end
  end
  if request then
    local held = redis.call('HMGET', ARGV[4] .. request, 'state', 'owner', 'stream', 'entry', 'admission', 'attempt',
      'grace_us')
    local state = held[1]
    local stands = state == 'queued' or state == 'claimed' or state == 'running'
    if not (stands and held[3] == KEYS[1] and held[4] == entry) then
      redis.pcall('XACK', KEYS[1], ARGV[3], entry)
      redis.call('XDEL', KEYS[1], entry)
      deleted = deleted + 1
    else
      local kept
      if state == 'queued' then
        kept = not replica or owner_alive(replica, ARGV[5])
      else
        kept = owner_alive(held[2], ARGV[5])
      end
      local heard = redis.call('EXISTS', ARGV[6] .. (held[5] or ''))
      if not kept or (heard == 0 and state == 'queued') then
        found[#found + 1] = {request, held[6] or '0', kept and 'KEPT' or 'LOST', heard, held[7] or '0'}
      end
    end
  end
end
if #page == 0 and redis.call('XLEN', KEYS[1]) == 0 and replica and not owner_alive(replica, ARGV[5]) then
  redis.call('DEL', KEYS[1])
  redis.call('SREM', KEYS[2], KEYS[1])
end
local after = ''
if #page == tonumber(ARGV[2]) then after = '(' .. page[#page][1] end
return {after, deleted, found}
