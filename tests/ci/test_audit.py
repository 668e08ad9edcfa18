"""The audit of dependencies: what it refuses, and that it claims nothing that it could not check."""

import importlib
import json
import sys
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from importlib.metadata import Distribution
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]
sys.path.append(str(ROOT / ".ci"))
audit = importlib.import_module("audit")
audit_index = importlib.import_module("audit_index")
audit_licences = importlib.import_module("audit_licences")


def texts(findings: Any) -> list[str]:
    found = list(findings)
    assert all(one.remedy for one in found)
    return [one.what for one in found]


def test_this_environment_is_in_order(capsys: pytest.CaptureFixture[str]) -> None:
    status = audit.main([])
    out = capsys.readouterr().out
    assert status == 0, out
    assert out.rstrip().endswith("audit: in order; vulnerabilities NOT CHECKED")


# ---- the lock ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "line",
    [
        "foo",
        "foo>=1",
        "foo==1.*",
        "foo==1,<2",
        "foo @ https://x/foo.whl",
        "-e .",
        "--index-url https://x",
        "foo==1 ; x",
    ],
)
def test_a_lock_has_exact_pins_only(line: str) -> None:
    pins, findings = audit.read_pins(f"bar==1.0+cpu  # why\n\n{line}\n")
    assert pins == {"bar": "1.0+cpu"}
    assert texts(findings) == [f"line 3 is no exact pin: {line}"]


def test_a_name_stands_once() -> None:
    _, findings = audit.read_pins("Foo_bar==1\nfoo-bar==2\n")
    assert texts(findings) == ["line 2: foo-bar stands there twice"]


def test_installed_is_what_is_pinned_and_nothing_beside() -> None:
    pins = {"a": "1", "b": "2", "c": "3", "d": "4"}
    installed = {"a": ["1"], "b": ["2.1"], "d": ["4", "5"], "headrace": ["0"], "pip": ["9"], "stray": ["7"]}
    assert texts(audit.compare(pins, installed)) == [
        "b is pinned to 2, installed is 2.1",
        "c is pinned to 3, installed is none",
        "d is pinned to 4, installed is 4 and 5",
        "stray 7 is installed and not in the lock",
    ]


def test_a_pin_that_nothing_asks_for() -> None:
    asks = {
        "headrace": [
            "a[fast]>=1",
            "dev-tool; extra == 'dev'",
            "gpu; extra == 'cuda'",
            "b; python_version < '3'",
        ],
        "a": ["c; extra == 'fast'", "d; extra == 'slow'", "e"],
    }
    pins = ["a", "b", "c", "d", "dev-tool", "e", "gpu", "ninja"]
    # b is for another Python, d and gpu belong to extras that nobody chose; ninja builds DeepSpeed.
    assert texts(audit.unneeded(pins, lambda name: asks.get(name, []))) == [
        f"{name} is in the lock and nothing asks for it" for name in ("b", "d", "gpu")
    ]


def test_another_owner_of_our_names_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert texts(audit.owners()) == []
    info = tmp_path / "cluster_tools-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: cluster-tools\nVersion: 1.0\n")
    (info / "RECORD").write_text("cluster/__init__.py,,\ncluster_tools-1.0.dist-info/METADATA,,\n")
    (tmp_path / "cluster").mkdir()
    monkeypatch.syspath_prepend(str(tmp_path))
    assert sorted(texts(audit.owners())) == sorted(
        [f"{tmp_path} holds another 'cluster'", "cluster-tools owns the package 'cluster' too"]
    )


# ---- licences ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("licence", "kind"),
    [
        ("MIT", "permissive"),
        ("MIT-0", "permissive"),
        ("3-Clause BSD License", "permissive"),
        ("Apache-2.0 WITH LLVM-exception", "permissive"),
        ("BSL-1.0", "permissive"),  # Boost
        ("BUSL-1.1", "refused"),  # Business Source
        ("MPL-2.0 AND MIT", "weak"),
        ("GNU Lesser General Public License v2 (LGPLv2)", "weak"),
        ("GPL-3.0-or-later", "refused"),
        ("GNU Affero General Public License v3", "refused"),
        ("AGPL-3.0-only AND MIT", "refused"),
        ("AGPL-3.0-only OR MIT", "permissive"),
        ("MIT AND LicenseRef-Own", "unknown"),
        ("Other/Proprietary License", "unknown"),
        ("", "unknown"),
    ],
)
def test_kinds_of_licence(licence: str, kind: str) -> None:
    assert audit_licences.kind_of(licence) == kind


@pytest.mark.parametrize(
    ("metadata", "text", "licence"),
    [
        ("License-Expression: ISC\nLicense: GPL", "", "ISC"),
        (
            "License: Copyright (c) somebody\nClassifier: License :: OSI Approved :: MIT License",
            "",
            "MIT License",
        ),
        ("License: BSD\nClassifier: License :: OSI Approved :: MIT License", "", "BSD"),
        ("Summary: x", "  Apache License\n Version 2.0, January 2004\n", "Apache-2.0"),
        ("Summary: x", "Do what I say.", "Do what I say."),
        ("Summary: x", "", ""),
    ],
)
def test_where_a_licence_stands(metadata: str, text: str, licence: str, tmp_path: Path) -> None:
    assert audit_licences.licence_of(Distribution.at(write_distribution(tmp_path, metadata, text))) == licence


def test_a_licence_that_nobody_knows_is_a_finding(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_distribution(tmp_path, "License-Expression: AGPL-3.0-only", "")
    monkeypatch.syspath_prepend(str(tmp_path))
    table, findings = audit_licences.licences()
    assert table["odd-one"] == ("AGPL-3.0-only", "refused")
    assert texts(findings) == ["odd-one: licence AGPL-3.0-only"]


def write_distribution(folder: Path, metadata: str, text: str) -> Path:
    info = folder / "odd_one-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.4\nName: odd-one\nVersion: 1.0\n{metadata}\n")
    (info / "RECORD").write_text("odd_one-1.0.dist-info/LICENSE,,\n")
    if text:
        (info / "LICENSE").write_text(text)
    return info


# ---- vulnerabilities --------------------------------------------------------------------------------------

Serve = Callable[[dict[str, Any]], list[str]]


@pytest.fixture
def serve(monkeypatch: pytest.MonkeyPatch) -> Iterator[Serve]:
    """An index on loopback that answers by path; gives the list of paths it was asked for."""
    servers: list[ThreadingHTTPServer] = []

    def start(answers: dict[str, Any]) -> list[str]:
        asked: list[str] = []

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                asked.append(self.path)
                answer = answers.get(self.path)
                body = answer if isinstance(answer, bytes) else json.dumps(answer).encode()
                self.send_response(404 if answer is None else 200)
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                self.wfile.write(body)

            def log_message(self, *_: object) -> None: ...

        server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        threading.Thread(target=server.serve_forever, daemon=True).start()
        servers.append(server)
        monkeypatch.setenv("PIP_INDEX_URL", f"http://127.0.0.1:{server.server_port}/root/simple/")
        for name in ("http_proxy", "HTTP_PROXY"):
            monkeypatch.delenv(name, raising=False)
        return asked

    yield start
    for server in servers:
        server.shutdown()
        server.server_close()


def known(*entries: dict[str, Any]) -> dict[str, Any]:
    return {"info": {}, "vulnerabilities": list(entries)}


def test_known_vulnerabilities_are_findings(serve: Serve) -> None:
    bad = {"id": "PYSEC-1", "aliases": ["CVE-1"], "fixed_in": ["1.2", "2.0"], "withdrawn": None}
    gone = {"id": "PYSEC-2", "aliases": [], "fixed_in": [], "withdrawn": "2026-01-01"}
    asked = serve({"/root/pypi/a/1.0/json": known(gone), "/root/pypi/b/1.1/json": known(bad)})
    findings, unknown = audit_index.vulnerabilities(
        {"a": "1.0", "b": "1.1+cpu", "c": "3"}, audit_index.Index()
    )
    assert texts(findings) == ["b 1.1+cpu: PYSEC-1 = CVE-1"]
    assert findings[0].remedy == "mended in 1.2, 2.0"
    assert unknown == {"c": "pip's index answers HTTP 404"}
    assert set(asked) == {f"/root/pypi/{name}/json" for name in ("a/1.0", "b/1.1", "c/3")}


def test_an_accepted_vulnerability_is_none(serve: Serve, monkeypatch: pytest.MonkeyPatch) -> None:
    serve({"/root/pypi/a/1/json": known({"id": "PYSEC-1", "aliases": ["CVE-1"]})})
    monkeypatch.setitem(audit_index.ACCEPTED, "CVE-1", "its function is never called")
    assert audit_index.vulnerabilities({"a": "1"}, audit_index.Index()) == ([], {})


@pytest.mark.parametrize(
    ("answer", "reason"),
    [
        (None, "HTTP 404"),
        ({"info": {}}, "says nothing of vulnerabilities"),
        ([], "says nothing of vulnerabilities"),
        (b"<html>", "cannot be asked (JSONDecodeError)"),
    ],
)
def test_an_index_that_does_not_say_is_told_of_and_asked_once(answer: Any, reason: str, serve: Serve) -> None:
    asked = serve({"/root/pypi/a/1/json": answer})
    findings, unknown = audit_index.vulnerabilities({"a": "1", "b": "2"}, audit_index.Index())
    assert findings == []
    assert set(unknown) == {"a", "b"}
    assert reason in unknown["b"]
    assert len(asked) == 1


@pytest.mark.parametrize(("option", "status"), [("--vulnerabilities", 0), ("--require-vulnerabilities", 1)])
def test_no_answer_is_never_called_success(
    option: str, status: int, serve: Serve, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    asked = serve({})
    assert audit.main([option]) == status
    out = capsys.readouterr().out
    assert "! vulnerabilities NOT CHECKED: pip's index answers HTTP 404" in out
    assert "no known vulnerability" not in out
    assert out.rstrip().endswith("vulnerabilities NOT CHECKED")
    assert len(asked) == 1


def test_an_index_of_files_cannot_be_asked(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PIP_INDEX_URL", tmp_path.as_uri())
    with pytest.raises(audit_index.UnknownError, match="no web address"):
        audit_index.Index().vulnerabilities("a", "1")
