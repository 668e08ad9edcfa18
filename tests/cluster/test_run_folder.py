"""A run folder is made once, private, and resumed only by the job that made it."""

from pathlib import Path

import pytest

from cluster.config_file import ConfigError, parse_config
from cluster.run_folder import open_run_folder

JOB = '[model.scratch]\n[task]\nkind = "reversal"\n[[reward]]\nkind = "task"\n'


def test_a_new_folder_is_private_and_holds_the_resolved_configuration(tmp_path: Path) -> None:
    config = parse_config(JOB)
    open_run_folder(tmp_path / "a" / "b", config, resume=False)
    assert (tmp_path / "a" / "b").stat().st_mode & 0o777 == 0o700
    assert parse_config((tmp_path / "a" / "b" / "config.toml").read_text()) == config


def test_a_folder_whose_run_was_refused_can_be_used_again_and_one_with_a_run_cannot(tmp_path: Path) -> None:
    config = parse_config(JOB)
    open_run_folder(tmp_path, config, resume=False)
    open_run_folder(tmp_path, config, resume=False)
    (tmp_path / "events.log").write_text("data: …\n")
    with pytest.raises(ConfigError, match=r"not an empty folder.*--resume"):
        open_run_folder(tmp_path, config, resume=False)


def test_a_file_is_no_run_folder(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match="not an empty folder"):
        open_run_folder(tmp_path / "file", parse_config(JOB), resume=False)
    with pytest.raises(ConfigError, match="cannot be written"):
        open_run_folder(tmp_path / "file" / "inside", parse_config(JOB), resume=False)


@pytest.mark.parametrize(
    ("override", "field"),
    [
        ("ppo.kl_coef=0.5", "ppo.kl_coef = 0.5"),
        ("run.batch_size=64", "run.batch_size = 64"),
        ("task.length=4", "task.length = 4"),
        ("learner.ranks=2", "learner.ranks = 2"),
    ],
)
def test_a_resume_that_would_train_something_else_is_refused(
    tmp_path: Path, override: str, field: str
) -> None:
    open_run_folder(tmp_path, parse_config(JOB), resume=False)
    with pytest.raises(ConfigError) as refused:
        open_run_folder(tmp_path, parse_config(JOB, [override]), resume=True)
    assert field in str(refused.value)
    assert "was started with" in str(refused.value)


def test_a_resume_may_be_longer_and_watched_differently(tmp_path: Path) -> None:
    open_run_folder(tmp_path, parse_config(JOB), resume=False)
    longer = parse_config(JOB, ["run.steps=500", "monitor.wandb=disabled", "scheduler.window=3"])
    open_run_folder(tmp_path, longer, resume=True)
    assert parse_config((tmp_path / "config.toml").read_text()) == longer


def test_nothing_to_resume(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="holds no run"):
        open_run_folder(tmp_path / "absent", parse_config(JOB), resume=True)
