"""`headrace doctor`: everything that can be checked before a launch, with a remedy for each finding.

    this machine, or every host of a Ray cluster → facts → checks of hosts ─┐
    configuration → model, rewards, data, W&B → checks of the job ──────────┴→ table or JSON, exit status

It changes nothing: data is read into a temporary folder that is gone afterwards, and nothing is downloaded.
"""

import argparse
import dataclasses
import json
import socket
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

from rich.console import Console
from rich.table import Table
from rich.text import Text

from cluster import doctor_cluster
from cluster.config import JobConfig
from cluster.config_file import load_config
from cluster.doctor_facts import gather
from cluster.doctor_host import cores_check, host_checks
from cluster.doctor_job import input_checks, wandb_check
from cluster.doctor_model import model_checks
from cluster.doctor_needs import Needs, needs_of
from cluster.doctor_packages import package_checks, read_lock
from cluster.doctor_records import JOB, Check, HostFacts, Status
from cluster.redact import scrub

LOCAL = "local"
_MARKS: dict[Status, tuple[str, str]] = {
    "ok": ("✓", "green"),
    "warn": ("!", "yellow"),
    "fail": ("✗", "bold red"),
    "skipped": ("–", "dim"),
}


def run_doctor(options: argparse.Namespace) -> bool:
    """Check, print, and tell whether nothing failed. ValueError for the user's mistakes."""
    if options.config is None and options.overrides:
        raise ValueError(
            f"--set {options.overrides[0]}: needs CONFIG.toml, whose settings it overrides; name it"
        )
    if not 0 < options.timeout <= 3600:
        raise ValueError(f"--timeout {options.timeout:g}: must be above 0 and at most 3600 seconds")
    config = None if options.config is None else load_config(options.config, options.overrides)
    address = options.address if options.address is not None else config.cluster.address if config else ""
    address = "" if address == LOCAL else address
    if address:
        doctor_cluster.check_address(address)
    checks = [
        dataclasses.replace(one, found=scrub(one.found), remedy=scrub(one.remedy))
        for one in diagnose(config, address, options.run_dir, timeout_s=options.timeout)
    ]
    if options.json:
        sys.stdout.write(json.dumps([dataclasses.asdict(one) for one in checks], indent=2) + "\n")
    else:
        show(checks)
    return not any(one.status == "fail" for one in checks)


def diagnose(config: JobConfig | None, address: str, run_dir: Path, *, timeout_s: float) -> Iterator[Check]:
    """All checks: of hosts first, then of the job."""
    needs = None if config is None else needs_of(config, run_dir)
    folders, inputs = ([], []) if needs is None else (list(needs.folders), list(needs.inputs))
    driver = HostFacts.of(gather(folders, inputs, []))
    if address:
        yield from _cluster_checks(config, needs, address, driver, timeout_s)
    else:
        yield from _local_checks(config, needs, driver)
    if config is not None:
        models = list(model_checks(config))
        yield from models
        yield from input_checks(config, model_ok=all(one.status != "fail" for one in models))
        yield wandb_check(config, driver)


def _local_checks(config: JobConfig | None, needs: Needs | None, facts: HostFacts) -> Iterator[Check]:
    host = socket.gethostname()
    yield from package_checks(host, facts, read_lock(), None)
    if config is not None:
        from cluster.placement import needed_resources

        yield cores_check(host, facts, needed_resources(config, gpus=0).cores)
    yield from host_checks(host, facts, needs, cluster=False)


def _cluster_checks(
    config: JobConfig | None, needs: Needs | None, address: str, driver: HostFacts, timeout_s: float
) -> Iterator[Check]:
    """Every alive host; where there is no cluster to ask, that and this machine."""
    try:
        found = doctor_cluster.survey(address, needs, timeout_s=timeout_s)
    except doctor_cluster.ClusterError as error:
        yield Check("Ray cluster", JOB, "fail", f"{address}: {error}", error.remedy)
        yield from _local_checks(None, needs, driver)
        return
    yield Check("Ray cluster", JOB, "ok", f"{address}: {len(found.nodes)} host(s) alive")
    pins = read_lock()
    for node in found.nodes:
        host = node.label
        if host in found.missing:
            yield doctor_cluster.answer_check(host, found.missing[host])
            continue
        facts = found.facts[host]
        yield from package_checks(host, facts, pins, driver)
        yield doctor_cluster.clock_check(host, found.skews.get(host))
        yield from host_checks(host, facts, needs, cluster=True)
        for path in doctor_cluster.inputs_for(node, found.nodes, needs) if needs else ():
            yield doctor_cluster.input_check(host, path, facts, driver)
    if config is not None and needs is not None:
        yield from doctor_cluster.total_checks(config, needs, found)


# ---- output -----------------------------------------------------------------------------------------------


def show(checks: Sequence[Check], console: Console | None = None) -> None:
    """A table for each host, then remedies, then the count."""
    console = console or Console(file=sys.stdout, soft_wrap=False)
    for host in dict.fromkeys(one.host for one in checks):
        table = Table(title=Text(_plain(host)), title_justify="left", title_style="bold", show_header=False)
        table.add_column(width=1)
        table.add_column(min_width=12, max_width=34)
        table.add_column(ratio=1)
        for one in checks:
            if one.host == host:
                mark, style = _MARKS[one.status]
                table.add_row(Text(mark, style), Text(_plain(one.name)), Text(_plain(one.found)))
        console.print(table)
    for one in checks:
        if one.remedy:
            mark, style = _MARKS[one.status]
            text = Text.assemble(
                (mark, style), f" {_plain(one.host)}, {_plain(one.name)}: {_plain(one.remedy)}"
            )
            console.print(text)
    words = {"ok": "ok", "warn": "warnings", "fail": "failed", "skipped": "not checked"}
    counts = [f"{sum(one.status == status for one in checks)} {word}" for status, word in words.items()]
    console.print(", ".join(counts), highlight=False)


def _plain(text: str) -> str:
    """One printable line: names and messages from outside could steer a terminal."""
    return "".join(c if c.isprintable() else "·" for c in text.replace("\n", " "))
