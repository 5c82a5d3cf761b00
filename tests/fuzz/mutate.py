"""Changes to files that keep them plausible, so that they get past the first check: `mutate(data, rng) -> data`."""

import io
import json
import struct
import tarfile
import zipfile
import zlib
from collections.abc import Callable
from copy import deepcopy
from random import Random
from typing import Any

import numpy as np

from flow.index import VIDEO
from flow.shard import ENTRY

Mutator = Callable[[bytes, Random], bytes]

#: Where readers break: borders of integer types, sizes of the format, and what Python's json takes for a number.
INTEGERS = [0, 1, -1, 2, 63, 64, 65, 127, 128, 255, 256, 32_767, 65_500, 65_535, 65_536, 1 << 24]
INTEGERS += [sign * ((1 << bits) + off) for bits in (31, 32, 53, 63, 64) for off in (-1, 0, 1) for sign in (1, -1)]
VALUES: list[Any] = [*INTEGERS, 0.0, -0.0, 0.5, 1e-320, 1e39, 1e308, 1e400, float("nan"), float("-inf"), 10**400]
VALUES += [
    None,
    True,
    False,
    "",
    "a",
    "0",
    "..",
    "../../x",
    "/x",
    "a/../b",
    "\0",
    "\ud800",
    "\x1b[31m",
    "{}",
    "x" * 5000,
]
VALUES += [[], {}, [[]], [None], {"": None}, "shard-000000.tar", "__x__", "a\nb", "ß/ü", "%n%s", "$(id)", "1" * 5000]


def mutate_bytes(data: bytes, rng: Random) -> bytes:
    """Truncate, flip, zero, splice, duplicate, insert, or write an extreme integer, once or a few times."""
    for _ in range(rng.choice((1, 1, 2, 4, 8))):
        data = rng.choice(_BYTE_CHANGES)(bytearray(data), rng)
    return bytes(data)


def _span(data: bytearray, rng: Random) -> slice:
    start = rng.randrange(len(data) + 1)
    return slice(start, min(len(data), start + rng.choice((1, 2, 4, 16, 64, 512, 4096))))


def _truncate(data: bytearray, rng: Random) -> bytes:
    return bytes(data[: rng.randrange(len(data) + 1)])


def _flip(data: bytearray, rng: Random) -> bytes:
    for _ in range(rng.choice((1, 1, 3, 16)) if data else 0):
        data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
    return bytes(data)


def _zero(data: bytearray, rng: Random) -> bytes:
    span = _span(data, rng)
    data[span] = bytes([rng.choice((0, 255))]) * len(data[span])
    return bytes(data)


def _splice(data: bytearray, rng: Random) -> bytes:
    source, target = data[_span(data, rng)], _span(data, rng)
    data[target] = source
    return bytes(data)


def _duplicate(data: bytearray, rng: Random) -> bytes:
    span = _span(data, rng)
    return bytes(data[: span.stop] + data[span] * rng.choice((1, 1, 2, 50)) + data[span.stop :])


def _insert(data: bytearray, rng: Random) -> bytes:
    at = rng.randrange(len(data) + 1)
    return bytes(data[:at] + rng.randbytes(rng.choice((1, 2, 8, 100))) + data[at:])


def _integer(data: bytearray, rng: Random) -> bytes:
    """Overwrite with an integer of 1 to 8 bytes, of either byte order."""
    size, order = rng.choice((1, 2, 4, 8)), rng.choice(("little", "big"))
    value = (rng.choice(INTEGERS) % (1 << 8 * size)).to_bytes(size, order)
    at = rng.randrange(max(1, len(data) - size + 1))
    data[at : at + size] = value
    return bytes(data)


_BYTE_CHANGES = (_truncate, _flip, _zero, _splice, _duplicate, _insert, _integer)


def mutate_text(data: bytes, rng: Random) -> bytes:
    """Lines and words of a text: doubled, dropped, swapped, replaced by extremes; or its bytes."""
    lines = data.split(b"\n")
    for _ in range(rng.choice((1, 1, 3))):
        at, other = rng.randrange(len(lines)), rng.randrange(len(lines))
        match rng.randrange(5):
            case 0:
                lines.insert(at, lines[other])
            case 1 if len(lines) > 1:
                del lines[at]
            case 2:
                lines[at], lines[other] = lines[other], lines[at]
            case 3:
                words = lines[at].split(b" ")
                words[rng.randrange(len(words))] = str(rng.choice(VALUES)).encode("utf-8", "surrogatepass")
                lines[at] = b" ".join(words)
            case _:
                return mutate_bytes(data, rng)
    return b"\n".join(lines)


def mutate_json(data: bytes, rng: Random) -> bytes:
    """Replace, drop, double or nest values of a JSON text; or its bytes, if they are none or one time in eight."""
    try:
        tree = [json.loads(data)]
    except (ValueError, RecursionError):
        return mutate_bytes(data, rng)
    if rng.randrange(8) == 0:
        return mutate_bytes(data, rng)
    for _ in range(rng.choice((1, 1, 1, 2, 5))):
        parent, key = rng.choice(list(places(tree)))
        match rng.randrange(7):
            case 0 if parent is not tree:
                del parent[key]
            case 1 if isinstance(parent, list) and parent is not tree:
                parent.insert(key, parent[key])
            case 2:
                parent[key] = _nested(parent[key], rng.choice((1, 1, 3, 200)), rng)
            case 3:
                parent[key] = json.loads(json.dumps(_at(rng.choice(list(places(tree))))))
            case _:
                parent[key] = deepcopy(rng.choice(VALUES))  # it may be changed in its turn
    return json.dumps(tree[0], ensure_ascii=rng.random() < 0.5).encode("utf-8", "surrogatepass")


def places(tree: Any) -> Any:
    """(container, key or position) of every value in a JSON tree, the tree being a list of one."""
    stack = [(tree, 0)]
    while stack:
        parent, key = stack.pop()
        yield parent, key
        value = parent[key]
        if isinstance(value, dict):
            stack += [(value, name) for name in value]
        elif isinstance(value, list):
            stack += [(value, at) for at in range(len(value))]


def _at(place: tuple[Any, Any]) -> Any:
    return place[0][place[1]]


def _nested(value: Any, depth: int, rng: Random) -> Any:
    for _ in range(depth):
        value = [value] if rng.random() < 0.5 else {"a": value}
    return value


def mutate_zip(data: bytes, rng: Random) -> bytes:
    """Change one member of a zip, or which there are, and write the archive anew with right checksums."""
    try:
        with zipfile.ZipFile(io.BytesIO(data)) as archive:
            members = [(info.filename, archive.read(info)) for info in archive.infolist() if info.file_size < 1 << 20]
    except Exception:  # whatever zipfile raises for what is no zip
        members = []
    if not members or rng.randrange(4) == 0:
        return mutate_bytes(data, rng)
    at = rng.randrange(len(members))
    name, content = members[at]
    match rng.randrange(6):
        case 0:
            del members[at]
        case 1:
            members[at] = rng.choice(members)[0], content
        case 2:
            members[at] = name, rng.choice(members)[1]
        case _:
            members[at] = name, mutate_bytes(content, rng)
    buffer = io.BytesIO()
    method = rng.choice((zipfile.ZIP_STORED, zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED))
    with zipfile.ZipFile(buffer, "w", method) as archive:
        for name, content in members:
            archive.writestr(zipfile.ZipInfo(name), content, method)
    return buffer.getvalue()


def mutate_safetensors(data: bytes, rng: Random) -> bytes:
    """Change the JSON header, or the JSON in its metadata, with its length right; or the weights' bytes."""
    end = 8 + int.from_bytes(data[:8], "little")
    try:
        header = json.loads(data[8:end])
        ((key, text),) = header["__metadata__"].items()
        inside = text.encode("utf-8", "surrogatepass")
    except Exception:  # whatever becomes of a header that was changed before
        return mutate_bytes(data, rng)
    match rng.randrange(4):
        case 0:
            return mutate_bytes(data, rng)
        case 1:
            return data[:end] + mutate_bytes(data[end:], rng)
        case 2:
            changed = mutate_json(data[8:end], rng)
        case _:
            inside = mutate_json(inside, rng)
            changed = json.dumps({**header, "__metadata__": {key: inside.decode("utf-8", "replace")}}).encode()
    return len(changed).to_bytes(8, "little") + changed + data[end:]


def mutate_tar(data: bytes, rng: Random) -> bytes:
    """Change a header's field, with its checksum right, or a member's content, or which members there are."""
    members = _tar_members(data)
    if not members or rng.randrange(4) == 0:
        return mutate_bytes(data, rng)
    at = rng.randrange(len(members))
    header, content = members[at]
    match rng.randrange(6):
        case 0:
            del members[at]
        case 1:
            members.insert(at, rng.choice(members))
        case 2:
            other = rng.randrange(len(members))
            members[at], members[other] = members[other], members[at]
        case 3:
            members[at] = _with_field(header, rng), content
        case _:
            change = mutate_json if content[:1] == b"{" else mutate_bytes
            content = change(content, rng)
            members[at] = sealed(header[:124] + b"%011o\0" % len(content) + header[136:]), content
    return b"".join(header + content + bytes(-len(content) % 512) for header, content in members) + bytes(1024)


def _tar_members(data: bytes) -> list[tuple[bytes, bytes]]:
    """(header, content) of the members of a tar, as far as it is one."""
    members, at = [], 0
    while at + 512 <= len(data) and data[at] != 0:
        try:
            size = tarfile.TarInfo.frombuf(data[at : at + 512], "utf-8", "surrogateescape").size
        except tarfile.HeaderError:
            break
        if not 0 <= size <= len(data):
            break
        members.append((data[at : at + 512], data[at + 512 : at + 512 + size]))
        at += 512 + size + -size % 512
    return members


#: Fields of a tar header: name, mode, size, type, link, magic, prefix.
_FIELDS = ((0, 100), (100, 8), (124, 12), (156, 1), (157, 100), (257, 8), (345, 155))


def _with_field(header: bytes, rng: Random) -> bytes:
    at, size = rng.choice(_FIELDS)
    values = [b"../../x", b"/x", b"\xff" * size, b"%011o\0" % (1 << 32), b"\x80" + bytes(6) + b"\x7f\xff\xff\xff\xff"]
    values += [
        b"\xff" * 12,
        b"a" * size,
        bytes(size),
        bytes([rng.choice(b"0123456789LKxgSVMND\0")]),
        rng.randbytes(size),
    ]
    value = rng.choice(values)[:size]
    return sealed(header[:at] + value.ljust(size, b"\0") + header[at + size :])


def sealed(header: bytes) -> bytes:
    """A tar header with the checksum that it must have."""
    blank = header[:148] + b" " * 8 + header[156:]
    return blank[:148] + b"%06o\0 " % sum(blank) + blank[156:]


def mutate_jpeg(data: bytes, rng: Random) -> bytes:
    """Headers more often than the scan, and the end marker, which is checked first, put back."""
    split = rng.choice((len(data), 700, 700, 160))
    changed = mutate_bytes(data[:split], rng) + data[split:]
    return changed if rng.randrange(8) == 0 or changed.endswith(b"\xff\xd9") else changed + b"\xff\xd9"


def mutate_index(data: bytes, rng: Random) -> bytes:
    """Change the JSON header or an array's value, with the checksums right: of the tables, and of an entry's range."""
    try:
        magic, _, length = _INDEX_HEAD.unpack_from(data)
        text, body = data[_INDEX_HEAD.size :][:length], bytearray(data[_INDEX_HEAD.size + length :])
        places = json.loads(text)["arrays"]
        arrays = {name: np.frombuffer(body, _TABLES[name], at["count"], at["offset"]) for name, at in places.items()}
        videos, names = arrays["videos"], arrays["names"]
    except Exception:  # whatever becomes of a head that was changed before
        return mutate_bytes(data, rng)
    if rng.randrange(8) == 0:
        return mutate_bytes(data, rng)
    if rng.randrange(3) == 0:
        text = mutate_json(text, rng)
    for _ in range(rng.choice((0, 1, 1, 2))):
        table = arrays[rng.choice(sorted(arrays))]
        if len(table):
            _change_row(table, rng)
    crc32 = zlib.crc32(names, zlib.crc32(videos, zlib.crc32(text)))
    return _INDEX_HEAD.pack(magic, crc32, len(text)) + text + body


#: Magic, CRC-32 of JSON header, videos and names, length of the header.
_INDEX_HEAD = struct.Struct("<8sII")
_TABLES = {"videos": VIDEO, "names": np.dtype(np.uint8), **ENTRY}


def _change_row(table: np.ndarray, rng: Random) -> None:
    """Write an extreme, or another row's value, in one place of a table."""
    row, other = rng.randrange(len(table)), rng.randrange(len(table))
    if table.dtype.names is None:
        table[row] = rng.choice((0, 10, 47, 46, 128, 255))
        return
    key = rng.choice(table.dtype.names)
    size = table.dtype[key].itemsize
    column, before = table[key].view(f"u{size}"), zlib.crc32(table[row : row + 1].tobytes()[16:])
    extreme = rng.choice(_FLOAT_BITS if table.dtype[key].kind == "f" else INTEGERS) % (1 << 8 * size)
    column[row] = rng.choice((column[other], extreme))
    if "crc32" in table.dtype.names and key != "crc32":  # CRC-32 is linear: the JPEG's own part of it stays as it is
        table["crc32"][row] ^= before ^ zlib.crc32(table[row : row + 1].tobytes()[16:])


#: 0, -0, the smallest, the largest, both infinities, NaN.
_FLOAT_BITS = (0, 0x80000000, 1, 0x7F7FFFFF, 0xFF7FFFFF, 0x7F800000, 0xFF800000, 0x7FC00000)
