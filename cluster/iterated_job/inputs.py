"""What an iterated job needs before any actor starts: a model folder, prompts to sample, demonstrations.

spin        demonstrations, trained and held out, no prompt in both; prompts are theirs
rejection   training prompts; demonstrations for the warm-up only
both        held-out prompts, where there is a reward to score samples of them by
"""

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path

from actors.packing import Pair
from actors.records import Prompt
from cluster.data import DataSettings, Encoder, PromptSet, Quarantine, load_demonstrations
from cluster.data_files import BadRow, Reading
from cluster.data_settings import DEFAULT_HELDOUT_FRACTION
from cluster.iterated_job.config import IteratedJobConfig, SpinJobConfig
from cluster.prepare import Prepared, prepare
from cluster.supervised_job.inputs import split_by_prompt


@dataclass(frozen=True, slots=True)
class IteratedInputs:
    """`prompts` are sampled in training, `heldout_prompts` in evaluations.

    `demonstrations` are imitated (spin) or warm up the policy (rejection); the loss on `heldout` ones is
    measured.
    """

    prepared: Prepared
    prompts: list[Prompt]
    heldout_prompts: list[Prompt]
    demonstrations: list[Pair]
    heldout: list[Pair]

    @property
    def quarantine(self) -> Quarantine:
        """The rows that were put aside."""
        return self.prepared.quarantine

    @property
    def fingerprint(self) -> str:
        """SHA-256 of what is sampled and imitated, by which a resume knows its data."""
        digest = hashlib.sha256()
        for prompt in self.prompts:
            row = json.dumps(prompt.row, sort_keys=True, default=str)
            digest.update(f"{prompt.token_ids}{row}\n".encode())
        for ids, completion in self.demonstrations:
            digest.update(f"{list(ids)}{list(completion)}\n".encode())
        return digest.hexdigest()


def prepare_iterated_job(config: IteratedJobConfig, run_dir: Path) -> IteratedInputs:
    """Generate or read everything; raises ValueError with field, value and remedy."""
    prepared = prepare(config.policy_job(), run_dir)
    heldout_prompts = list(prepared.prompts.heldout.prompts) if config.rewards() else []
    if not isinstance(config, SpinJobConfig):
        prompts = list(prepared.prompts.train.prompts)
        return IteratedInputs(prepared, prompts, heldout_prompts, list(prepared.demonstrations), [])
    most = config.run.evaluate_demonstrations
    if config.data is not None:
        train, heldout = (
            _demonstrations(config.data, split, prepared, field)
            for split, field in (
                (prepared.prompts.train, "data.train"),
                (prepared.prompts.heldout, "data.heldout" if config.data.heldout else "data.train"),
            )
        )
    else:
        path = run_dir / "inputs" / "demonstrations.jsonl"
        train, heldout = split_by_prompt(_of_task(path, prepared), DEFAULT_HELDOUT_FRACTION, config.run.seed)
    return IteratedInputs(prepared, as_prompts(train, prepared), heldout_prompts, train, heldout[:most])


def as_prompts(demonstrations: list[Pair], prepared: Prepared) -> list[Prompt]:
    """The prompt of each demonstration, to be sampled; `demonstration:7` is that of the eighth."""
    return [
        Prompt(f"demonstration:{number}", tuple(ids), prepared.tokenizer.decode(list(ids)))
        for number, (ids, _) in enumerate(demonstrations)
    ]


def _demonstrations(data: DataSettings, rows: PromptSet, prepared: Prepared, field: str) -> list[Pair]:
    """Prompts with the completions in their rows; a row without one is put aside."""
    encoder = Encoder(prepared.tokenizer, data, prepared.max_length)
    name = data.heldout if field == "data.heldout" else data.train
    reading = Reading(name, prepared.quarantine)
    pairs: list[Pair] = []
    for prompt in rows.prompts:
        try:
            completion = encoder.completion(prompt.row)
            encoder.check_length(len(prompt.token_ids) + len(completion))
        except BadRow as bad:
            reading.reject(_line(prompt), bad, json.dumps(prompt.row, ensure_ascii=False))
        else:
            pairs.append((prompt.token_ids, completion))
    reading.require_good(len(pairs), field)
    return pairs


def _line(prompt: Prompt) -> int:
    """The row's line; 0 where rows have ids of their own, and the excerpt says which it is."""
    name = prompt.id.split(":", 1)[1]
    return int(name) if name.isdecimal() else 0


def _of_task(path: Path, prepared: Prepared) -> list[Pair]:
    """A task's demonstrations; its held-out prompts have none."""
    return list(
        load_demonstrations(
            path,
            prepared.tokenizer,
            prepared.max_length,
            quarantine=prepared.quarantine,
            settings=DataSettings(train=str(path)),
            taken=frozenset(prompt.token_ids for prompt in prepared.prompts.heldout.prompts),
            field="task.demonstrations",
        )
    )
