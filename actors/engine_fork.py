"""A quicker start of an engine on a CPU: its core is forked from a helper that imports vLLM meanwhile.

An actor and its engine core both need vLLM, whose import takes seconds. Spawned, the core begins with it when
the actor is done; so here a helper process begins at once, and the core is a fork of it:

    actor:   import vLLM ─► configuration ─► ask for the core ─► …
    helper:  import vLLM ───────────────────► fork ─► core: load the model ─► …

The helper is Python's own fork server: it runs no thread and no model, it listens on a socket in a folder of
its user's alone, and it ends with the actor.
"""

import gc
import multiprocessing
import os
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from multiprocessing import context, forkserver
from pathlib import Path
from typing import Any

from actors import engine_owner

_MODULES = ["actors.engine_modules"]
_PRELOAD = "LD_PRELOAD"


class _Core(context.ForkServerProcess):
    """A fork that has the environment of who asked for it, since the helper's is older, and ends with it."""

    def start(self) -> None:
        self._environment = dict(os.environ)
        super().start()

    def run(self) -> None:
        import setproctitle  # vLLM's own
        import torch

        os.close(_server()._forkserver_alive_fd)  # or the helper would wait for the core's end too
        engine_owner.die_with_parent()
        gc.freeze()  # what the helper imported stays, and its pages stay shared
        gc.enable()
        setproctitle.getproctitle()  # finds the title's place, which it cannot once the environment moves
        os.environ.update(self._environment)
        torch.cpu._init_amx()  # each process asks anew; else AMX, which bfloat16 uses, is illegal
        super().run()


def _server() -> Any:
    """Python's own record of the helper."""
    return forkserver._forkserver  # type: ignore[attr-defined]


class _Context(context.ForkServerContext):
    Process = _Core


def begin() -> None:
    """Start the helper, unless it runs, in the environment that its forks are to begin with.

    Of several engines in one process the first decides what libraries read as they load, such as threads.
    """
    multiprocessing.get_context("forkserver").set_forkserver_preload(_MODULES)
    before = os.environ.get(_PRELOAD)
    allocator = _library("vllm", "libs/libtcmalloc*.so*")
    threads = _library("torch", "../torch.libs/libgomp*.so*", "lib/libgomp*.so*")
    os.environ[_PRELOAD] = ":".join(filter(None, [allocator, threads, before]))
    try:
        forkserver.ensure_running()
    finally:
        if before is None:
            del os.environ[_PRELOAD]
        else:
            os.environ[_PRELOAD] = before


def _library(package: str, *patterns: str) -> str | None:
    """One of those that vLLM has the loader bring into a core on a CPU, since they make it faster."""
    found = find_spec(package)
    folders = [Path(folder) for folder in (found.submodule_search_locations if found else None) or []]
    return next((str(path) for one in patterns for folder in folders for path in folder.glob(one)), None)


@contextmanager
def without_collection() -> Iterator[None]:
    """For a block of imports: the collector would look again and again at what they make and keep."""
    was_on = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_on:
            gc.enable()


@contextmanager
def forked_cores() -> Iterator[None]:
    """Within it vLLM forks an engine core from the helper, where on a CPU it would always spawn it."""
    from vllm.v1.engine import utils

    theirs, ours = utils.get_mp_context, _Context()

    def get_mp_context() -> Any:
        return ours

    utils.get_mp_context = get_mp_context
    try:
        yield
    finally:
        utils.get_mp_context = theirs
