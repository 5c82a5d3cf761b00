"""Real servers on loopback, and one between them and the client that injects faults."""

import http.client
import os
import secrets
import shutil
import socket
import subprocess
import sys
import threading
import time
from collections import deque
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest


def need(condition, what):
    """Skip a test whose server is not here; with REQUIRE_SCALE=1 fail."""
    if not condition:
        (pytest.fail if os.environ.get("REQUIRE_SCALE") else pytest.skip)(f"{what} is not installed")


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@contextmanager
def _running(command, port, log: Path):
    """A server process that answers at a port, ended at the end."""
    with open(log, "wb") as output:
        process = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT)
    try:
        for _ in range(200):
            try:
                socket.create_connection(("127.0.0.1", port), 1).close()
                break
            except OSError:
                assert process.poll() is None, log.read_text()
                time.sleep(0.05)
        else:
            raise AssertionError(f"{command[0]} does not answer: {log.read_text()}")
        yield process
    finally:
        process.terminate()
        process.wait(20)


@contextmanager
def s3_server(folder: Path, monkeypatch, log: Path):
    """rclone as an S3 server over a folder, whose subfolders are the buckets; the environment says where and who.

    Yields its port.
    """
    rclone = shutil.which("rclone", path=f"{Path(sys.executable).parent}:{os.environ['PATH']}")
    need(rclone, "rclone")
    port, key, secret = free_port(), secrets.token_hex(8), secrets.token_hex(16)
    command = [rclone, "serve", "s3", "--config", "/dev/null", "--addr", f"127.0.0.1:{port}"]
    with _running([*command, "--auth-key", f"{key},{secret}", "--vfs-cache-mode", "off", str(folder)], port, log):
        for name, value in (
            ("AWS_ENDPOINT_URL", f"http://127.0.0.1:{port}"),
            ("AWS_ACCESS_KEY_ID", key),
            ("AWS_SECRET_ACCESS_KEY", secret),
            ("AWS_DEFAULT_REGION", "us-east-1"),
        ):
            monkeypatch.setenv(name, value)
        yield port


@contextmanager
def web_server(folder: Path, scratch: Path):
    """nginx over a folder. Yields its port."""
    nginx = shutil.which("nginx", path=f"{os.environ['PATH']}:/usr/sbin")
    need(nginx, "nginx")
    port = free_port()
    scratch.mkdir(parents=True, exist_ok=True)
    temporary = "".join(f" {kind}_temp_path {scratch}/{kind};" for kind in ("client_body", "proxy", "fastcgi", "uwsgi"))
    (scratch / "nginx.conf").write_text(
        f"pid {scratch}/nginx.pid; daemon off; error_log {scratch}/error.log; user root; events {{}}\n"
        f"http {{ access_log {scratch}/access.log;{temporary} scgi_temp_path {scratch}/scgi; default_type "
        f"application/octet-stream; server {{ listen 127.0.0.1:{port}; root {folder}; }} }}\n"
    )
    with _running([nginx, "-c", f"{scratch}/nginx.conf"], port, scratch / "nginx.log"):
        yield port


@dataclass
class Fault:
    """What to do to an answer. status: this one instead of it. wait_s: before it. cut: close the connection after this
    part of its body. flip: change a byte of its body. only: to answers to paths that contain this.

    flip_sent: change a byte of what is sent to the server. lose: take this part of what is sent, and close."""

    status: int | None = None
    wait_s: float = 0.0
    cut: float | None = None
    flip: bool = False
    flip_sent: bool = False
    lose: float | None = None
    only: str = ""
    method: str = "GET"


@dataclass
class Proxy:
    """port: where it listens. faults: one for each of the next answers that it is `only` for. seen: (method, path) of
    requests; whole: of those whose content has come."""

    port: int = 0
    faults: deque = field(default_factory=deque)
    seen: list = field(default_factory=list)
    whole: list = field(default_factory=list)

    def take(self, method, path):
        for fault in self.faults:
            if fault.method == method and fault.only in path:
                self.faults.remove(fault)
                return fault
        return Fault()


@contextmanager
def faulty_proxy(target_port):
    """A Proxy before the server at a port of this machine."""
    proxy = Proxy()
    lock = threading.Lock()

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def handle_any(self):
            with lock:
                proxy.seen.append((self.command, self.path))
                fault = proxy.take(self.command, self.path)
            length = int(self.headers.get("Content-Length", 0))
            body = self.rfile.read(length if fault.lose is None else int(length * fault.lose))
            if len(body) < length:  # the client is gone, or shall think that the server is
                time.sleep(fault.wait_s)
                self.close_connection = True
                self.connection.shutdown(socket.SHUT_RDWR)
                return
            proxy.whole.append((self.command, self.path))
            if fault.flip_sent and body:
                body = body[:-1] + bytes([body[-1] ^ 1])
            time.sleep(fault.wait_s)
            if fault.status is not None:
                self.send_response(fault.status)
                self.send_header("Content-Length", "0")
                self.end_headers()
                return
            server = http.client.HTTPConnection("127.0.0.1", target_port, timeout=60)
            server.putrequest(self.command, self.path, skip_host=True, skip_accept_encoding=True)
            for name, value in self.headers.items():  # the Host as it was: it is signed
                if name.lower() not in ("connection", "expect"):
                    server.putheader(name, value)
            server.endheaders(body)
            answer = server.getresponse()
            content = answer.read()
            server.close()
            if fault.flip and content:
                content = content[:-1] + bytes([content[-1] ^ 1])
            self.send_response(answer.status)
            for name, value in answer.headers.items():
                if name.lower() not in ("transfer-encoding", "connection", "content-length", "date", "server"):
                    self.send_header(name, value)
            length = answer.headers.get("Content-Length") if self.command == "HEAD" else str(len(content))
            self.send_header("Content-Length", length or "0")
            self.end_headers()
            if fault.cut is not None:
                self.wfile.write(content[: int(len(content) * fault.cut)])
                self.wfile.flush()
                self.close_connection = True
                self.connection.shutdown(socket.SHUT_RDWR)
                return
            self.wfile.write(content)

        do_GET = do_HEAD = do_PUT = do_POST = do_DELETE = handle_any

        def log_message(self, *_):
            pass

    class Server(ThreadingHTTPServer):
        def handle_error(self, *_):
            pass  # clients that go away are what this is for

    server = Server(("127.0.0.1", 0), Handler)
    proxy.port = server.server_address[1]
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield proxy
    finally:
        server.shutdown()
        server.server_close()
