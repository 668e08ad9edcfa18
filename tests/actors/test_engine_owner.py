"""An engine's processes end with the actor that started them, whenever that ends."""

import json
import multiprocessing
import os
import pickle
import signal
import subprocess
import sys
import time
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


@pytest.mark.integration
@pytest.mark.timeout(200)
def test_an_engine_core_that_is_still_starting_ends_with_its_actor(tmp_path: Path) -> None:
    """The owner is stopped, so that its core waits for an answer, and then killed."""
    save_model(tmp_path / "model")
    script = tmp_path / "starts.py"
    script.write_text(STARTS_AN_ENGINE)
    environment = os.environ | {"PYTHONPATH": str(Path.cwd())}
    owner = subprocess.Popen([sys.executable, str(script), str(tmp_path / "model")], env=environment)
    try:
        core = first_core(owner.pid)
        owner.send_signal(signal.SIGSTOP)
        limit = time.monotonic() + 90
        while "VLLM::EngineCore" not in " ".join(core.cmdline()) and time.monotonic() < limit:
            time.sleep(0.1)
        assert "VLLM::EngineCore" in " ".join(core.cmdline())
    finally:
        owner.kill()
        owner.wait()
    assert wait_gone(core.pid), "an engine core outlived its actor"


def first_core(owner: int) -> psutil.Process:
    """The first process that the owner spawns for its engine."""
    limit = time.monotonic() + 120
    while time.monotonic() < limit:
        for child in psutil.Process(owner).children():
            if "spawn_main" in " ".join(child.cmdline()):
                return child
        time.sleep(0.05)
    raise AssertionError("no engine core was started")
