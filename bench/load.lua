-- The requests that wrk sends. KIND selects the request; OFFSET is the number of the first token.
local kind = os.getenv("KIND")
local offset = tonumber(os.getenv("OFFSET"))
local count = 0
local json = {["Content-Type"] = "application/json"}

local function value(number) return string.format("%064d", number) end

-- The headers of a client: the name of a user, and "secret".
local letters = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/"
local function basic(name)
  local coded = (name .. ":secret"):gsub("..?.?", function(part)
    local first, second, third = part:byte(1, 3)
    local number = first * 65536 + (second or 0) * 256 + (third or 0)
    local out = ""
    for place = 3, 3 - #part, -1 do
      local digit = math.floor(number / 64 ^ place) % 64 + 1
      out = out .. letters:sub(digit, digit)
    end
    return out .. ("="):rep(3 - #part)
  end)
  return {["Content-Type"] = "application/x-www-form-urlencoded", ["Authorization"] = "Basic " .. coded}
end

local function probe(number) return wrk.format("GET", "/api/token?token=" .. value(number)) end

-- One of 500 prepared requests: the load generator must not be slower than the server.
local function one_of(write)
  local written = {}
  return function()
    local number = math.random(0, 499)
    written[number] = written[number] or write(value(number))
    return written[number]
  end
end

local function login(password, headers)
  local body = '{"username": "user' .. math.random(0, 499) .. '", "password": "' .. password .. '"}'
  return wrk.format("POST", "/api/token", headers, body)
end

-- Leasing: tokens from responses are kept, and used in later requests.
local key = {["X-Token"] = value(0), ["Content-Type"] = "application/json"}
local held, freed, first = {}, {}, 1
local SPARE = 64 -- number of tokens kept unused, so that no two pending requests are about the same token

local function named(token) return '{"token": "' .. token .. '"}' end

local function assign(pool) return wrk.format("POST", "/api/pools/" .. pool .. "/leases", key) end

local function release(pool, token) return wrk.format("DELETE", "/api/pools/" .. pool .. "/leases/" .. token, key) end

local function pairs_in(pool)
  return function()
    local token = table.remove(held)
    return token and release(pool, token) or assign(pool)
  end
end

-- The operations of a dialect in turn: generate a token, assign one, keep one alive, release one, delete one.
local function in_turn(service)
  return function()
    count = count + 1
    local step = count % 5
    if step == 0 then return service.make() end
    if step == 1 or #held < SPARE then return service.take() end
    if step == 2 then return service.keep(held[1]) end
    if step == 4 and not service.free then return service.make() end
    if step == 3 and service.free then
      local token = table.remove(held)
      freed[#freed + 1] = token
      return service.free(token)
    end
    if service.free then
      if #freed - first < SPARE then return service.keep(held[1]) end
      first = first + 1
      return service.delete(freed[first - 1])
    end
    return service.delete(table.remove(held))
  end
end

local function post(path, body) return wrk.format("POST", path, json, body) end

local password = {["X-API-PASSWORD"] = "secret"}
local services = {
  permits = {
    make = function() return wrk.format("GET", "/permits/tokens", password) end,
    take = function() return wrk.format("GET", "/permits/issue_token?info=" .. count, password) end,
    free = function() return wrk.format("GET", "/permits/recycle_token?info=" .. count, password) end,
  },
  uuids = {
    make = function() return wrk.format("POST", "/uuids/api/token_pool/") end,
    take = function() return wrk.format("POST", "/uuids/api/block_token/") end,
    keep = function(token) return wrk.format("POST", "/uuids/api/keep_alive/" .. token) end,
    delete = function(token) return wrk.format("DELETE", "/uuids/api/token_pool/", json, named(token)) end,
  },
  bounded = {
    make = function() return post("/bounded/generate", '{"count": 1}') end,
    take = function() return wrk.format("POST", "/bounded/assign") end,
    keep = function(token) return post("/bounded/keep-alive", named(token)) end,
    free = function(token) return post("/bounded/unblock", named(token)) end,
    delete = function(token) return wrk.format("DELETE", "/bounded/delete", json, named(token)) end,
  },
  owned = {
    make = function() return post("/owned/generate-token") end,
    take = function() return post("/owned/assign-token", '{"client_id": "worker-7"}') end,
    keep = function(token) return post("/owned/keep-alive", '{"client_id": "worker-7", "token": "' .. token .. '"}') end,
    free = function(token) return post("/owned/unblock-token", named(token)) end,
    delete = function(token) return post("/owned/delete-token", named(token)) end,
  },
}

local function permits_in_turn()
  count = count + 1
  local service = services.permits
  if count <= SPARE / 2 then return service.take() end
  if count % 5 == 0 then return service.make() end
  return count % 2 == 0 and service.take() or service.free()
end

local requests = {
  assign = function() return assign("large") end,
  keep = function() return wrk.format("PUT", "/api/pools/leased/leases/" .. value(math.random(0, 9999)), key) end,
  release = function()
    count = count + 1
    return release("leased", value(9999 + offset + count))
  end,
  pairs_large = pairs_in("large"),
  pairs_small = pairs_in("small"),
  permits = permits_in_turn,
  uuids = in_turn(services.uuids),
  bounded = in_turn(services.bounded),
  owned = in_turn(services.owned),
  hot = one_of(function(token) return wrk.format("GET", "/api/token?token=" .. token) end),
  me = one_of(function(token) return wrk.format("GET", "/api/me", {["X-Token"] = token}) end),
  auth = one_of(function(token) return wrk.format("GET", "/auth", {["X-Token"] = token}) end),
  cookie = one_of(function(token)
    return wrk.format("GET", "/auth?cookie", {["Cookie"] = "theme=dark; tokenauth=" .. token})
  end),
  introspect = one_of(function(token)
    return wrk.format("POST", "/oauth/introspect", basic("user0"), "token=" .. token)
  end),
  oauth = one_of(function(token)
    return wrk.format("POST", "/oauth/token", basic("user" .. tonumber(token)), "grant_type=client_credentials")
  end),
  million = function() return probe(math.random(0, 999999)) end,
  sweep = function()
    count = count + 1
    return probe(offset + count)
  end,
  issue = function() return login("secret", json) end,
  revoke = function()
    count = count + 1
    return wrk.format("DELETE", "/api/token", json, '{"token": "' .. value(offset + count) .. '"}')
  end,
  calm = function() return probe(math.random(0, 499)) end,
  wrong = function()
    local from = "10." .. math.random(0, 255) .. "." .. math.random(0, 255) .. ".1"
    return login("wrong", {["Content-Type"] = "application/json", ["X-Forwarded-For"] = from})
  end,
}

request = requests[kind]

-- Two kinds are sent at their own pace: milliseconds until the next request.
if kind == "calm" then
  function delay() return math.random(1, 3) end
elseif kind == "wrong" then
  function delay() return math.random(0, 2000) end
end

-- wrk counts a status above 399 as an error. Wrong logins must be refused, with one of these.
-- These counts are global: `done` runs in another Lua state and reads them by name.
overloaded, unexpected = 0, 0
if kind == "wrong" then
  function response(status)
    if status == 503 then
      overloaded = overloaded + 1
    elseif status ~= 401 and status ~= 429 then
      unexpected = unexpected + 1
    end
  end
end

-- Responses with a leased token: 201 in the native API, 200 in the dialects.
local leased = {
  pairs_large = {201, '"token":"([^"]+)'},
  pairs_small = {201, '"token":"([^"]+)'},
  uuids = {200, '"blocked_token":"([^"]+)'},
  bounded = {200, '{"token":"([^"]+)'},
  owned = {200, '"token":"([^"]+)'},
}
if leased[kind] then
  local expected, pattern = leased[kind][1], leased[kind][2]
  function response(status, _, body)
    if status == expected then
      local token = body:match(pattern)
      if token then held[#held + 1] = token end
    end
  end
end

local thread

function setup(started) thread = started end

function init() math.randomseed(os.time() + offset) end

function done(summary, latency)
  local errors = summary.errors
  local wrong = kind == "wrong" and thread:get("unexpected") or errors.status
  io.write(string.format("RESULT %d %d %d %d %d\n", summary.requests, summary.duration, latency:percentile(99),
    errors.connect + errors.read + errors.write + errors.timeout + wrong, thread:get("overloaded")))
end
