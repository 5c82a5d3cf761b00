"""A packed set behind a web server on this machine, for rows that read it from a store: Python's own, with ranges."""

import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

from flow.dataset import describe_files
from flow.index import INDEX_NAME


@contextmanager
def served(root: Path) -> Iterator[str]:
    """URL of a packed set, until the end. It is served as it lies there."""
    dataset = json.loads((root / "dataset.json").read_text())
    if "files" not in dataset:
        dataset["files"] = describe_files(root)
    content = json.dumps(dataset).encode()

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            name = self.path.lstrip("/")
            if name == "dataset.json":
                self._answer(content)
            elif name == INDEX_NAME or name in _lists(root) or re.fullmatch(r"shard-\d+\.tar", name):
                begin, end = _range(self.headers.get("Range"))
                with open(root / name, "rb") as file:
                    file.seek(begin)
                    self._answer(file.read(-1 if end is None else end - begin), begin)
            else:
                self.send_error(404)

        def _answer(self, body: bytes, begin: int | None = None) -> None:
            ranged = begin is not None and "Range" in self.headers
            self.send_response(206 if ranged else 200)
            if ranged and begin is not None:
                self.send_header("Content-Range", f"bytes {begin}-{begin + len(body) - 1}/*")
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_: object) -> None:
            pass

    class Server(ThreadingHTTPServer):
        def handle_error(self, *_: object) -> None:
            pass  # rows end in the middle of a request

    server = Server(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}"
    finally:
        server.shutdown()
        server.server_close()


def _lists(root: Path) -> list[str]:
    return [f"splits/{path.name}" for path in sorted((root / "splits").glob("*.txt"))]


def _range(asked: str | None) -> tuple[int, int | None]:
    found = re.fullmatch(r"bytes=(\d+)-(\d+)?", asked or "")
    return (int(found[1]), int(found[2]) + 1 if found[2] else None) if found else (0, None)
