"""Which of Ray's processes listen beyond loopback, from /proc. Standard library only; see doctor_facts.

A process is under token authentication if its environment says RAY_AUTH_MODE=token. Ray's workers write their
title over their environment, so where a process says nothing its parents are asked. Some of Ray's servers ask
for no token even so (those for metrics), hence each port is also asked for a page.
"""

import contextlib
import http.client
import ipaddress
from pathlib import Path
from typing import Any

_LISTENING = "0A"
_RAY_MARKS = (
    "gcs_server",
    "raylet",
    "ray::",
    "ray-dashboard",
    "/ray/dashboard/",
    "/ray/_private/",
    "/ray/util/",
)
_GENERATIONS = 4
_PAGES = ("/", "/metrics", "/api/jobs/")
_ANSWER_S = 2.0


def ray_listeners(proc: str = "/proc") -> tuple[list[dict[str, Any]], int]:
    """Sockets of Ray that other machines can reach, and how many Ray processes could not be looked at."""
    root = Path(proc)
    reachable = _reachable_sockets(root)
    found: list[dict[str, Any]] = []
    hidden = 0
    for folder in sorted(root.glob("[0-9]*"), key=lambda path: int(path.name)):
        title = _title(folder)
        if not any(mark in title for mark in _RAY_MARKS):
            continue
        inodes = _inodes(folder)
        if inodes is None:
            hidden += 1
            continue
        for inode in sorted(inodes & reachable.keys()):
            address, port = reachable[inode]
            name = Path(title.split("\0", 1)[0]).name or title
            auth = "none: it gives pages to anyone" if gives_pages(address, port) else _auth(root, folder)
            found.append({"process": name, "address": address, "port": port, "auth": auth})
    return found, hidden


def gives_pages(address: str, port: int) -> bool:
    """Whether a port answers HTTP without a token, other than by refusing."""
    anywhere = ipaddress.ip_address(address).is_unspecified
    for page in _PAGES:
        connection = http.client.HTTPConnection("127.0.0.1" if anywhere else address, port, timeout=_ANSWER_S)
        try:
            connection.request("GET", page)
            if connection.getresponse().status < http.client.BAD_REQUEST:
                return True
        except (OSError, http.client.HTTPException):  # it speaks something else, or is too slow
            return False
        finally:
            connection.close()
    return False


def _reachable_sockets(root: Path) -> dict[str, tuple[str, int]]:
    """Listening TCP sockets that are not on loopback, by inode."""
    sockets: dict[str, tuple[str, int]] = {}
    for name in ("tcp", "tcp6"):
        try:
            lines = (root / "net" / name).read_text(encoding="ascii").splitlines()[1:]
        except OSError:  # no IPv6 on this host
            continue
        for line in lines:
            fields = line.split()
            if fields[3] != _LISTENING:
                continue
            where, port = fields[1].split(":")
            address = _address(where)
            if not address.is_loopback:
                sockets[fields[9]] = (str(address), int(port, 16))
    return sockets


def _address(text: str) -> ipaddress.IPv4Address | ipaddress.IPv6Address:
    """The kernel prints 32-bit words, each with its bytes in the order of a little-endian CPU."""
    raw = bytes.fromhex(text)
    swapped = b"".join(raw[place : place + 4][::-1] for place in range(0, len(raw), 4))
    address = ipaddress.ip_address(swapped)
    mapped = getattr(address, "ipv4_mapped", None)
    return mapped or address


def _title(folder: Path) -> str:
    try:
        return (folder / "cmdline").read_bytes().decode("utf-8", "replace")
    except OSError:  # it has ended meanwhile
        return ""


def _inodes(folder: Path) -> set[str] | None:
    """Inodes of the sockets that a process holds; None where it may not be looked at."""
    links: set[str] = set()
    try:
        for entry in (folder / "fd").iterdir():
            with contextlib.suppress(FileNotFoundError):  # closed meanwhile
                links.add(str(entry.readlink()))
    except PermissionError:
        return None
    except OSError:  # the process has ended meanwhile
        return set()
    return {link[8:-1] for link in links if link.startswith("socket:[")}


def _auth(root: Path, folder: Path) -> str:
    for _ in range(_GENERATIONS):
        try:
            entries = (folder / "environ").read_bytes().split(b"\0")
            status = (folder / "status").read_text(encoding="utf-8", errors="replace")
        except OSError:
            return "?"
        for entry in entries:
            if entry.startswith(b"RAY_AUTH_MODE="):
                return entry.split(b"=", 1)[1].decode("utf-8", "replace").lower()
        parent = next((line.split()[1] for line in status.splitlines() if line.startswith("PPid:")), "0")
        if parent == "0":
            break
        folder = root / parent
    return ""
