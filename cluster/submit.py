"""Runs headrace on a cluster's head. One file, standard library only, so that Ray can copy it there alone.

    ray submit CLUSTER.yaml cluster/submit.py -- train CONFIG.toml

copies this file to the head and runs it there: it hands over to the `headrace` that the cluster file has
installed, with the running cluster as `cluster.address`. The process stays the same one, so output, signals
and exit status are headrace's own. Relative paths are relative to the installed folder, which is ~/headrace
or what HEADRACE_HOME names.

`ray submit` gives 1 for any exit status but 0, and hands words to a shell unquoted. Neither happens with

    python cluster/submit.py --cluster CLUSTER.yaml -- train CONFIG.toml --set 'run.name=my run'

on the machine that you launch from: this quotes, streams the output, and exits with the run's own status.
"""

import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NoReturn

HOME = "HEADRACE_HOME"
PYTHON = "HEADRACE_PYTHON"
EXIT_USER = 2
_ADDRESS = "cluster.address"
_JOBS = ("train", "demo")  # commands that have a configuration, and so an address
_STATUS = re.compile(rb"headrace-exit-status=(\d+)\r?\n")


class SubmitError(Exception):
    """The user can mend it; the message says how."""


def main(arguments: Sequence[str]) -> int:
    """On the head: become headrace. With --cluster: run this file on the head of that cluster."""
    try:
        if arguments[:1] == ["--cluster"]:
            return launch(arguments[1:])
        words, environment, folder = command(arguments, os.environ)
    except SubmitError as error:
        print(f"headrace: {error}", file=sys.stderr)
        return EXIT_USER
    return _become(words, environment, folder)


def _become(words: list[str], environment: dict[str, str], folder: Path) -> NoReturn:
    os.chdir(folder)
    os.execve(words[0], words, environment)  # noqa: S606 - no shell is wanted


def command(
    arguments: Sequence[str], environment: Mapping[str, str]
) -> tuple[list[str], dict[str, str], Path]:
    """What to run, with which environment, where; SubmitError if it is not there."""
    folder = Path(environment.get(HOME) or "~/headrace").expanduser().resolve()
    if not (folder / "cluster" / "cli.py").is_file():
        raise SubmitError(
            f"{folder}: headrace is not installed there; launch the cluster with a file of cluster/launch, "
            f"or name the folder with {HOME}"
        )
    python = environment.get(PYTHON) or str(folder / ".venv" / "bin" / "python")
    if shutil.which(python) is None:
        raise SubmitError(f"{python}: there is no such Python; name headrace's own with {PYTHON}")
    inherited = environment.get("PYTHONPATH", "")
    made = dict(environment) | {
        # A job's working directory may hold other packages of our names: the installed ones come first.
        "PYTHONPATH": os.pathsep.join([str(folder), *([inherited] if inherited else [])]),
        "PYTHONUNBUFFERED": "1",
        "RAY_USAGE_STATS_ENABLED": "0",
    }
    for name in ("OMP_NUM_THREADS", "PYTHONWARNINGS"):  # Ray's SSH commands set them; they are nobody's wish
        made.pop(name, None)
    made.setdefault("RAY_AUTH_MODE", "token")
    if made["RAY_AUTH_MODE"] == "token" and not _has_token(made):
        raise SubmitError(
            "the cluster has no token: make one with `ray get-auth-token --generate` on the machine that you "
            "launch from, name it in file_mounts, and run `ray up` again"
        )
    return [python, "-m", "cluster.cli", *_on_the_cluster(list(arguments))], made, folder


def _has_token(environment: Mapping[str, str]) -> bool:
    path = Path(environment.get("RAY_AUTH_TOKEN_PATH") or "~/.ray/auth_token").expanduser()
    return bool(environment.get("RAY_AUTH_TOKEN")) or (path.is_file() and path.stat().st_size > 0)


def _on_the_cluster(arguments: list[str]) -> list[str]:
    """Add `--set cluster.address=auto` to a job, unless an address is given."""
    if not arguments or arguments[0] not in _JOBS or {"-h", "--help"} & set(arguments):
        return arguments
    if any(word.removeprefix("--set=").replace(" ", "").startswith(f"{_ADDRESS}=") for word in arguments):
        return arguments
    return [*arguments, "--set", f"{_ADDRESS}=auto"]


def launch(arguments: Sequence[str]) -> int:
    """Run headrace on the head of a cluster, from the machine that launched it; gives its exit status."""
    if len(arguments) < 2 or arguments[1] != "--" or not arguments[2:]:
        raise SubmitError("--cluster: must look like --cluster CLUSTER.yaml -- train CONFIG.toml")
    cluster, words = arguments[0], arguments[2:]
    if not Path(cluster).is_file():
        raise SubmitError(f"--cluster {cluster}: there is no such file; give the one that `ray up` was given")
    ray = shutil.which("ray", path=str(Path(sys.executable).parent)) or shutil.which("ray")
    if ray is None:
        raise SubmitError("there is no `ray` on the PATH; use the Python of headrace's environment")
    # $HEADRACE_HOME is for the shell of the head.
    there = f'python "${{{HOME}:-$HOME/headrace}}/cluster/submit.py" {shlex.join(words)}'
    remote = f"{there}; status=$?; echo headrace-exit-status=$status; exit $status"
    process = subprocess.Popen(  # noqa: S603 - our own command
        [ray, "exec", cluster, remote], stdout=subprocess.PIPE
    )
    assert process.stdout is not None
    last = b""
    while True:
        try:
            chunk = os.read(process.stdout.fileno(), 65536)
            if not chunk:
                break
            sys.stdout.buffer.write(chunk)
            sys.stdout.buffer.flush()
            last = (last + chunk)[-4096:]
        except KeyboardInterrupt:  # Ray has it too; what the run still says is worth waiting for
            continue
    status = process.wait()
    found = _STATUS.findall(last)
    return int(found[-1]) if found else status or 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
