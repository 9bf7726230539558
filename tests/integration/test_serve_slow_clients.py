"""HAProxy as the stack starts it, against clients that send slowly and servers that answer late."""

import json
import re
import shutil
import socket
import subprocess
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from overtone.ports import free_ports
from serve.environment import find_haproxy, runtime_folder, serve_environment

CONFIG = """\
global
    stats socket {folder}/admin.sock mode 666 level admin
defaults
    mode http
    timeout connect 5s
    timeout client 1s
    timeout server 30s
frontend prometheus
    bind :9101
frontend http_frontend
    bind 127.0.0.1:{port}
    default_backend replicas
backend replicas
    server one 127.0.0.1:{backend}
listen stats
  bind *:8404
  stats enable
"""
LATE = threading.Event()


class Handler(BaseHTTPRequestHandler):
    def do_POST(self) -> None:
        self.rfile.read(int(self.headers["content-length"]))
        # Longer than the client's timeout: a client that waits for its answer is not idle.
        LATE.wait(2.5)
        self.send_response(200)
        self.send_header("content-length", "2")
        self.end_headers()
        self.wfile.write(b"ok")

    def log_message(self, format: str, *args: object) -> None:
        pass


@pytest.fixture
def address(tmp_path: Path) -> Iterator[tuple[str, int]]:
    binary = find_haproxy()
    if binary is None:
        pytest.skip("there is no HAProxy on this machine")
    backend = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=backend.serve_forever, daemon=True).start()
    port = free_ports(1)[0]
    folder = runtime_folder(tmp_path)
    script = Path(serve_environment(host="127.0.0.1", folder=folder)["RAY_SERVE_HAPROXY_BINARY_PATH"])
    script.write_text(re.sub(r"timeout http-request \d+s", "timeout http-request 1s", script.read_text()))
    config = folder / "haproxy.cfg"
    config.write_text(CONFIG.format(folder=folder, port=port, backend=backend.server_port))
    process = subprocess.Popen([str(script), "-db", "-f", str(config)], stderr=subprocess.DEVNULL)
    try:
        _await_port(port, process)
        yield "127.0.0.1", port
    finally:
        process.terminate()
        process.wait(30)
        backend.shutdown()
        backend.server_close()
        shutil.rmtree(folder, ignore_errors=True)


def _await_port(port: int, process: "subprocess.Popen[bytes]") -> None:
    for _ in range(3000):
        assert process.poll() is None, "HAProxy did not start"
        try:
            socket.create_connection(("127.0.0.1", port), 1).close()
            return
        except OSError:
            threading.Event().wait(0.01)
    raise TimeoutError("HAProxy does not listen")


def received(client: socket.socket) -> tuple[bytes, bytes]:
    """Head and body of all that comes until the other side ends the connection."""
    head, _, body = b"".join(iter(lambda: client.recv(4096), b"")).partition(b"\r\n\r\n")
    return head, body


def test_a_body_that_does_not_end_is_cut_off(address: tuple[str, int]) -> None:
    with socket.create_connection(address, 60) as client:
        client.sendall(b"POST /predict HTTP/1.1\r\nHost: x\r\ncontent-length: 9\r\n\r\n{")
        head, body = received(client)
        assert head.startswith(b"HTTP/1.1 408 ")
        assert b"\r\ncontent-type: application/problem+json" in head.lower()
        assert json.loads(body)["code"] == "too_slow"


@pytest.mark.parametrize(
    ("sent", "status"),
    [
        (b"POST /predict HTTP/1.1\r\nHost: x\r\nX-Slow:", 408),
        (b"GET / HTTP/1.1\r\nHost: x\r\nX-Long: " + b"a" * 20_000 + b"\r\n\r\n", 400),
        (b"GET / HTTP/1.1\r\nHost: x\r\nno colon\r\n\r\n", 400),
        (b"no HTTP at all\r\n\r\n", 400),
        (b"\x16\x03\x01\0", 400),
    ],
)
def test_headers_that_do_not_end_or_are_none_are_refused(address: tuple[str, int], sent: bytes, status: int) -> None:
    with socket.create_connection(address, 60) as client:
        client.sendall(sent)
        head, body = received(client)
        # Before there is a request HAProxy 2.8 has a page of its own, which cannot be replaced: it tells nothing more.
        assert head.startswith(f"HTTP/1.1 {status} ".encode())
        assert len(body) < 200


def test_a_client_that_waits_for_its_answer_is_not_cut_off(address: tuple[str, int]) -> None:
    with socket.create_connection(address, 60) as client:
        client.sendall(b"POST /predict HTTP/1.1\r\nHost: x\r\ncontent-length: 2\r\n\r\n{}")
        assert client.recv(4096).startswith((b"HTTP/1.0 200", b"HTTP/1.1 200"))
