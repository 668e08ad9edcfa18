"""A run folder is made once, private, locked, and resumed only by the job that made it."""

from pathlib import Path

import pytest

from cluster.config import JobConfig
from cluster.config_file import ConfigError, parse_config
from cluster.run_folder import RunFolder

JOB = '[model.scratch]\n[task]\nkind = "reversal"\n[[reward]]\nkind = "task"\n'


def make(path: Path, config: JobConfig) -> None:
    RunFolder(path, config, resume=False).close()


def test_a_new_folder_is_private_and_holds_the_resolved_configuration(tmp_path: Path) -> None:
    config = parse_config(JOB)
    make(tmp_path / "a" / "b", config)
    assert (tmp_path / "a" / "b").stat().st_mode & 0o777 == 0o700
    assert parse_config((tmp_path / "a" / "b" / "config.toml").read_text()) == config


def test_a_refused_run_takes_back_only_what_it_wrote(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path / "run", parse_config(JOB), resume=False)
    (tmp_path / "run" / "inputs").mkdir()
    folder.discard()
    folder.close()
    assert not (tmp_path / "run").exists()


def test_a_folder_with_a_users_files_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "config.toml").write_text("mine")
    with pytest.raises(ConfigError, match=r"not an empty folder.*--resume"):
        make(tmp_path, parse_config(JOB))
    assert (tmp_path / "config.toml").read_text() == "mine"


def test_a_folder_belongs_to_one_process_at_a_time(tmp_path: Path) -> None:
    config = parse_config(JOB)
    first = RunFolder(tmp_path / "run", config, resume=False)
    with pytest.raises(ConfigError, match="still going on in another process"):
        RunFolder(tmp_path / "run", config, resume=True)
    first.close()
    RunFolder(tmp_path / "run", config, resume=True).close()


def test_a_file_is_no_run_folder(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match="not an empty folder"):
        make(tmp_path / "file", parse_config(JOB))
    with pytest.raises(ConfigError, match="cannot be written"):
        make(tmp_path / "file" / "inside", parse_config(JOB))


@pytest.mark.parametrize(
    ("override", "field"),
    [
        ("ppo.kl_coef=0.5", "ppo.kl_coef = 0.5"),
        ("run.batch_size=64", "run.batch_size = 64"),
        ("task.length=4", "task.length = 4"),
        ("learner.ranks=2", "learner.ranks = 2"),
        ("optimizer.eps=1e-8", "optimizer.eps = 1e-08"),
        ("scoring.missing_eos_penalty=1", "scoring.missing_eos_penalty = 1.0"),
    ],
)
def test_a_resume_that_would_train_something_else_is_refused(
    tmp_path: Path, override: str, field: str
) -> None:
    make(tmp_path / "run", parse_config(JOB))
    with pytest.raises(ConfigError) as refused:
        RunFolder(tmp_path / "run", parse_config(JOB, [override]), resume=True)
    assert field in str(refused.value)
    assert "was started with" in str(refused.value)


def test_a_resume_may_be_longer_and_watched_differently(tmp_path: Path) -> None:
    make(tmp_path / "run", parse_config(JOB))
    longer = parse_config(JOB, ["run.steps=500", "monitor.wandb=disabled", "scheduler.window=3"])
    folder = RunFolder(tmp_path / "run", longer, resume=True)
    folder.accept(longer)
    folder.close()
    assert parse_config((tmp_path / "run" / "config.toml").read_text()) == longer


def test_nothing_to_resume(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="holds no run"):
        RunFolder(tmp_path / "absent", parse_config(JOB), resume=True)
