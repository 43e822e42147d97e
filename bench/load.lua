-- What wrk sends. KIND says which request; OFFSET where a count of tokens begins.
local kind = os.getenv("KIND")
local offset = tonumber(os.getenv("OFFSET") or "0")
local count = 0
local json = {["Content-Type"] = "application/json"}

local function value(number) return string.format("%064d", number) end

local requests = {
  hot = function() return wrk.format("GET", "/api/token?token=" .. value(math.random(0, 499))) end,
  me = function() return wrk.format("GET", "/api/me", {["X-Token"] = value(math.random(0, 499))}) end,
  million = function() return wrk.format("GET", "/api/token?token=" .. value(math.random(0, 999999))) end,
  sweep = function()
    count = count + 1
    return wrk.format("GET", "/api/token?token=" .. value(count))
  end,
  issue = function()
    local body = '{"username": "user' .. math.random(0, 499) .. '", "password": "secret"}'
    return wrk.format("POST", "/api/token", json, body)
  end,
  wrong = function()
    local from = "10." .. math.random(0, 255) .. "." .. math.random(0, 255) .. ".1"
    local headers = {["Content-Type"] = "application/json", ["X-Forwarded-For"] = from}
    return wrk.format("POST", "/api/token", headers, '{"username": "user' .. math.random(0, 499) .. '", "password": "wrong"}')
  end,
  revoke = function()
    count = count + 1
    return wrk.format("DELETE", "/api/token", json, '{"token": "' .. value(offset + count) .. '"}')
  end,
}

request = requests[kind]

function init() math.randomseed(os.time() + offset) end

function done(summary, latency)
  local errors = summary.errors
  io.write(string.format("RESULT %d %d %d %d\n", summary.requests, summary.duration, latency:percentile(99),
    errors.connect + errors.read + errors.write + errors.status + errors.timeout))
end
