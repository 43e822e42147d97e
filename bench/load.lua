-- What wrk sends. KIND says which request; OFFSET where a count of tokens begins.
local kind = os.getenv("KIND")
local offset = tonumber(os.getenv("OFFSET"))
local count = 0
local json = {["Content-Type"] = "application/json"}

local function value(number) return string.format("%064d", number) end

local function probe(number) return wrk.format("GET", "/api/token?token=" .. value(number)) end

local function login(password, headers)
  local body = '{"username": "user' .. math.random(0, 499) .. '", "password": "' .. password .. '"}'
  return wrk.format("POST", "/api/token", headers, body)
end

local requests = {
  hot = function() return probe(math.random(0, 499)) end,
  me = function() return wrk.format("GET", "/api/me", {["X-Token"] = value(math.random(0, 499))}) end,
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

-- Two kinds come at a pace of their own, and not as fast as they are answered: milliseconds until the next.
if kind == "calm" then
  function delay() return math.random(1, 3) end
elseif kind == "wrong" then
  function delay() return math.random(0, 2000) end
end

-- wrk counts what is over 399 as an error; wrong logins are to be refused, and with nothing else than these.
-- These counts are global: `done` runs in another Lua state and asks for them by name.
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

local thread

function setup(started) thread = started end

function init() math.randomseed(os.time() + offset) end

function done(summary, latency)
  local errors = summary.errors
  local wrong = kind == "wrong" and thread:get("unexpected") or errors.status
  io.write(string.format("RESULT %d %d %d %d %d\n", summary.requests, summary.duration, latency:percentile(99),
    errors.connect + errors.read + errors.write + errors.timeout + wrong, thread:get("overloaded")))
end
