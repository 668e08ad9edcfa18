"""How many scheduler transitions a second, by number of actors. Writes scheduler_speed.json.

    python benchmarks/scheduler_speed.py [--groups 60000] [--repeats 3] [--actors 10,100,1000,10000]

A transition moves one group from a state to the next: admitted, completed, taken by a step. `scheduler` is
the scheduler and the dispatcher alone, groups completing in random order; `simulator` is the whole simulation
with engines, tokens, scoring, weight sync and a long tail of lengths. One core, processor time, the best of
the repeats.
"""

import argparse
import json
import random
import time
from pathlib import Path

from machine import describe

from cluster.dispatch import Dispatcher, next_dispatch
from cluster.plan_model import Workload
from cluster.scheduler import Refusal, Scheduler, SchedulerSettings
from cluster.sim_results import Plant
from cluster.simulate import Simulation

HERE = Path(__file__).resolve().parent
WINDOW, SLOTS = 4, 8


def scheduler_speed(actors: int, groups: int) -> float:
    """Transitions a second of scheduler and dispatcher: groups complete in random order."""
    steps = max(2 * WINDOW, groups // actors)
    scheduler = Scheduler(groups_per_step=actors, window=WINDOW, total_steps=steps)
    dispatcher = Dispatcher()
    for index in range(actors):
        dispatcher.add(f"rollout-{index}", capacity=SLOTS, version=0)
    rng = random.Random(0)
    flying: list[tuple[int, str, int]] = []
    transitions, began = 0, time.process_time()
    while scheduler.step < steps:
        while not isinstance(answer := next_dispatch(scheduler, dispatcher), Refusal):
            admission, actor = answer
            flying.append((admission.group_id, actor.name, actor.version))
            transitions += 1
        if flying:
            place = rng.randrange(len(flying))
            flying[place], flying[-1] = flying[-1], flying[place]
            group, name, version = flying.pop()
            dispatcher.end(name)
            scheduler.complete(group, version)
            transitions += 1
        if scheduler.ready():
            transitions += len(scheduler.take())
            for index in range(actors):
                dispatcher.set_version(f"rollout-{index}", scheduler.step)
    return transitions / (time.process_time() - began)


def simulator_speed(actors: int, groups: int) -> float:
    """Transitions a second of the whole simulator."""
    plant = Plant(
        groups_per_step=actors,
        group_size=8,
        actors=actors,
        max_groups_in_flight=SLOTS,
        max_num_seqs=256,
        max_new_tokens=4096,
        scorers=1 + actors // 16,
        scheduler=SchedulerSettings(window=WINDOW),
    )
    workload = (
        Workload.model_validate({})
        .changed("lengths", kind="lognormal", median=300.0, sigma=0.8)
        .changed("learner", step_s=5.0, token_s=0.0)
    )
    simulation = Simulation(plant, workload, steps=max(2 * WINDOW, groups // actors))
    began = time.process_time()
    simulation.run()
    return simulation.transitions / (time.process_time() - began)


def main() -> None:
    """Measure and write the results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--groups", type=int, default=60_000, help="groups of one measurement, at least")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--actors", default="10,100,1000,10000")
    options = parser.parse_args()
    rows = []
    for actors in map(int, options.actors.split(",")):
        row = {
            "actors": actors,
            "scheduler_per_s": max(scheduler_speed(actors, options.groups) for _ in range(options.repeats)),
            "simulator_per_s": max(simulator_speed(actors, options.groups) for _ in range(options.repeats)),
        }
        rows.append(row)
        print(
            f"{actors:6d} actors: {row['scheduler_per_s']:8.0f} transitions/s of the scheduler alone, "
            f"{row['simulator_per_s']:8.0f} of the whole simulator",
            flush=True,
        )
    result = {"command": "python benchmarks/scheduler_speed.py", "machine": describe(), "rows": rows}
    (HERE / "scheduler_speed.json").write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
