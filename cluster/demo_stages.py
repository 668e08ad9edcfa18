"""The demo's stages: what each is told. They are the files and commands that a user would write.

demonstrations ─► 1 imitation ─► policy ─► 2 labels: candidates, pairs, a noisy annotator ─► preferences
                                   │                                                         │ halves a, b
                                   │            3 reward model ◄──────────── a ──────────────┤
                                   │                 │        4 held-out reward model ◄── b ─┘
                                   ▼                 ▼                 ▼ evaluations only, as is gold
                                 5 PPO against the reward model and the frozen policy of stage 1
"""

from dataclasses import dataclass
from pathlib import Path

from cluster.run_folder import STAGES as STAGES_FOLDER

IMITATION, LABELS = "imitation", "labels"
REWARD_MODEL, HELDOUT_MODEL, PPO = "reward-model", "heldout-reward-model", "ppo"
STAGES = (IMITATION, LABELS, REWARD_MODEL, HELDOUT_MODEL, PPO)

_TASK = """
[task]
kind = "coverage"
train_size = 2048
heldout_size = 256
demonstrations = 8192
corruption = 0.9
seed = {seed}
"""

_IMITATION = """# A small Llama from scratch imitates demonstrations, most of which are poor.
objective = "supervised"

[run]
name = "demo-imitation"
steps = 400
batch_size = 128
evaluate_every = 0
seed = {seed}

[model.scratch]
hidden_size = 128
layers = 4
heads = 4
max_length = 64
{task}
[supervised]
lr = 2.5e-3

[learner]
threads = 2

[monitor]
wandb = "disabled"
"""

_REWARD_MODEL = """# Bradley-Terry on the labels of half of the prompts ({part}); the twin has the others.
objective = "reward_model"

[run]
name = "demo-{name}"
epochs = 3
batch_size = 64
evaluate_every = 0
seed = {seed}

[model]
path = "{policy}"

[preferences]
train = "{preferences}"
part = "{part}"
empty_responses = "keep"

[learner]
threads = 2

[optimizer]
lr = 5e-4
warmup_updates = 5
schedule = "cosine"

[monitor]
wandb = "disabled"
"""

_PPO = """# PPO against the reward model and the frozen policy of stage 1. The twin and gold are watched only.
objective = "ppo"

[run]
name = "demo"
steps = 24
batch_size = 256
evaluate_every = 4
checkpoint_every = 24
seed = {seed}

[model]
path = "{policy}"
{task}
[[reward]]
kind = "model"
name = "proxy"
path = "{reward_model}"

[[reward]]
kind = "model"
name = "twin"
path = "{heldout_model}"
role = "evaluate"

[[reward]]
kind = "task"
name = "gold"
role = "evaluate"

[rollout]
group_size = 8
max_new_tokens = 32
max_groups_in_flight = 64
max_num_seqs = 256

[scheduler]
window = 3  # an evaluation, during which no weights are published, then leaves no step without groups

[learner]
threads = 2

[optimizer]
lr = 2e-4
critic_lr = 5e-4
warmup_updates = 5
schedule = "linear"

[ppo]
minibatches = 2
value_coef = 0.5
kl_coef = 0.05
"""


@dataclass(frozen=True, slots=True)
class Plan:
    """One demo: where, with which seed, how many labels, and how fond of length the annotator is."""

    run_dir: Path
    seed: int
    pairs: int
    length_bias: float

    @property
    def stages(self) -> Path:
        """The folder of what comes before PPO."""
        return self.run_dir / STAGES_FOLDER

    def folder(self, stage: str) -> Path:
        """Where a stage leaves what it makes; PPO's is the run folder itself."""
        return self.run_dir if stage == PPO else self.stages / f"{STAGES.index(stage) + 1}-{stage}"

    def file(self, stage: str) -> Path:
        """A stage's configuration."""
        return self.stages / f"{STAGES.index(stage) + 1}-{stage}.toml"

    def configurations(self, policy: Path) -> dict[str, str]:
        """Each training stage's configuration; `policy` is what the imitation leaves."""
        task = _TASK.format(seed=self.seed)
        preferences = self.folder(LABELS) / "preferences.jsonl"
        models = {
            stage: _REWARD_MODEL.format(
                name=stage, part=part, policy=policy, preferences=preferences, seed=self.seed
            )
            for stage, part in ((REWARD_MODEL, "a"), (HELDOUT_MODEL, "b"))
        }
        return {
            IMITATION: _IMITATION.format(task=task, seed=self.seed),
            **models,
            PPO: _PPO.format(
                task=task,
                seed=self.seed,
                policy=policy,
                reward_model=self.folder(REWARD_MODEL) / "reward_model",
                heldout_model=self.folder(HELDOUT_MODEL) / "reward_model",
            ),
        }

    def train(self, stage: str, overrides: list[str]) -> list[str]:
        """The command of a training stage."""
        words = ["train", str(self.file(stage)), "--run-dir", str(self.folder(stage))]
        return words + [word for override in overrides for word in ("--set", override)]

    def labelling(self, policy: Path, overrides: list[str]) -> list[list[str]]:
        """The commands that make preferences: sample, choose pairs, annotate, merge."""
        folder = self.folder(LABELS)
        files = {
            name: str(folder / f"{name}.jsonl")
            for name in ("prompts", "pool", "ranked", "annotations", "preferences")
        }
        sample = ["--samples", "4", "--max-new-tokens", "32", "--set", f"run.seed={self.seed}"]
        sample += [word for override in overrides for word in ("--set", override)]
        judge = ["--task", "coverage", "--length-bias", f"{self.length_bias:g}", "--seed", str(self.seed)]
        return [
            ["label", "generate", files["prompts"], "--policy", str(policy), *sample, "--out", files["pool"]],
            ["label", "rank", files["pool"], "--count", str(self.pairs), "--out", files["ranked"]],
            ["label", "simulate", files["ranked"], *judge, "--out", files["annotations"]],
            ["label", "merge", files["ranked"], files["annotations"], "--out", files["preferences"]],
        ]
