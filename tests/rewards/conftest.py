"""Sandboxes for the tests that need one; skipped where the machine forbids them."""

import pytest
from sandbox_helpers import LIMITS

from rewards.sandbox import Sandbox, SandboxError, SandboxLimits


@pytest.fixture(scope="module", params=[True, False], ids=["filtered", "unfiltered"])
def sandbox(request):
    try:
        made = Sandbox(LIMITS, filter_calls=request.param)
        made.start()
    except SandboxError as error:
        pytest.skip(str(error))
    yield made
    made.close()


@pytest.fixture
def quick():
    """A sandbox of its own with short limits, with the filter."""
    try:
        with Sandbox(SandboxLimits(wall_s=1.5, cpu_s=1, memory_bytes=128 << 20)) as made:
            made.start()
            yield made
    except SandboxError as error:
        pytest.skip(str(error))
