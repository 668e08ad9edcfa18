"""What an engine core on a CPU imports, all at once: the helper of `engine_fork` begins with this module.

The collector stays off: it would look again and again at what imports make and keep. The forks turn it on.
"""

import gc

gc.disable()

import vllm.v1.engine.core  # noqa: E402 - after the collector is off, and for the import's sake
import vllm.v1.executor.uniproc_executor  # noqa: E402
import vllm.v1.worker.cpu_worker  # noqa: E402, F401
