"""Doctor's checks of the job's own inputs: rewards, data, Weights & Biases.

They are done once, where the command runs, by the code that a start uses, on temporary files that are gone
afterwards.
"""

import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

from cluster.config import JobConfig
from cluster.data_settings import DataSettings
from cluster.doctor_model import local_models, named_models
from cluster.doctor_records import JOB, Check, HostFacts
from cluster.prepare import try_rewards
from rewards.settings import TaskSettings

ROWS = 2000  # good training rows that are read, at most: a look, in seconds
_TASK_ROWS = 256
_READABLE = (".jsonl", ".ndjson", ".json", ".gz", ".parquet", ".arrow")


def input_checks(config: JobConfig, *, model_ok: bool) -> Iterator[Check]:
    """Rewards, then data, which needs them and the model's tokenizer."""
    reward = reward_check(config)
    yield reward
    folders = local_models(config)
    if not model_ok or folders.keys() != named_models(config).keys():
        yield Check("data", JOB, "skipped", "not read: it takes the model's tokenizer, see model.path")
    elif reward.status == "fail":
        yield Check("data", JOB, "skipped", "not read: its answers are judged by the rewards, see there")
    else:
        # Folders in place of names: nothing is asked of the hub.
        paths = {field.removeprefix("model."): str(folder) for field, folder in folders.items()}
        model = config.model.model_copy(update=paths | {"revision": None})
        yield data_check(config.model_copy(update={"model": model}))


def reward_check(config: JobConfig) -> Check:
    """Every reward can be built; a function is loaded in its own process."""
    try:
        try_rewards(config)
    except ValueError as error:
        return Check(
            "rewards", JOB, "fail", str(error), "correct the [[reward]] table or the function it names"
        )
    kinds = ", ".join(f"{one.label} ({one.kind})" for one in config.reward)
    return Check("rewards", JOB, "ok", f"can be used: {kinds}")


def data_check(config: JobConfig) -> Check:
    """Rows become prompts; how many are put aside, and why."""
    from cluster.prepare import prepare

    named = _sources(config)
    elsewhere = {
        field: name
        for field, name in named.items()
        if not Path(name).expanduser().exists() and not name.endswith(_READABLE)
    }
    if elsewhere:
        text = ", ".join(f"{field} = {name!r}" for field, name in elsewhere.items())
        return Check(
            "data",
            JOB,
            "warn",
            f"{text}: no file or folder here, so it is taken for a dataset of the hub, and not read now",
            "if it was meant as a file, correct the path; else make sure that the start can reach the hub",
        )
    with tempfile.TemporaryDirectory(prefix="headrace-doctor-") as folder:
        try:
            ready = prepare(_shortened(config), Path(folder))
        except ValueError as error:
            found = str(error).replace(folder, "RUN_DIR")
            return Check(
                "data", JOB, "fail", found, "correct the rows or the setting; docs/data.md has the format"
            )
    prompts = ready.prompts
    found = (
        f"{len(prompts.train.prompts)} training and {len(prompts.heldout.prompts)} held-out prompts, "
        f"{len(ready.demonstrations)} demonstrations"
    )
    if config.data is not None and prompts.train.counts.good >= ROWS:
        found += f" (the first {ROWS} good rows were read)"
    aside = ready.quarantine
    if aside.counts:
        return Check(
            "data",
            JOB,
            "warn",
            f"{found}; {aside.counts.total()} rows put aside: {aside.describe()}",
            "a run writes each with line and reason to quarantine.jsonl; docs/data.md tells what they mean",
        )
    return Check("data", JOB, "ok", f"{found}; none put aside")


def _sources(config: JobConfig) -> dict[str, str]:
    named = {"warmup.data": config.warmup.data}
    if config.data is not None:
        named |= {"data.train": config.data.train, "data.heldout": config.data.heldout}
    return {field: name for field, name in named.items() if name}


def _shortened(config: JobConfig) -> JobConfig:
    """The same job on fewer rows."""
    data: DataSettings | None = config.data
    task: TaskSettings | None = config.task
    if data is not None:
        data = data.model_copy(update={"max_rows": min(data.max_rows or ROWS, ROWS)})
    if task is not None:
        fewer = {key: min(getattr(task, key), _TASK_ROWS) for key in _TASK_SIZES}
        task = task.model_copy(update=fewer)
    return config.model_copy(update={"data": data, "task": task})


_TASK_SIZES = ("train_size", "heldout_size", "demonstrations")


def wandb_check(config: JobConfig, facts: HostFacts) -> Check:
    """The mode a run would have, and whether there is a key; never the key."""
    from cluster.wandb_copy import wandb_mode

    settings = config.monitor
    mode = wandb_mode(settings)
    name = "W&B"
    if mode == "disabled":
        return Check(name, JOB, "ok", "disabled; metrics.jsonl has everything")
    if mode == "offline":
        return Check(name, JOB, "ok", "offline: kept in the run folder; `wandb sync` uploads it later")
    asked = settings.model_copy(update={"wandb": "auto"})
    if os.environ.get("WANDB_MODE") not in ("offline", "disabled") and wandb_mode(asked) != "online":
        return Check(
            name,
            JOB,
            "warn",
            'monitor.wandb = "online", but no key was found; the run would go on offline',
            'set WANDB_API_KEY in the environment, run `wandb login`, or set monitor.wandb to "offline"',
        )
    if os.environ.get("WANDB_API_KEY"):
        return Check(name, JOB, "ok", "online, with a key from the environment (not tried)")
    if facts.netrc_permissions is not None and facts.netrc_permissions & 0o077:
        return Check(
            name,
            JOB,
            "warn",
            f"online, but others may read the login in ~/.netrc (mode {facts.netrc_permissions:04o})",
            "chmod 600 ~/.netrc",
        )
    return Check(name, JOB, "ok", "online, with a stored login (not tried)")
