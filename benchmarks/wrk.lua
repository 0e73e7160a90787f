-- Sends prepared bodies, one per line of the file named by the first argument, and prints one line of JSON at the end.
local bodies, sent, threads = {}, 0, {}
repeated = 0

function setup(thread)
  table.insert(threads, thread)
end

function init(args)
  wrk.headers["Content-Type"] = "application/json"
  for line in io.lines(args[1]) do
    bodies[#bodies + 1] = wrk.format("POST", nil, nil, line)
  end
end

function request()
  if sent >= #bodies then repeated = repeated + 1 end
  sent = sent + 1
  return bodies[(sent - 1) % #bodies + 1]
end

function done(summary, latency, requests)
  local total_repeated = 0
  for _, thread in ipairs(threads) do total_repeated = total_repeated + thread:get("repeated") end
  local e = summary.errors
  io.write(string.format(
    '\nRESULT {"requests": %d, "elapsed_s": %f, "repeated": %d, "status": %d, "socket": %d, "timeout": %d, ' ..
    '"p50": %f, "p95": %f, "p99": %f, "max": %f, "mean": %f}\n',
    summary.requests, summary.duration / 1e6, total_repeated, e.status, e.connect + e.read + e.write, e.timeout,
    latency:percentile(50) / 1e3, latency:percentile(95) / 1e3, latency:percentile(99) / 1e3,
    latency.max / 1e3, latency.mean / 1e3))
end
