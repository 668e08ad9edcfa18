"""An engine's processes end with the actor that started them, whenever that ends."""

import contextlib
import json
import multiprocessing
import os
import pickle
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
from engine_helpers import save_model, wait_gone

from actors.engine_owner import KEY, Owner

STARTS_AN_ENGINE = """
import asyncio, sys
from actors.engine import EngineSpec, WatchedEngine
from actors.settings import RolloutSettings
from actors.weight_transfer import BACKEND, register

if __name__ == "__main__":
    register()
    settings = RolloutSettings(kv_cache_gib=0.05, max_num_seqs=8)
    spec = EngineSpec("rollout-0", sys.argv[1], settings, "float32", 64, 0, "cpu", BACKEND)
    asyncio.run(WatchedEngine(spec).start())
"""


def test_an_owner_is_its_process_id_and_stays_one() -> None:
    mine = Owner(os.getpid())
    again = pickle.loads(pickle.dumps(mine))
    assert (again.pid, type(again)) == (os.getpid(), Owner)  # and this process, which is the owner, lives on
    # vLLM names its compiled graphs by this text.
    assert json.dumps({KEY: Owner(1)}) == json.dumps({KEY: Owner(2)})


def hold(_owner: Owner) -> None:
    time.sleep(300)


def test_who_receives_the_mark_of_an_owner_that_is_gone_ends() -> None:
    gone = subprocess.Popen([sys.executable, "-c", "pass"])
    gone.wait()
    child = multiprocessing.get_context("spawn").Process(target=hold, args=(Owner(gone.pid),))
    child.start()
    child.join(60)
    assert child.exitcode == -signal.SIGKILL


@pytest.fixture
def owner(tmp_path: Path) -> Iterator[subprocess.Popen[bytes]]:
    """A process that starts an engine."""
    save_model(tmp_path / "model")
    script = tmp_path / "starts.py"
    script.write_text(STARTS_AN_ENGINE)
    environment = os.environ | {"PYTHONPATH": str(Path.cwd())}
    process = subprocess.Popen([sys.executable, str(script), str(tmp_path / "model")], env=environment)
    yield process
    process.kill()
    process.wait()


@pytest.mark.integration
@pytest.mark.timeout(200)
@pytest.mark.parametrize("stopped", ["owner", "core"])
def test_an_engine_core_that_is_still_starting_ends_with_its_actor(
    owner: subprocess.Popen[bytes], stopped: str
) -> None:
    """A core whose owner is stopped waits for it; one that is stopped runs no thread to see its end."""
    helper, core = first_core(owner.pid)
    limit = time.monotonic() + 90
    while "VLLM::EngineCore" not in " ".join(core.cmdline()):
        assert time.monotonic() < limit, "the core did not start in time"
        time.sleep(0.02)
    (core if stopped == "core" else psutil.Process(owner.pid)).suspend()
    owner.kill()
    owner.wait()
    assert wait_gone(core.pid), "an engine core outlived its actor"
    assert wait_gone(helper.pid), "the helper that forks engine cores outlived its actor"


def first_core(owner: int) -> tuple[psutil.Process, psutil.Process]:
    """The helper that the owner starts for its engine, and the first process that it forks."""
    limit = time.monotonic() + 120
    while time.monotonic() < limit:
        for child in psutil.Process(owner).children():
            with contextlib.suppress(psutil.Error):  # some children end while they are looked at
                if "forkserver" in " ".join(child.cmdline()):
                    for core in child.children():
                        return child, core
        time.sleep(0.05)
    raise AssertionError("no engine core was started")
