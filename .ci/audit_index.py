"""Known vulnerabilities of pinned packages, from the package index that pip is configured for."""

import base64
import json
import os
import re
import ssl
import subprocess
import sys
import urllib.error
import urllib.request
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any
from urllib.parse import urlsplit, urlunsplit

from audit_finding import Finding

# Vulnerabilities that cannot be met here, each with the reason why: {"ID": "reason"}.
ACCEPTED: dict[str, str] = {}
_TIMEOUT_S = 20.0


class UnknownError(RuntimeError):
    """Nothing can be said of vulnerabilities, for this reason."""


class Index:
    """The package index that pip is configured for, by its JSON answers."""

    def __init__(self) -> None:
        address = _pip_setting("index-url") or _default_index()
        parts = urlsplit(address)
        path = re.sub(r"/simple/?$", "", parts.path)
        host = parts.hostname or ""
        netloc = f"{host}:{parts.port}" if parts.port else host
        self._base = urlunsplit((parts.scheme, netloc, path, "", ""))
        self._headers = {"Accept": "application/json"}
        if parts.username:
            pair = base64.b64encode(f"{parts.username}:{parts.password or ''}".encode()).decode()
            self._headers["Authorization"] = f"Basic {pair}"
        self._context = ssl.create_default_context(cafile=_pip_setting("cert") or None)

    def vulnerabilities(self, name: str, version: str) -> list[dict[str, Any]]:
        """What is known of one version. UnknownError if the index does not say."""
        public = version.partition("+")[0]  # builds with a local label are not on the index
        if not self._base.startswith(("https://", "http://")):
            raise UnknownError("pip's index is no web address")
        request = urllib.request.Request(f"{self._base}/pypi/{name}/{public}/json", headers=self._headers)  # noqa: S310
        try:
            with urllib.request.urlopen(request, timeout=_TIMEOUT_S, context=self._context_for()) as answer:  # noqa: S310
                said = json.load(answer)
        except urllib.error.HTTPError as error:
            raise UnknownError(f"pip's index answers HTTP {error.code}") from None
        except (OSError, ValueError) as error:
            raise UnknownError(f"pip's index cannot be asked ({type(error).__name__})") from None
        known = said.get("vulnerabilities") if isinstance(said, dict) else None
        if not isinstance(known, list):
            raise UnknownError("pip's index says nothing of vulnerabilities")
        return [one for one in known if not one.get("withdrawn")]

    def _context_for(self) -> ssl.SSLContext | None:
        return self._context if self._base.startswith("https://") else None


def _pip(*arguments: str) -> str:
    done = subprocess.run(  # noqa: S603 - our own command
        [sys.executable, "-m", "pip", *arguments], capture_output=True, text=True, check=False, timeout=60
    )
    return done.stdout if done.returncode == 0 else ""


def _pip_setting(name: str) -> str:
    """A setting as pip would see it for `pip install`."""
    asked = os.environ.get(f"PIP_{name.upper().replace('-', '_')}")
    return asked or next(
        (value for key in ("install", "global") if (value := _pip("config", "get", f"{key}.{name}").strip())),
        "",
    )


def _default_index() -> str:
    """pip's own default, which its help names."""
    match = re.search(r"\(default\s+(https?://\S+?)\)", _pip("install", "--help"))
    return match[1] if match else ""


def vulnerabilities(pins: Mapping[str, str], index: Index) -> tuple[list[Finding], dict[str, str]]:
    """Findings, and for what could not be asked the reason. One question first: an index that knows nothing
    is not asked for every package.
    """
    first = next(iter(pins))
    try:
        index.vulnerabilities(first, pins[first])
    except UnknownError as error:
        return [], dict.fromkeys(pins, str(error))

    def ask(item: tuple[str, str]) -> list[dict[str, Any]] | UnknownError:
        try:
            return index.vulnerabilities(*item)
        except UnknownError as error:
            return error

    with ThreadPoolExecutor(max_workers=8) as pool:
        answers = dict(zip(pins, pool.map(ask, pins.items()), strict=True))
    findings, unknown = [], {}
    for name, answer in answers.items():
        if isinstance(answer, UnknownError):
            unknown[name] = str(answer)
            continue
        for one in answer:
            names = [str(one.get("id")), *map(str, one.get("aliases") or [])]
            if ACCEPTED.keys().isdisjoint(names):
                fixed = ", ".join(map(str, one.get("fixed_in") or [])) or "no version yet"
                findings.append(Finding(f"{name} {pins[name]}: {' = '.join(names)}", f"mended in {fixed}"))
    return findings, unknown
