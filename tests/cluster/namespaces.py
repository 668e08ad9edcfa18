"""Several hosts on one machine: each has its own network, processes, home, /tmp, shared memory and sshd.

    python tests/cluster/namespaces.py up --subnet 10.83.0.0/24 --hosts 3
    python tests/cluster/namespaces.py status | stop 2 | start 2 | down

A bridge carries the subnet's first address, which is this machine; the hosts have the next ones. `ray up`
from here reaches them over SSH with the key in the folder. What is installed here is seen by every host, so
nothing is installed again; what is written to a host's home folder, /tmp or /dev/shm is seen by it alone.
Linux, root, iproute2, util-linux, openssh-server and rsync are needed.
"""

import argparse
import contextlib
import ipaddress
import json
import os
import pwd
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
DEFAULT_SUBNET = "10.83.0.0/24"
DEFAULT_FOLDER = Path("/var/tmp/headrace-hosts")
_COMMANDS = {
    "ip": "iproute2",
    "unshare": "util-linux",
    "mount": "util-linux",
    "sshd": "openssh-server",
    "ssh": "openssh-client",
    "ssh-keygen": "openssh-client",
    "rsync": "rsync",
}
_SETTLE_S = 20.0


class HostsError(RuntimeError):
    """The hosts could not be made, reached or taken away."""


def missing() -> str:
    """Why hosts cannot be made here; empty if they can."""
    if not sys.platform.startswith("linux"):
        return f"namespaces are a feature of Linux, this is {sys.platform}"
    if os.geteuid() != 0:
        return "network namespaces need root"
    lacking = sorted({package for command, package in _COMMANDS.items() if not _which(command)})
    if lacking:
        return f"not installed: {', '.join(lacking)} (.ci/hosts.sh installs them)"
    try:
        _run("unshare", "-n", "-m", "-u", "-p", "-f", "--mount-proc", "ip", "link", "add", "type", "bridge")
    except HostsError as error:
        return f"this machine forbids namespaces or network bridges: {error}"
    return ""


def _which(command: str) -> str | None:
    return shutil.which(command, path=f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin")


def _run(*command: object) -> str:
    """Run a command, give its output; HostsError with what it said if it failed."""
    words = [str(word) for word in command]
    words[0] = _which(words[0]) or words[0]
    done = subprocess.run(words, check=False, capture_output=True, text=True, timeout=60)
    if done.returncode:
        raise HostsError(f"{shlex.join(words)}: {(done.stderr or done.stdout).strip()}")
    return done.stdout


@dataclass(frozen=True, slots=True)
class Plan:
    """Which hosts: `name` prefixes all interfaces and namespaces (at most 8 characters)."""

    name: str = "hr"
    subnet: str = DEFAULT_SUBNET
    count: int = 3
    folder: Path = DEFAULT_FOLDER

    def __post_init__(self) -> None:
        network = ipaddress.ip_network(self.subnet)  # refuses an address with host bits
        if network.version != 4 or network.num_addresses - 3 < self.count:
            raise ValueError(f"subnet {self.subnet}: needs {self.count + 1} IPv4 addresses; give a wider one")
        if not self.name.isalnum() or len(self.name) > 8:
            raise ValueError(f"name {self.name!r}: give at most 8 letters and digits")

    @property
    def network(self) -> ipaddress.IPv4Network:
        return ipaddress.IPv4Network(self.subnet)

    @property
    def bridge(self) -> str:
        return f"{self.name}br"

    @property
    def gateway(self) -> str:
        """This machine, as the hosts see it."""
        return str(self.network[1])

    @property
    def key(self) -> Path:
        """The private key that every host lets in."""
        return self.folder / "id_ed25519"

    def namespace(self, index: int) -> str:
        return f"{self.name}-{index}"

    def address(self, index: int) -> str:
        """The address of host 1, 2, …"""
        if not 1 <= index <= self.count:
            raise ValueError(f"host {index}: there are hosts 1 to {self.count}")
        return str(self.network[1 + index])

    def home(self, index: int) -> Path:
        """Where this machine finds the home folder of a host's root."""
        return self.folder / f"host{index}" / "home"

    def save(self) -> None:
        facts = {"name": self.name, "subnet": self.subnet, "count": self.count}
        (self.folder / "plan.json").write_text(json.dumps(facts))

    @classmethod
    def load(cls, folder: Path) -> "Plan":
        """The plan of the hosts whose folder this is."""
        path = folder / "plan.json"
        if not path.exists():
            raise HostsError(f"{folder}: no hosts were made here; make some with `up`, or give --folder")
        return cls(folder=folder, **json.loads(path.read_text()))


class Hosts:
    """Makes the hosts of a plan, takes one away and gives it back, and removes everything."""

    def __init__(self, plan: Plan, keep: Sequence[Path] = ()) -> None:
        """`keep`: folders that the hosts must see although they lie in this machine's /tmp or home."""
        self.plan = plan
        self._started: dict[int, subprocess.Popen[bytes]] = {}
        self.keep = tuple(dict.fromkeys([ROOT, Path(sys.prefix), Path(sys.base_prefix), *keep]))

    def up(self) -> None:
        """Make everything; on failure nothing is left."""
        if why := missing():
            raise HostsError(why)
        plan = self.plan
        if (plan.folder / "plan.json").exists() or plan.bridge in _links():
            raise HostsError(
                f"hosts named {plan.name!r} are there already ({plan.folder}): take them down first"
            )
        if taken := [route["dev"] for route in _routes() if route["dst"] == plan.subnet]:
            raise HostsError(f"subnet {plan.subnet} is used by {taken[0]}: choose another")
        try:
            plan.folder.mkdir(parents=True, exist_ok=True)
            plan.folder.chmod(0o700)
            plan.save()
            _run("ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", plan.key)
            _run("ip", "link", "add", plan.bridge, "type", "bridge")
            _run("ip", "address", "add", f"{plan.gateway}/{plan.network.prefixlen}", "dev", plan.bridge)
            _run("ip", "link", "set", plan.bridge, "up")
            for index in range(1, plan.count + 1):
                self._make(index)
                self.start(index)
            for index in range(1, plan.count + 1):
                self.wait(index)
        except BaseException:
            self.down()
            raise

    def _make(self, index: int) -> None:
        """A host's network and folders."""
        plan, namespace = self.plan, self.plan.namespace(index)
        outside, inside = f"{plan.name}v{index}", f"{plan.name}p{index}"
        _run("ip", "netns", "add", namespace)
        _run("ip", "link", "add", outside, "type", "veth", "peer", "name", inside, "netns", namespace)
        _run("ip", "link", "set", outside, "master", plan.bridge, "up")
        there = ("ip", "-n", namespace)
        address = f"{plan.address(index)}/{plan.network.prefixlen}"
        _run(*there, "address", "add", address, "dev", inside)
        _run(*there, "link", "set", "lo", "up")
        _run(*there, "link", "set", inside, "up")
        _run(*there, "route", "add", "default", "via", plan.gateway)
        folder = plan.folder / f"host{index}"
        (folder / "home" / ".ssh").mkdir(parents=True, mode=0o700)
        (folder / "tmp").mkdir()
        (folder / "tmp").chmod(0o1777)
        # A login shell finds python and ray as on any machine where they are installed.
        (folder / "home" / ".bashrc").write_text(f"export PATH={shlex.quote(str(_binaries()))}:$PATH\n")
        # Names are looked up in a file, as there is no name server that a query could wait for.
        names = [f"{plan.address(n)} {plan.name}{n}\n" for n in range(1, plan.count + 1)]
        (folder / "hosts").write_text("127.0.0.1 localhost\n" + "".join(names))
        (folder / "resolv.conf").write_text("")
        shutil.copy(plan.key.with_suffix(".pub"), folder / "home" / ".ssh" / "authorized_keys")
        _run("ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", folder / "host_key")
        (folder / "sshd_config").write_text(_sshd_config(plan.address(index)))
        (folder / "init.sh").write_text(self._init_script(folder))

    def _init_script(self, folder: Path) -> str:
        """What a host runs in its fresh namespaces: own folders over the shared ones, then sshd."""
        home = Path(pwd.getpwuid(0).pw_dir)
        hidden = [path for path in self.keep if any(path.is_relative_to(one) for one in ("/tmp", home))]
        quoted = [shlex.quote(str(path)) for path in hidden]
        aside = [f"mkdir -p /run/keep/{n} && mount --bind {q} /run/keep/{n}" for n, q in enumerate(quoted)]
        back = [f"mkdir -p {q} && mount --bind /run/keep/{n} {q}" for n, q in enumerate(quoted)]
        lines = [
            "set -eu",
            "mount --make-rprivate /",
            f"exec 3<{shlex.quote(str(folder))}",  # /run may hide the folder: hold it open
            "mount -t tmpfs -o mode=755 run /run",
            "mkdir -p /run/sshd /run/host",
            "mount --bind /proc/self/fd/3 /run/host",
            "exec 3<&-",
            *aside,
            "mount --bind /run/host/tmp /tmp",
            f"mount --bind /run/host/home {shlex.quote(str(home))}",
            "mount -t tmpfs -o mode=1777 shm /dev/shm",
            *back,
            "mount --bind /run/host/hosts /etc/hosts",
            "mount --bind /run/host/resolv.conf /etc/resolv.conf",
            'hostname "$1"',
            f"exec {_which('sshd')} -D -e -f /run/host/sshd_config 2>>/run/host/sshd.log",
        ]
        return "\n".join(lines) + "\n"

    def start(self, index: int) -> None:
        """Switch a host on: what it had in its home and /tmp is there, no process is."""
        plan, namespace = self.plan, self.plan.namespace(index)
        plan.address(index)
        if _pids(namespace):
            raise HostsError(f"host {index} is running")
        _run("ip", "link", "set", f"{plan.name}v{index}", "up")
        folder = plan.folder / f"host{index}"
        inside = ["unshare", "-m", "-u", "-p", "-f", "--mount-proc", "--kill-child"]
        script = folder / "init.sh"
        with (folder / "init.log").open("ab") as log, script.open("rb") as commands:
            self._started[index] = subprocess.Popen(
                ["ip", "netns", "exec", namespace, *inside, "bash", "-s", f"{plan.name}{index}"],
                stdin=commands,
                stdout=log,
                stderr=log,
                cwd="/",
                start_new_session=True,
                env={
                    "PATH": "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin",
                    "LANG": "C.UTF-8",
                },
            )

    def wait(self, index: int, seconds: float = _SETTLE_S) -> None:
        """Wait until a host's sshd answers."""
        address, deadline = self.plan.address(index), time.monotonic() + seconds
        while True:
            try:
                with socket.create_connection((address, 22), timeout=1) as connection:
                    if connection.recv(4) == b"SSH-":
                        return
            except OSError:
                pass
            if time.monotonic() > deadline:
                log = self.plan.folder / f"host{index}" / "init.log"
                said = log.read_text()[-500:] if log.exists() else "nothing"
                raise HostsError(f"host {index} ({address}): no sshd after {seconds:g} s; it said: {said}")
            time.sleep(0.1)

    def stop(self, index: int) -> None:
        """Switch a host off as a power cut does: the cable first, so that nobody is told, then the rest."""
        self.plan.address(index)
        _run("ip", "link", "set", f"{self.plan.name}v{index}", "down")
        self._kill(index)

    def _kill(self, index: int) -> None:
        """End every process of a host: its init first, with which the kernel ends all others."""
        namespace, deadline = self.plan.namespace(index), time.monotonic() + _SETTLE_S
        while found := _pids(namespace):
            # The outermost one, unshare, ends by itself once it has seen its child end.
            inner = [pid for pid in found if _parent(pid) in found]
            for pid in inner or found:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            if time.monotonic() > deadline:
                raise HostsError(f"host {index}: processes {found} do not end")
            time.sleep(0.05)
        if index in self._started:
            self._started.pop(index).wait(_SETTLE_S)

    def down(self) -> None:
        """Remove hosts, links, bridge and folder, however far `up` had come."""
        plan, problems = self.plan, []
        for index in range(1, plan.count + 1):
            for step in (
                lambda i=index: self._kill(i),
                lambda i=index: _drop_link(f"{plan.name}v{i}"),
                lambda i=index: _drop_namespace(plan.namespace(i)),
            ):
                try:
                    step()
                except HostsError as error:
                    problems.append(str(error))
        _drop_link(plan.bridge)
        if problems:
            raise HostsError("; ".join(problems))
        shutil.rmtree(plan.folder, ignore_errors=True)

    def status(self) -> list[str]:
        """A line for each host: address, number of processes, whether it answers."""
        lines = []
        for index in range(1, self.plan.count + 1):
            try:
                self.wait(index, 0)
                answers = "answers"
            except HostsError:
                answers = "does not answer"
            count = len(_pids(self.plan.namespace(index)))
            lines.append(f"host {index}  {self.plan.address(index)}  {count} processes  {answers}")
        return lines

    def run(self, index: int, command: str, seconds: float = 120) -> str:
        """Run a command on a host over SSH, in the kind of shell that Ray uses; give its output."""
        done = subprocess.run(
            [*self.ssh(index), f"bash --login -c -i {shlex.quote(f'source ~/.bashrc; {command}')}"],
            check=False,
            capture_output=True,
            text=True,
            timeout=seconds,
        )
        if done.returncode:
            raise HostsError(f"host {index}: {command}: exit status {done.returncode}: {done.stderr.strip()}")
        return done.stdout

    def ssh(self, index: int) -> list[str]:
        """The command that reaches a host."""
        options = (
            "StrictHostKeyChecking=no",
            "UserKnownHostsFile=/dev/null",
            "LogLevel=ERROR",
            "BatchMode=yes",
        )
        flags = [part for option in options for part in ("-o", option)]
        return ["ssh", "-i", str(self.plan.key), *flags, f"root@{self.plan.address(index)}"]


@contextlib.contextmanager
def hosts(plan: Plan, keep: Sequence[Path] = ()) -> Iterator[Hosts]:
    """Hosts for a block of code; gone after it whatever happens in it."""
    made = Hosts(plan, keep)
    made.up()
    try:
        yield made
    finally:
        made.down()


def _binaries() -> Path:
    return Path(sys.executable).parent


def _sshd_config(address: str) -> str:
    lines = (
        f"ListenAddress {address}:22",
        "HostKey /run/host/host_key",
        "AuthorizedKeysFile /run/host/home/.ssh/authorized_keys",
        "StrictModes no",  # the folders belong to whoever made the hosts
        "PermitRootLogin prohibit-password",
        "PasswordAuthentication no",
        "UsePAM no",
        "PidFile none",
        "MaxStartups 100",
    )
    return "\n".join(lines) + "\n"


def _links() -> set[str]:
    return {link["ifname"] for link in json.loads(_run("ip", "-json", "link", "show"))}


def _routes() -> list[dict[str, str]]:
    found: list[dict[str, str]] = json.loads(_run("ip", "-json", "-4", "route", "show"))
    return found


def _namespaces() -> set[str]:
    return {line.split()[0] for line in _run("ip", "netns", "list").splitlines() if line.strip()}


def _pids(namespace: str) -> list[int]:
    """Every process that lives in a network namespace."""
    if namespace not in _namespaces():
        return []
    return [int(pid) for pid in _run("ip", "netns", "pids", namespace).split()]


def _parent(pid: int) -> int:
    """The parent of a process, 0 if it has ended."""
    try:
        return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])
    except OSError:
        return 0


def _drop_link(name: str) -> None:
    if name in _links():
        _run("ip", "link", "delete", name)


def _drop_namespace(name: str) -> None:
    if name in _namespaces():
        _run("ip", "netns", "delete", name)


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line."""
    parser = argparse.ArgumentParser(description="Several hosts on one machine, in namespaces.")
    parser.add_argument("action", choices=("up", "down", "status", "start", "stop"))
    parser.add_argument("host", nargs="?", type=int, help="which one to start or stop: 1, 2, …")
    parser.add_argument("--folder", type=Path, default=DEFAULT_FOLDER, help=f"default: {DEFAULT_FOLDER}")
    parser.add_argument("--subnet", default=DEFAULT_SUBNET, help=f"for `up`; default: {DEFAULT_SUBNET}")
    parser.add_argument("--hosts", type=int, default=3, help="how many, for `up`; default: 3")
    parser.add_argument("--name", default="hr", help="prefix of all interfaces, for `up`; default: hr")
    options = parser.parse_args(arguments)
    try:
        if options.action == "up":
            made = Hosts(Plan(options.name, options.subnet, options.hosts, options.folder))
            made.up()
        else:
            made = Hosts(Plan.load(options.folder))
        if options.action in ("start", "stop"):
            if options.host is None:
                raise ValueError(f"{options.action}: say which host")
            getattr(made, options.action)(options.host)
        if options.action == "start":
            made.wait(options.host)
        if options.action == "down":
            made.down()
        else:
            print("\n".join([*made.status(), f"key {made.plan.key}"]))
    except (HostsError, ValueError) as error:
        print(f"namespaces: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
