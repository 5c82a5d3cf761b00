"""A packed set that lies in no folder: in a bucket (`s3://bucket/set`), or on a web server (`https://host/set`).

fsspec speaks to the server; here is what it leaves open: which failures pass, how long they may last, and what to say
of those that do not. What is not local is read in pieces of known bytes, so that a cut connection costs one piece.

Where an S3 server is, and who asks, is told by AWS_ENDPOINT_URL, AWS_ACCESS_KEY_ID and all else that botocore reads.
"""

import base64
import hashlib
import logging
import time
from collections.abc import Callable
from functools import cached_property
from pathlib import Path
from typing import Any, TypeVar

logger = logging.getLogger(__name__)

#: How the folder of a packed set may be given, besides as a path.
SCHEMES = ("s3", "https", "http")

#: Bytes of one request.
PIECE_BYTES = 8 << 20
#: Bytes of a part of a file that is stored in several; s3fs has up to 10 in memory.
_PART_BYTES = 32 << 20
_NO_BUCKET = "there is no such bucket; create it, or check the URL"
#: Waits between attempts, s. A server that restarts is back by then.
_PAUSES_S = (0.2, 1.0, 3.0, 8.0)
#: Longest wait for a connection, and for the next bytes of an answer.
_CONNECT_S = 10.0
_SILENCE_S = 30.0

#: Statuses of HTTP that may be others when asked again: too slow, too early, too often, and the server's own.
_PASSING = frozenset({408, 425, 429, *range(500, 600)})
_REFUSED = frozenset({401, 403})

Result = TypeVar("Result")


class StoreError(OSError):
    """A store does not give, or take, what it should. The message names the object, what came, and what to do."""


def is_url(root: object) -> bool:
    """Whether the place of a packed set is given as a URL, and not as a folder."""
    return "://" in str(root)


class Store:
    """A packed set's files under a URL. Any number of threads may use it; a process that is forked opens its own.

    Raises ValueError for a scheme that is none of SCHEMES, ImportError without the packages that it needs.
    """

    def __init__(self, url: str, *, filesystem: Any = None, pauses_s: tuple[float, ...] = _PAUSES_S):
        scheme, _, rest = url.rstrip("/").partition("://")
        if filesystem is None and (scheme not in SCHEMES or not rest):
            raise ValueError(f"{url!r}: expected a folder, or a URL such as s3://bucket/set or https://host/set.")
        self.url = f"{scheme}://{rest}"
        self._path = self.url if scheme in ("http", "https") else rest  # fsspec's own convention
        self._scheme, self._given, self._pauses_s = scheme, filesystem, pauses_s

    @cached_property
    def _fs(self) -> Any:
        return self._given or _filesystem(self._scheme)

    def read(self, name: str, begin: int, end: int) -> bytes:
        """Bytes [begin, end) of a file. Raises FileNotFoundError, and StoreError for anything else, also if it is
        shorter."""

        came: set[int] = set()

        def ask() -> bytes:
            content: bytes = self._fs.cat_file(f"{self._path}/{name}", start=begin, end=end)
            if len(content) > end - begin:
                raise _Refusal("it sends whole files where a range of bytes is asked for. Use a server that has ranges")
            if len(content) in came:  # a connection is not cut twice at the same byte
                raise _Refusal("it has fewer bytes than asked for: publish it again")
            if len(content) < end - begin:
                came.add(len(content))
                raise OSError(f"{len(content):,} bytes came")
            return content

        return self._retried(f"bytes {begin:,} to {end:,} of {self.url}/{name}", ask)

    def read_small(self, name: str, max_bytes: int) -> bytes:
        """A whole file. Raises ValueError if it has more than max_bytes; FileNotFoundError, StoreError."""

        def ask() -> bytes:
            content: bytes = self._fs.cat_file(f"{self._path}/{name}", start=0, end=max_bytes + 1)
            return content

        content = self._retried(f"{self.url}/{name}", ask)
        if len(content) > max_bytes:
            raise ValueError(f"{self.url}/{name} has more than {max_bytes:,} bytes. Is it the right file?")
        return content

    def names(self) -> dict[str, int]:
        """Files that lie there, with their bytes; {} if there are none. Raises StoreError; ValueError of a web server,
        which has no list."""
        self._check_writable("listed")

        def ask() -> dict[str, int]:
            found, folder = self._fs.find(self._path, detail=True), f"{self._path}/"
            # A server over folders may name the folder itself.
            return {path[len(folder) :]: int(found[path]["size"]) for path in found if path.startswith(folder)}

        return self._retried(f"the list of {self.url}", ask, _NO_BUCKET)

    def put(self, file: Path, name: str) -> None:
        """Store a file. It appears when it is whole, or not at all: so object stores are. Raises as `names` does."""
        self._check_writable("written")
        num_bytes = file.stat().st_size
        more: dict[str, Any] = {}
        if self._scheme == "s3":
            more = {"chunksize": _PART_BYTES}
            if num_bytes < 2 * _PART_BYTES:  # with s3fs, one request
                with open(file, "rb") as content:
                    more |= _proof(hashlib.file_digest(content, "md5").digest())

        def give() -> None:
            self._fs.put_file(str(file), f"{self._path}/{name}", **more)
            stored = int(self._fs.info(f"{self._path}/{name}", refresh=True)["size"])
            if stored != num_bytes:
                raise OSError(f"{stored:,} bytes were stored of {num_bytes:,}")

        self._retried(f"{self.url}/{name}", give, _NO_BUCKET)

    def put_bytes(self, content: bytes, name: str) -> None:
        """Store a small file."""
        self._check_writable("written")
        more = _proof(hashlib.md5(content).digest()) if self._scheme == "s3" else {}
        self._retried(
            f"{self.url}/{name}", lambda: self._fs.pipe_file(f"{self._path}/{name}", content, **more), _NO_BUCKET
        )

    def _check_writable(self, what: str) -> None:
        if self._scheme in ("http", "https"):
            raise ValueError(f"{self.url}: a web server's files are read, and cannot be {what}. Give an s3:// URL.")

    def _retried(self, what: str, ask: Callable[[], Result], missing: str = "no such file in the store") -> Result:
        """ask(), again after each of the pauses while what it raises may pass.

        missing: what a FileNotFoundError means.
        """
        for attempt, pause in enumerate([*self._pauses_s, None], 1):
            try:
                return ask()
            except FileNotFoundError:
                raise FileNotFoundError(2, missing, what) from None
            except Exception as error:
                if (refusal := _refusal(error)) is not None:
                    raise StoreError(f"{what}: {refusal}.") from error
                if pause is None:
                    raise StoreError(
                        f"{what}: {attempt} attempts failed, the last with {_describe(error)}. Is the server up? The "
                        "same command goes on from here."
                    ) from error
                logger.warning("%s: %s; again in %g s", what, _describe(error), pause)
                time.sleep(pause)
        raise AssertionError("the last attempt returns or raises")


def _proof(md5: bytes) -> dict[str, str]:
    """What lets a server refuse bytes that changed on their way.

    botocore adds a CRC-32 to every request that stores, which S3 checks; some servers of its kind ignore it, as they
    do the SHA-256 that is signed. This older header all know, but it is for one request: parts have the CRC-32 alone.
    """
    return {"ContentMD5": base64.b64encode(md5).decode()}


class _Refusal(Exception):
    """What no further attempt changes; the text says what, and what to do."""


def _refusal(error: Exception) -> str | None:
    """What to say of an error that will not pass; None if it may."""
    status = getattr(error, "status", None)
    if isinstance(error, _Refusal):
        return str(error)
    if isinstance(error, PermissionError) or status in _REFUSED:
        return f"access is refused ({_describe(error)}). Check the credentials, and what they may do"
    if isinstance(error, ImportError):
        return str(error).rstrip(".")
    if isinstance(error, ValueError) or (status is not None and status not in _PASSING):
        return f"{_describe(error)}. Check the URL"
    if type(error).__name__ == "NoCredentialsError":  # of botocore, which need not be here
        return "there are no credentials. Set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or a profile"
    return None


def _describe(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:200]}".rstrip(": .")


def _filesystem(scheme: str) -> Any:
    """fsspec's file system, with short patience of its own: attempts are counted here."""
    try:
        import fsspec

        if scheme == "s3":
            config = {"connect_timeout": _CONNECT_S, "read_timeout": _SILENCE_S, "retries": {"max_attempts": 1}}
            filesystem = fsspec.filesystem(
                "s3", config_kwargs=config, use_listings_cache=False, skip_instance_cache=True
            )
            filesystem.retries = 1
            return filesystem
        import aiohttp
    except ImportError as error:
        raise ImportError(f"{scheme}:// needs fsspec with {error.name}: pip install 'two-stream[remote]'.") from error
    timeout = aiohttp.ClientTimeout(total=None, sock_connect=_CONNECT_S, sock_read=_SILENCE_S)
    return fsspec.filesystem(
        scheme, client_kwargs={"timeout": timeout}, use_listings_cache=False, skip_instance_cache=True
    )
