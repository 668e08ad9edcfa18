"""Doctor's checks of one host: pure functions of the facts that were gathered there."""

from collections.abc import Iterator

from cluster.doctor_facts import SHARED_MEMORY
from cluster.doctor_needs import GIB, Needs, describe_memory, needed_memory
from cluster.doctor_records import Check, HostFacts, Status

_LEAST_FREE = 1 * GIB
_RAY_KILLS_AT = 0.95  # of memory: Ray's own limit, beyond which it ends workers
_OFF = ("", "0", "false", "no", "off")
_UNSAFE = {
    "VLLM_SERVER_DEV_MODE": "opens vLLM's routes for weights and sleeping to anyone",
    "VLLM_ALLOW_INSECURE_SERIALIZATION": "lets vLLM unpickle what it is sent",
    "VLLM_ALLOW_RUNTIME_LORA_UPDATING": "lets a request load files into the model",
    "TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD": "lets a file of weights run code",
    "HF_DATASETS_TRUST_REMOTE_CODE": "lets a dataset run its own code",
}
_PLUGIN = "headrace_weight_transfer"


def host_checks(host: str, facts: HostFacts, needs: Needs | None, *, cluster: bool) -> Iterator[Check]:
    """Everything about a host but its packages."""
    yield memory_check(host, facts, needs, cluster=cluster)
    yield shared_memory_check(host, facts, needs, cluster=cluster)
    yield gpu_check(host, facts, needs)
    yield loopback_check(host, facts)
    if cluster:
        yield peers_check(host, facts)
    yield token_check(host, facts, cluster=cluster)
    yield listeners_check(host, facts)
    for folder in facts.folders:
        yield folder_check(host, folder.path, facts, needs)
    yield environment_check(host, facts)


# ---- sizes ------------------------------------------------------------------------------------------------


def memory_check(host: str, facts: HostFacts, needs: Needs | None, *, cluster: bool) -> Check:
    """On one machine: the whole job's memory fits. On a cluster the sum is judged over all hosts."""
    limit = " by its control group" if facts.memory < facts.memory_total else ""
    text = f"{_gib(facts.memory)}{limit}, {_gib(facts.memory_available)} free"
    low = facts.memory_available < 0.1 * facts.memory_total
    ending = "end what else runs on this host"
    need = 0.0
    if needs is not None and not cluster:
        if needs.memory is None:
            return Check(
                "memory", host, "skipped", f"{text}; the need is not known without the model's weights"
            )
        need = needed_memory(needs, on_gpu=_uses_gpu(facts, needs))
        text += f"; {describe_memory(needs, need)}"
        ending += (
            ", lower rollout.actors, rollout.kv_cache_gib or cluster.object_store_gib, use bfloat16 or a "
            "smaller model, or take a larger machine"
        )
    if need * GIB > _RAY_KILLS_AT * facts.memory:
        return Check("memory", host, "fail", text, ending)
    if need * GIB > facts.memory_available or low:
        return Check("memory", host, "warn", text, f"{ending}: Ray ends workers when memory runs out")
    return Check("memory", host, "ok", text)


def shared_memory_check(host: str, facts: HostFacts, needs: Needs | None, *, cluster: bool) -> Check:
    """Shared memory has room for a private Ray's object store, and for published weights, old and new."""
    need = 0.1
    if needs is not None:
        need = 2 * needs.memory.shared if needs.memory else 0.0
        need += 0.0 if cluster else needs.object_store
    text = f"{SHARED_MEMORY} has {_gib(facts.shm_free)} free, {need:.2f} GiB are needed"
    if need * GIB > facts.shm_free:
        remedy = f"mount a larger {SHARED_MEMORY} (docker run --shm-size=…, an emptyDir with medium Memory)"
        if needs is not None and not cluster:
            remedy += ", or lower cluster.object_store_gib"
        return Check("shared memory", host, "fail", text, remedy)
    return Check("shared memory", host, "ok", text)


def cores_check(host: str, facts: HostFacts, asked: float) -> Check:
    """On one machine: the job's actors ask for no more cores than there are."""
    text = f"{facts.cores:g} cores, the job's actors ask for {asked:g}"
    if asked > facts.cores:
        return Check(
            "cores",
            host,
            "warn",
            f"{text}: they will share, and slow each other down",
            "lower rollout.actors, scoring.actors or learner.ranks, or their cores",
        )
    return Check("cores", host, "ok", text)


def gpu_check(host: str, facts: HostFacts, needs: Needs | None) -> Check:
    """GPUs that the driver tells of, and whether the installed torch can use them."""
    name = "GPUs"
    if facts.gpu_problem:
        return Check(name, host, "fail", facts.gpu_problem, "mend the NVIDIA driver, or reboot the host")
    wanted = needs is not None and needs.device == "cuda"
    if not facts.gpus:
        if wanted:
            return Check(
                name,
                host,
                "warn",
                'none, but learner.device = "cuda"',
                'well if other hosts have them; else set learner.device to "cpu" or "auto"',
            )
        return Check(name, host, "ok", "none; the job runs on CPUs")
    text = ", ".join(f"{one.name} ({one.memory_mib / 1024:.0f} GiB)" for one in facts.gpus)
    if "+cpu" in facts.packages.get("torch", ""):
        return Check(
            name,
            host,
            "fail" if wanted else "warn",
            f"{text}, but torch is a CPU build and cannot use them",
            "install the cuda extra into an environment of its own: pip install '.[cuda]'",
        )
    return Check(name, host, "ok", text)


def folder_check(host: str, path: str, facts: HostFacts, needs: Needs | None) -> Check:
    """A folder that is written to: permission and space. The run folder's need is known, others get 1 GiB."""
    folder = next(one for one in facts.folders if one.path == path)
    run = needs is not None and path == needs.folders[0]
    name = "run folder" if run else f"folder {path}"
    place = folder.existing if folder.existing == path else f"{path} (in {folder.existing})"
    if not folder.writable:
        return Check(
            name, host, "fail", f"{place} cannot be written", "give another one, or permission to write there"
        )
    text = f"{place} can be written, {_gib(folder.free_bytes)} free"
    need = needs.disk if run and needs is not None else None
    if need is not None and needs is not None:
        text += f"; {needs.checkpoints} checkpoints take about {need:.2f} GiB"
        if need * GIB > folder.free_bytes:
            return Check(
                name, host, "fail", text, "free space, lower run.keep_checkpoints, or name another --run-dir"
            )
    if folder.free_bytes < _LEAST_FREE:
        return Check(name, host, "warn", text, "free some space: logs and metrics grow with the run")
    return Check(name, host, "ok", text)


# ---- network and safety -----------------------------------------------------------------------------------


def loopback_check(host: str, facts: HostFacts) -> Check:
    """A port on 127.0.0.1 can be opened and reached."""
    if facts.loopback_problem:
        return Check(
            "loopback",
            host,
            "fail",
            f"no port on 127.0.0.1 could be opened and reached: {facts.loopback_problem}",
            "bring the loopback interface up (ip link set lo up), or allow it in the firewall or sandbox",
        )
    return Check("loopback", host, "ok", "ports on 127.0.0.1 can be opened and reached")


def peers_check(host: str, facts: HostFacts) -> Check:
    """Ray's ports of the other hosts answer from here."""
    if facts.unreachable:
        shown = [f"{where} ({why})" for where, why in sorted(facts.unreachable.items())]
        more = f" and {len(shown) - 3} more" if len(shown) > 3 else ""
        return Check(
            "ports of other hosts",
            host,
            "fail",
            f"cannot connect to {'; '.join(shown[:3])}{more}",
            "open Ray's ports between the hosts, to each other only (node manager, object manager, workers)",
        )
    return Check("ports of other hosts", host, "ok", "Ray's ports of every other host answer")


def token_check(host: str, facts: HostFacts, *, cluster: bool) -> Check:
    """Ray asks for a token, and the token is a secret file. It is never shown."""
    token = facts.token
    make = f"ray get-auth-token --generate > /dev/null; chmod 600 {token.path}"
    everywhere = (
        "set RAY_AUTH_MODE=token in the environment of `ray start` and of every command, on every host"
    )
    cases: list[tuple[bool, Status, str, str]] = [
        (
            token.mode == "disabled",
            "fail",
            "RAY_AUTH_MODE=disabled: whoever reaches a port can run code",
            everywhere,
        ),
        (
            cluster and token.mode != "token",
            "fail",
            f"RAY_AUTH_MODE is {token.mode or 'not set'}",
            everywhere,
        ),
        (
            token.in_environment,
            "warn",
            "it is in the variable RAY_AUTH_TOKEN, which every child process sees",
            f"unset it and keep the token in a file: {make}",
        ),
        (
            bool(token.problem) and not cluster,
            "ok",
            f"{token.path} {token.problem}: a private Ray makes one",
            "",
        ),
        (
            bool(token.problem),
            "fail",
            f"{token.path} {token.problem}",
            f"copy the head's token there; on the head: {make}",
        ),
        (
            bool(token.permissions & 0o077),
            "fail"
            if cluster
            else "warn",  # a private Ray is on loopback, and makes the file like this itself
            f"others may read {token.path} (mode {token.permissions:04o})",
            f"chmod 600 {token.path}; if others could have read it, make a new one and restart Ray",
        ),
        (True, "ok", f"{token.path}, mode {token.permissions:04o}", ""),
    ]
    _, status, found, remedy = next(case for case in cases if case[0])
    return Check("Ray token", host, status, found, remedy)


def listeners_check(host: str, facts: HostFacts) -> Check:
    """No process of Ray's can be reached from other machines without a token."""
    name = "Ray's open ports"
    bare = [one for one in facts.listeners if one.auth != "token"]
    if bare:
        shown = ", ".join(f"{one.process} on {one.address}:{one.port}" for one in bare[:4])
        more = f" and {len(bare) - 4} more" if len(bare) > 4 else ""
        return Check(
            name,
            host,
            "fail",
            f"reachable from other machines without a token: {shown}{more}",
            "stop that Ray (ray stop) and start it as cluster/launch/host.sh does: with RAY_AUTH_MODE=token "
            "and no ports for metrics",
        )
    if facts.hidden_processes:
        return Check(
            name,
            host,
            "warn",
            f"{facts.hidden_processes} Ray processes of other users could not be looked at",
            "run this as root, or ask their owners whether they use RAY_AUTH_MODE=token",
        )
    count = len(facts.listeners)
    found = f"{count} reachable from other machines, all with a token" if count else "none beyond loopback"
    return Check(name, host, "ok", found)


def environment_check(host: str, facts: HostFacts) -> Check:
    """No variable is set that opens a door, or keeps our vLLM plugin out."""
    name = "environment"
    opened = [one for one in _UNSAFE if facts.environment.get(one, "").lower() not in _OFF]
    if opened:
        text = "; ".join(f"{one} {_UNSAFE[one]}" for one in opened)
        return Check(name, host, "fail", text, f"unset {' '.join(opened)}, where Ray is started too")
    plugins = facts.environment.get("VLLM_PLUGINS")
    if plugins is not None and _PLUGIN not in plugins.split(","):
        return Check(
            name,
            host,
            "fail",
            "VLLM_PLUGINS leaves out the plugin by which weights reach vLLM",
            f"unset VLLM_PLUGINS, or add {_PLUGIN} to it",
        )
    return Check(name, host, "ok", "no unsafe variable is set")


def _uses_gpu(facts: HostFacts, needs: Needs) -> bool:
    return bool(facts.gpus) and needs.device != "cpu" and "+cpu" not in facts.packages.get("torch", "")


def _gib(count: float) -> str:
    return f"{count / GIB:.1f} GiB"
