"""The command line: `headrace COMMAND`, the same as `python -m cluster.cli COMMAND`.

Exit status: 0 success, 2 the user's mistake (one message with field, value and remedy), 1 a failure.
Heavy imports stand inside the commands, so that --help answers at once.
"""

import argparse
import secrets
import signal
import sys
import time
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path

from cluster.generation.arguments import add_generation
from cluster.labelling.arguments import add_label
from cluster.reward_job.arguments import add_evaluate_reward

EXIT_OK, EXIT_FAILED, EXIT_USER = 0, 1, 2


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command and give its exit status."""
    parser = _parser()
    options = parser.parse_args(arguments)
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        # Shells start what is to run in the background so, but whoever sends it there all the same means it.
        signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        status: int = options.run(options)
    except ValueError as error:  # what the user can mend; everything else keeps its traceback
        from cluster.visible import entry  # names and messages from outside could steer a terminal

        print(f"headrace: {entry(str(error))}", file=sys.stderr)
        return EXIT_USER
    except KeyboardInterrupt:  # before a run has its own way of stopping
        print("headrace: interrupted", file=sys.stderr)
        return EXIT_FAILED
    return status


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="headrace",
        description="Post-train language models by reinforcement learning: vLLM rollouts and rewards on Ray "
        "actors, PPO on DeepSpeed.",
    )
    parser.add_argument("--version", action="version", version=f"headrace {version('headrace')}")
    commands = parser.add_subparsers(title="commands", required=True, metavar="COMMAND")

    train = commands.add_parser("train", help="run a training job", description="Run a training job.")
    train.add_argument("config", type=Path, metavar="CONFIG.toml", help="what to train, on what, and how")
    _add_job_options(train)
    train.add_argument(
        "--resume", action="store_true", help="go on from the last good checkpoint in --run-dir"
    )
    train.set_defaults(run=_train)

    demo = commands.add_parser(
        "demo",
        help="the whole of the mission on a tiny model, nothing downloaded",
        description="Imitate demonstrations, have candidates labelled by a simulated annotator, learn a "
        "reward model and a held-out twin from the labels, improve the policy by PPO against it, and report "
        "what came of it: each stage a command that is printed first. About 3 minutes on 2 fast cores.",
    )
    _add_demo_options(demo)
    demo.set_defaults(run=_demo)

    report = commands.add_parser(
        "report", help="write report.html for a run folder", description="Write report.html for a run folder."
    )
    report.add_argument("run_dir", type=Path, metavar="RUN_DIR", help="the folder of a run, finished or not")
    report.set_defaults(run=_report)

    plan = commands.add_parser(
        "plan",
        help="simulate a job on a cluster that is not there yet, and choose its settings",
        description="Simulate a job with the real scheduler, for several numbers of actors, windows and "
        "publish intervals, and recommend some. Times come from a run (--run-dir) or a file (--model).",
    )
    plan.add_argument("config", type=Path, metavar="CONFIG.toml", help="the job to plan")
    _add_overrides(plan)
    _add_plan_options(plan)
    plan.set_defaults(run=_plan)

    add_generation(commands)
    add_label(commands)
    add_evaluate_reward(commands)

    doctor = commands.add_parser(
        "doctor",
        help="check a machine or a cluster, and a job's inputs, before a launch",
        description="Check packages, memory, cores, ports, tokens, clocks, disk, model, data and rewards, on "
        "this machine or on every host of a Ray cluster, and say what to do about each finding. Changes "
        "nothing. Exit status 1 if a check fails.",
    )
    _add_overrides(doctor)
    _add_doctor_options(doctor)
    doctor.set_defaults(run=_doctor)
    return parser


def _add_demo_options(demo: argparse.ArgumentParser) -> None:
    demo.add_argument(
        "--set",
        dest="overrides",
        action="append",
        default=[],
        metavar="[STAGE/]section.key=value",
        help="override one setting of a stage (imitation, labels, reward-model, heldout-reward-model, ppo); "
        "without a stage of PPO; may be given many times",
    )
    demo.add_argument("--seed", type=int, default=0, help="seed of every stage (0)")
    demo.add_argument("--pairs", type=int, default=3000, help="labels to make, half for either model (3000)")
    demo.add_argument(
        "--length-bias",
        type=float,
        default=0.0,
        help="how much the annotator likes each further character (0; 0.3 shows a reward being gamed)",
    )
    demo.add_argument(
        "--run-dir", type=Path, help="where everything is written (default: runs/demo-DATE-TIME)"
    )


def _add_overrides(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "--set",
        dest="overrides",
        action="append",
        default=[],
        metavar="section.key=value",
        help="override one setting; may be given many times",
    )


def _add_job_options(command: argparse.ArgumentParser) -> None:
    _add_overrides(command)
    command.add_argument(
        "--run-dir", type=Path, help="where everything is written (default: runs/NAME-DATE-TIME)"
    )


def _add_plan_options(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "--run-dir", type=Path, help="take the times from this run's folder (rollouts.jsonl, metrics.jsonl)"
    )
    command.add_argument("--model", type=Path, help="take the times from a TOML file; docs/plan.md shows one")
    command.add_argument(
        "--set-model",
        dest="model_overrides",
        action="append",
        default=[],
        metavar="table.key=value",
        help="override one value of --model; may be given many times",
    )
    command.add_argument("--actors", metavar="1,2,4", help="numbers of rollout actors to try")
    command.add_argument("--windows", metavar="0,1,2,4,8,adaptive", help="values of S to try")
    command.add_argument("--publish-every", metavar="1,2,4", help="publish intervals to try, in steps")
    command.add_argument(
        "--steps", type=int, default=0, help="learner steps to simulate (default: by the batch)"
    )
    command.add_argument(
        "--cores",
        type=float,
        help="cores that learner, actors and scorers share; 0: each has its own (default: as calibrated, "
        "or as in --model)",
    )
    command.add_argument("--seed", type=int, default=0, help="seed of the simulated lengths and losses")
    command.add_argument(
        "--out", type=Path, default=Path("plan"), help="folder for plan.json, plan.png and workload.toml"
    )


def _add_doctor_options(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "config",
        type=Path,
        nargs="?",
        metavar="CONFIG.toml",
        help="the job to check for; without it only hosts are checked",
    )
    command.add_argument(
        "--address",
        metavar="ADDR",
        help="Ray cluster whose hosts are checked: host:port of its head, auto, or local for this machine "
        "(default: cluster.address)",
    )
    command.add_argument(
        "--run-dir", type=Path, default=Path("runs"), help="where the run would be written (default: runs)"
    )
    command.add_argument(
        "--timeout", type=float, default=30.0, metavar="S", help="longest wait for hosts to answer (30)"
    )
    command.add_argument("--json", action="store_true", help="print the records as JSON")


def _train(options: argparse.Namespace) -> int:
    from cluster.config_file import ConfigError, load_job

    config = load_job(options.config, options.overrides)
    if options.resume and options.run_dir is None:
        raise ConfigError("--resume needs --run-dir: name the folder of the run to go on with")
    from cluster.job import run_job  # seconds of imports, after what can be refused at once

    summary = run_job(config, options.run_dir or _new_run_dir(config.run.name), resume=options.resume)
    return EXIT_OK if summary["status"] == "completed" else EXIT_FAILED


def _demo(options: argparse.Namespace) -> int:
    from cluster.demo import run_demo

    return run_demo(options, options.run_dir or _new_run_dir("demo"), main)


def _report(options: argparse.Namespace) -> int:
    from cluster.report import write_report
    from cluster.report_data import load_run

    if not options.run_dir.is_dir():
        raise ValueError(f"RUN_DIR {options.run_dir}: there is no such folder; give the folder of a run")
    if load_run(options.run_dir).setting("objective") == "reward_model":
        from cluster.reward_job.report import write_reward_report as write_report
    print(write_report(options.run_dir))
    return EXIT_OK


def _plan(options: argparse.Namespace) -> int:
    from cluster.plan_command import run_plan

    run_plan(options)
    return EXIT_OK


def _doctor(options: argparse.Namespace) -> int:
    from cluster.doctor import run_doctor

    return EXIT_OK if run_doctor(options) else EXIT_FAILED


def _new_run_dir(name: str) -> Path:
    return Path("runs") / f"{name}-{time.strftime('%Y%m%d-%H%M%S')}-{secrets.token_hex(2)}"


if __name__ == "__main__":
    sys.exit(main())
