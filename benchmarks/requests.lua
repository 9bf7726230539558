-- Sends the bodies of a file, one a line, in turn. Arguments: the file of bodies, the file of the headers.
local bodies = {}
local headers = {}
local at = 0
local instances = {}

function setup(thread)
    table.insert(instances, thread)
end

function init(args)
    for line in io.lines(args[1]) do bodies[#bodies + 1] = line end
    for line in io.lines(args[2]) do
        local name, value = line:match("^([^:]+): (.*)$")
        headers[name] = value
    end
    for number, body in ipairs(bodies) do
        bodies[number] = wrk.format("POST", nil, headers, body)
    end
end

function request()
    at = at % #bodies + 1
    return bodies[at]
end

function done(summary, latency, requests)
    local failed = summary.errors.connect + summary.errors.read + summary.errors.write + summary.errors.timeout
    io.write(string.format(
        '{"requests": %d, "requests_per_s": %.6f, "refused": %d, "failed": %d, "p50_ms": %.4f, "p99_ms": %.4f, "max_ms": %.4f}\n',
        summary.requests, summary.requests / (summary.duration / 1e6), summary.errors.status, failed,
        latency:percentile(50) / 1e3, latency:percentile(99) / 1e3, latency.max / 1e3))
end
