"""What Overtone changes in the configuration that Ray Serve writes for HAProxy, and the script that does it.

Ray Serve's HAProxy mode is made for clusters of many nodes and opens its statistics and metrics pages on every network
interface, with an admin socket that every user of the machine may write to. So HAProxy is started through a script
that moves the pages to sockets in a folder of the stack's own, closes the admin socket to other users, and ends HAProxy
when the Ray process that started it ends. It also has every request answered when a replica dies with it:

- A request that fits HAProxy's buffer is waited for whole, so that another replica can be asked.
- HAProxy 2.8 just closes the connection when the server fails without an answer and the request was not the first of
  its connection, for the client to try again. A request that is too large to be repeated therefore goes through HAProxy
  twice, the second time as the first of a connection of its own, on which HAProxy does answer.
- An answer that fits the buffer is waited for whole before the client sees its head.
- While Serve lists no replica, HAProxy goes on with those it had, for as long as they pass its health checks: Serve
  takes a replica off the list while it hands it a new `user_config`, which would be an outage where only one is up.
- While no replica is healthy, HAProxy asks those that accept connections all the same: Serve tells a replica to end,
  which makes it unhealthy but leaves it at work for some seconds, before HAProxy knows the one that stands in for it.
- A prediction that is asked for alone goes to the same replica each time, whose model is still in the processor's
  caches. What replicas say of themselves is asked of them in turn.
- HAProxy says that it is ready (`/-/healthz`) while a replica accepts connections. Ray has it say so for the stand-in
  alone, too.
- While none does, HAProxy itself stands in for Ray's Python proxy and answers 503: the proxy keeps requests
  waiting, maybe for a replica that is dead.
- What is neither ours nor JSON (HAProxy's own errors) becomes a problem.
- When a replica refuses a single text because its queue is full (`QUEUE_HEADER`), HAProxy refuses those that come in
  the next moments: a refusal takes Python a fifth of the time that a text takes the engine, and HAProxy next to none.

Knows nothing of running Ray or HAProxy.
"""

import json
from http import HTTPStatus
from pathlib import Path

BUFFER_BYTES = 65_536
"""Of HAProxy, for each direction. Some of it is kept for rewriting, and heads need room too."""
_WHOLE_BODY_BYTES = 48 * 1024
# Seconds for a request's headers and as much of its body as fits the buffer; for the rest of an answer that has begun.
_REQUEST_TIMEOUT_S = 30
_ANSWER_TIMEOUT_S = 30
_CONNECT_MS = 250
"""What a connection to a replica may take. HAProxy waits as long after one was refused, or a second if that is less."""

QUEUE_HEADER = "overtone-queue"
"""By which a replica says `full` to HAProxy, which does not pass it on."""
_FULL_MS = 50
"""How long HAProxy then refuses; far less than what waits in that queue takes, so that no engine runs out of texts."""

_SCRIPT = """\
#!/bin/sh
# Starts HAProxy with the configuration Ray wrote, closed to other machines and other users.
set -eu
config=
previous=
for argument in "$@"; do
    if [ "$previous" = "-f" ]; then config=$argument; fi
    previous=$argument
done
if [ -n "$config" ]; then
    umask 077
    kept=/dev/null
    if grep ' check observe layer4 ' "$config" >"$config.replicas.$$"; then
        mv "$config.replicas.$$" "$config.replicas"
    else
        rm -f "$config.replicas.$$"
        kept=$config.replicas
    fi
    warm=$(sed -n 's/^ *server \\([^ ]*\\) .* check observe layer4 .*/\\1/p' "$config" "$kept" 2>/dev/null | head -n 1)
    lone=
    ready=
    if [ -n "$warm" ] && [ "$(grep -c '# Servers in this backend' "$config")" = 1 ]; then
        lone="use-server $warm if {{ be_conn le 1 }} {{ path_beg /predict /v2/ }}"
        ready='s/^\\( *acl backend_[^ ]*_server_up nbsrv(\\)[^)]*/\\1last/'
        sed -n 's/^\\( *server [^ ]* [^ ]*\\) check observe layer4 .*/\\1 check inter 1s fastinter 250ms fall 2/p' \\
            "$config" "$kept" >"$config.last.$$"
    else
        : >"$config.last.$$"
    fi
    sed -e "/ check backup\\$/r $kept" \\
        -e "s|^\\( *\\)# Servers in this backend\\$|\\1$lone|" \\
        -e "$ready" \\
        {metrics_edit}-e '/^listen stats$/,$s#^\\( *\\)bind .*#\\1bind unix@{folder}/stats.sock mode 600#' \\
        -e 's/ mode 666 level admin/ mode 600 level admin/' \\
        -e 's/^\\( *timeout connect\\) .*/\\1 {connect_ms}ms/' \\
        -e '/^ *log [^ ]* local0 info$/d' \\
        -e '/^ *errorfile /d' \\
        -e 's#^\\( *server [^ ]*\\) [^ ]* check backup$#\\1 unix@{folder}/last.sock check backup#' \\
        -e 's#^\\( *http-request return\\) status 404 .*#\\1 status 503 default-errorfiles#' \\
        -e '/^defaults$/r {folder}/defaults.cfg' \\
        -e '/^ *# Static routing based on path prefixes/r {folder}/frontend.cfg' \\
        -e '$r {folder}/ends.cfg' \\
        "$config" >"$config.closed.$$"
    cat "$config.closed.$$" "$config.last.$$" >"$config"
    rm -f "$config.closed.$$" "$config.last.$$"
fi
exec {prefix}"{binary}" "$@"
"""

_CLOSE_METRICS = """\
-e '/^frontend prometheus$/,/^frontend /s#^\\( *\\)bind .*#\\1bind unix@{folder}/metrics.sock mode 600#' \\
        """

# A node that vanishes closes no connection: the kernel finds that out, and nothing but it, since a replica that is
# busy for long is not dead. What the node had is asked of another replica, or fails, before the client gives up.
_DEFAULTS = f"""\
    option srvtcpka
    srvtcpka-idle 2s
    srvtcpka-intvl 1s
    srvtcpka-cnt 3
    default-server tcp-ut 5s
    option http-buffer-request
    timeout http-request {_REQUEST_TIMEOUT_S}s
"""

_FRONTEND = """\
    bind unix@{folder}/again.sock mode 600 name again
    http-request set-var(txn.is_lone) bool(true) if {{ path /predict }}
    http-request set-var(txn.full_ms) date(0,ms),sub(proc.full_at) if {{ var(txn.is_lone) -m bool }}
    http-request return status 429 default-errorfiles if {{ var(txn.full_ms) -m int 0:{full_ms} }}
    http-response set-var(proc.full_at) date(0,ms) if {{ var(txn.is_lone) -m bool }} {{ res.hdr({header}) full }}
    http-response del-header {header}
    http-response wait-for-body time {answer_timeout_s}s if {{ res.hdr(content-length) -m found }}
    http-response set-var(txn.body_bytes) res.body_len
    acl is_short res.hdr_val(content-length) 1:{whole_bytes}
    acl is_cut res.hdr_val(content-length),sub(txn.body_bytes) gt 0
    http-response return status 503 default-errorfiles if is_short is_cut !{{ method HEAD }}
    acl is_ours res.hdr(content-type) -m beg application/
    http-response return status 503 default-errorfiles if {{ status 500:599 }} !is_ours
    use_backend again if !{{ so_name again }} {{ req.hdr_val(content-length) gt {whole_bytes} }}
    use_backend again if !{{ so_name again }} {{ req.hdr(transfer-encoding) -m found }}
"""

_AGAIN = """\
backend again
    option http-server-close
    http-reuse never
    retry-on conn-failure
    server again unix@{folder}/again.sock
"""

# The script adds the replicas: those that accept connections, whatever their health. Without one the answer is 503.
_LAST = """\
frontend last
    bind unix@{folder}/last.sock mode 600
    http-request return status 200 if {{ path /-/healthz }}
    default_backend last
backend last
"""

_LOST = "The replica that had the request ended before it answered, or none is up; try again."
# By status, what HAProxy answers itself; 502 and 504 from a server that died become 503.
_PROBLEMS: dict[int, tuple[str, str, str]] = {
    400: ("malformed", "The request body cannot be parsed", "The request is not valid HTTP."),
    408: ("too_slow", "The request body did not arrive in time", "The request did not arrive in time."),
    413: ("too_large", "The request is over a size limit", "The request is over a size limit."),
    429: ("overloaded", "The queue is full", "More texts wait already than may; try again later or with fewer texts."),
    500: ("internal", "Something in Overtone failed", "The server failed."),
    503: ("unavailable", "A part of the system is not reachable now", _LOST),
}
_ERRORFILES = {status: status for status in _PROBLEMS} | {502: 503, 504: 503}


def write_start_script(folder: Path, binary: Path, *, setpriv: str | None, shows_metrics: bool = False) -> Path:
    """The script that starts HAProxy's `binary`, written into `folder` with all that it needs.

    With `setpriv`, the path of that program, HAProxy ends when the process that started it ends. With `shows_metrics`
    its page for Prometheus stays on the network, for where a policy of the network decides who may read it.
    """
    for status in _PROBLEMS:
        _write(folder / f"{status}.http", _raw_answer(status))
    errorfiles = [f"    errorfile {status} {folder}/{shown}.http\n" for status, shown in sorted(_ERRORFILES.items())]
    _write(folder / "defaults.cfg", _DEFAULTS + "".join(errorfiles))
    _write(
        folder / "frontend.cfg",
        _FRONTEND.format(
            folder=folder,
            full_ms=_FULL_MS,
            header=QUEUE_HEADER,
            answer_timeout_s=_ANSWER_TIMEOUT_S,
            whole_bytes=_WHOLE_BODY_BYTES,
        ),
    )
    ends = (_AGAIN + _LAST).format(folder=folder)
    _write(folder / "ends.cfg", ends)
    script = folder / "haproxy.sh"
    prefix = f'"{setpriv}" --pdeathsig TERM ' if setpriv else ""
    edit = "" if shows_metrics else _CLOSE_METRICS.format(folder=folder)
    parts = {"folder": folder, "prefix": prefix, "binary": binary, "metrics_edit": edit, "connect_ms": _CONNECT_MS}
    _write(script, _SCRIPT.format(**parts))
    script.chmod(0o700)
    return script


def _write(path: Path, content: str) -> None:
    # A running stack may read it at any time, so it is not written again for nothing.
    if not path.exists() or path.read_text(encoding="utf-8") != content:
        path.write_text(content, encoding="utf-8")


def _problem(status: int) -> str:
    code, title, detail = _PROBLEMS[status]
    return json.dumps(
        {
            "type": f"urn:overtone:problem:{code}",
            "title": title,
            "status": status,
            "detail": detail,
            "code": code,
            "request_id": "",
            "errors": [],
        }
    )


def _raw_answer(status: int) -> str:
    body = _problem(status)
    retry = "Retry-After: 1\r\n" if status in {429, 503} else ""
    return (
        f"HTTP/1.1 {status} {HTTPStatus(status).phrase}\r\nContent-Type: application/problem+json\r\n"
        f"Cache-Control: no-store\r\n{retry}Content-Length: {len(body)}\r\n\r\n{body}"
    )
