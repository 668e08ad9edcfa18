"""The user's function in its child process: everything it may do wrong, and what is left running."""

import datetime
import decimal
import math
import os
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import numpy as np
import psutil
import pytest

from rewards.base import RewardError, RewardRequest, Score
from rewards.build import build_reward
from rewards.child_process import child_environment
from rewards.settings import RewardSettings

pytestmark = pytest.mark.alone

# Each function is asked for by the tests below; `completion` says what to do where one name serves several.
REWARDS = """
import ctypes, math, os, signal, subprocess, sys, time, collections, decimal, fractions, urllib.parse
from dataclasses import dataclass
import numpy as np
import beside

@dataclass
class Holder:
    value: float

class Namespace:
    @staticmethod
    def inner(prompt, completion, row):
        return 0.25

def echo(prompt, completion, row):
    kind = "chat" if isinstance(prompt, list) else "text"
    return {"reward": len(completion), "is_chat": kind == "chat", "row_length": len(row), "note": kind}

VALUES = {
    "int": 3, "float": -0.5, "numpy": np.float32(0.5), "numpy int": np.int64(7), "zero-d": np.array(2.0),
    "decimal": decimal.Decimal("1.5"), "fraction": fractions.Fraction(1, 4),
    "mapping": {"reward": 1, "length": np.int32(4), "exact": True, "note": "text", "list": [1]},
    "ordered": collections.OrderedDict(score=2.0), "both": {"reward": 1.0, "score": 0.5},
    "nan": math.nan, "inf": -math.inf, "none": None, "text": "1.0", "bool": True,
    "numpy bool": np.bool_(False),
    "list": [1.0], "array": np.array([1.0, 2.0]), "huge": 10**400, "no reward": {"length": 1},
    "empty": {}, "nan inside": {"reward": 1.0, "length": math.nan}, "none inside": {"reward": None},
    "odd key": {"reward": 1.0, 3: 1.0},
    "unprintable key": {"reward": 1.0, "a\\x1b[2J\\ud800": 1.0},
    "long key": {"reward": 1.0, "x" * 101: 1.0},
}

def values(prompt, completion, row):
    return VALUES[completion]

def torch_value(prompt, completion, row):
    import torch
    return torch.tensor(0.75)

async def asynchronous(prompt, completion, row):
    return 1.0

def act(prompt, completion, row):
    if completion == "raise":
        return 1 / 0
    if completion == "exit":
        sys.exit("bye")
    if completion == "os._exit":
        os._exit(3)
    if completion == "segfault":
        ctypes.string_at(0)
    if completion == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    if completion == "hang":
        while True:
            pass
    if completion == "sleep with a child":
        sleeper = subprocess.Popen(["sleep", "600"])
        open(row["pids"], "w").write(f"{sleeper.pid}")
        time.sleep(600)
    if completion == "memory":
        return np.zeros(3 << 30, np.uint8).nbytes
    if completion == "recursion":
        return act(prompt, completion, row)
    if completion == "print":
        print('{"id": 1, "result": {"reward": 99, "components": {}}}')
        sys.stdout.flush()
        os.write(1, b"garbage\\n")
        os.system("echo from a shell")
        return 0.5
    if completion == "read":
        return len(sys.stdin.read())
    if completion == "close":
        os.closerange(0, 64)
        return 1.0
    if completion == "pid":
        return os.getpid()
    if completion == "secrets":
        return {"reward": 0, **{name: 1 for name in os.environ if name.startswith("HR_")}}
    if completion.startswith("tell"):
        key = os.environ["HR_JUDGE_KEY"]
        told = {"url": urllib.parse.urlencode({"key": key}), "repr": repr(key), "cut": "x" * 490 + key}
        raise ValueError("401 for " + told[completion.removeprefix("tell ")])
    if completion == "where":
        return float(os.getcwd() == row["cwd"] and beside.HERE == 1)
    return 1.0

def two_arguments(prompt, completion):
    return 1.0

not_callable = 4
"""


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "my_rewards.py").write_text(REWARDS)
    (tmp_path / "beside.py").write_text("HERE = 1\n")
    return tmp_path


@pytest.fixture
def load(folder):
    """Build a reward of `my_rewards.py`; all are closed at the end, and then nothing of them runs."""
    built = []

    def build(function, timeout_s=10.0, memory_gib=4.0, environment=(), **settings):
        table = RewardSettings(kind="function", function=function, **settings)
        limits = {"timeout_s": timeout_s, "memory_gib": memory_gib, "environment": environment}
        reward = build_reward([table], None, directory=folder, **limits)
        built.append(reward)
        return reward

    yield build
    pids = [child_pid(reward) for reward in built]
    for reward in built:
        reward.close()
        reward.close()
    assert not [pid for pid in pids if pid and psutil.pid_exists(pid)]


def child_pid(reward):
    return reward._parts[0][1]._child.pid


def ask(reward, *completions, **row):
    return reward.score([RewardRequest("the prompt", text, row, True) for text in completions])


def test_it_gets_prompt_completion_and_row_as_they_are(load):
    reward = load("my_rewards.py:echo", name="mine")
    chat = [{"role": "user", "content": "hi"}]
    requests = [
        RewardRequest("text", "four", {"prompt": "text", "answer": 1}, True),
        RewardRequest(chat, "ünï\ud800", {"prompt": chat}, False),
    ]
    first, second = reward.score(requests)
    assert first == Score(4.0, {"mine": 4.0, "mine/is_chat": 0.0, "mine/row_length": 2.0})
    assert second == Score(4.0, {"mine": 4.0, "mine/is_chat": 1.0, "mine/row_length": 1.0})


def test_files_modules_and_attributes_of_attributes(load, folder):
    for function in (
        "my_rewards:Namespace.inner",
        "./my_rewards.py:Namespace.inner",
        f"{folder}/my_rewards.py:Namespace.inner",
    ):
        assert ask(load(function), "x") == [Score(0.25, {"function": 0.25})]
    assert ask(load("my_rewards.py:act"), "where", cwd=str(folder))[0].value == 1.0


@pytest.mark.parametrize(
    ("name", "value", "extras"),
    [
        ("int", 3.0, {}),
        ("float", -0.5, {}),
        ("numpy", 0.5, {}),
        ("numpy int", 7.0, {}),
        ("zero-d", 2.0, {}),
        ("decimal", 1.5, {}),
        ("fraction", 0.25, {}),
        ("mapping", 1.0, {"f/length": 4.0, "f/exact": 1.0}),
        ("ordered", 2.0, {}),
        ("both", 1.0, {"f/score": 0.5}),
        ("bool", 1.0, {}),
        ("numpy bool", 0.0, {}),
    ],
)
def test_numbers_and_mappings_are_taken(value_reward, name, value, extras):
    assert ask(value_reward, name) == [Score(value, {"f": value, **extras})]


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("nan", "it returned nan; a reward must be a finite number"),
        ("inf", "it returned -inf; a reward must be a finite number"),
        ("none", "it returned None (NoneType); return a number"),
        ("text", "it returned '1.0' (str); return a number"),
        ("list", "it returned [1.0] (list); return a number"),
        ("array", "it returned array([1., 2.]) (ndarray), not one number"),
        ("huge", "not one number: "),
        ("no reward", "it returned a mapping without 'reward'; its keys: 'length'"),
        ("empty", "it returned a mapping without 'reward'; its keys: none"),
        ("nan inside", "it returned a mapping whose 'length' is nan"),
        ("none inside", "it returned a mapping whose 'reward' is None (NoneType)"),
        ("odd key", "the key 3; keys must be text"),
        ("unprintable key", r"the key 'a\x1b[2J\ud800'; keys name metrics"),
        ("long key", f"the key '{'x' * 100}'; keys name metrics: at most 100 characters"),
        ("unknown", "it raised KeyError: 'unknown'"),
    ],
)
def test_anything_else_is_an_error_that_shows_it(value_reward, name, message):
    bad, good = ask(value_reward, name, "int")
    assert isinstance(bad, RewardError)
    assert bad.reward == "f"
    assert message in bad.reason
    assert good.value == 3.0


@pytest.fixture(scope="module")
def value_reward(tmp_path_factory):
    folder = tmp_path_factory.mktemp("values")
    (folder / "my_rewards.py").write_text(REWARDS)
    (folder / "beside.py").write_text("HERE = 1\n")
    table = RewardSettings(kind="function", function="my_rewards.py:values", name="f")
    reward = build_reward([table], None, timeout_s=10, memory_gib=4.0, directory=folder)
    yield reward
    reward.close()


def test_a_torch_scalar_and_a_coroutine(load):
    assert ask(load("my_rewards.py:torch_value", timeout_s=60, memory_gib=16.0), "x")[0].value == 0.75
    assert "cannot be async" in ask(load("my_rewards.py:asynchronous"), "x")[0].reason


@pytest.mark.parametrize(
    ("completion", "message"),
    [
        ("raise", "it raised ZeroDivisionError: division by zero (line "),
        ("exit", "it raised SystemExit: bye"),
        ("recursion", "it raised RecursionError"),
    ],
)
def test_what_it_raises_is_reported_and_the_same_child_goes_on(load, completion, message):
    reward = load("my_rewards.py:act")
    before = child_pid(reward)
    bad, good = ask(reward, completion, "fine")
    assert message in bad.reason
    assert good.value == 1.0
    assert child_pid(reward) == before


def test_the_traceback_names_the_line(load):
    (bad,) = ask(load("my_rewards.py:act"), "raise")
    assert bad.reason.endswith("my_rewards.py, in act: return 1 / 0)")


@pytest.mark.parametrize(
    ("completion", "message"),
    [
        ("os._exit", "its process ended with exit status 3 instead of answering"),
        ("segfault", "its process was killed by SIGSEGV"),
        ("kill", "its process was killed by SIGKILL"),
        ("close", "its process ended with exit status 1"),
    ],
)
def test_its_death_is_noticed_at_once_and_a_fresh_child_takes_over(load, completion, message):
    # The deadline is far beyond the test's own: only noticing the death can answer in time.
    reward = load("my_rewards.py:act", timeout_s=10_000.0)
    before = child_pid(reward)
    bad, not_run = ask(reward, completion, "fine")
    assert message in bad.reason
    assert not_run.reason == "not run, because it hung or died on another completion of the same group"
    assert ask(reward, "fine")[0].value == 1.0
    assert child_pid(reward) != before


def test_a_child_killed_while_idle_costs_nobody_a_completion(load):
    reward = load("my_rewards.py:act")
    os.kill(child_pid(reward), signal.SIGKILL)
    assert gone(child_pid(reward))
    assert ask(reward, "fine")[0].value == 1.0


def test_a_stopped_child_meets_the_deadline_even_when_the_pipe_is_full(load):
    reward = load("my_rewards.py:act", timeout_s=0.5)
    os.kill(child_pid(reward), signal.SIGSTOP)
    (late,) = ask(reward, "x" * 1_000_000)
    assert "did not answer within 0.5 s" in late.reason
    assert ask(reward, "fine")[0].value == 1.0


def test_a_hang_costs_a_call_one_deadline_and_the_next_call_works(load):
    reward = load("my_rewards.py:act", timeout_s=1.0)
    first, hung, *rest = ask(reward, "fine", "hang", "hang", "fine")
    assert first.value == 1.0
    assert hung.reason == "it did not answer within 1 s and was killed (scoring.reward_timeout_s)"
    assert [r.reason for r in rest] == [
        "not run, because it hung or died on another completion of the same group"
    ] * 2
    assert ask(reward, "fine")[0].value == 1.0


def gone(pid):
    """Whether a process ended (a zombie has, though nobody reaped it); waits a while."""
    for _ in range(200):
        if not psutil.pid_exists(pid) or psutil.Process(pid).status() == psutil.STATUS_ZOMBIE:
            return True
        time.sleep(0.05)
    return False


def test_what_it_started_dies_with_it(load, tmp_path):
    reward = load("my_rewards.py:act", timeout_s=1.0)
    pids = tmp_path / "pids"
    (hung,) = ask(reward, "sleep with a child", pids=str(pids))
    assert "did not answer" in hung.reason
    assert gone(int(pids.read_text()))


def test_it_dies_with_its_parent_even_inside_a_loop_that_holds_the_interpreter(folder):
    (folder / "stuck.py").write_text(
        "import re\ndef f(p, c, r):\n    return re.match('(a+)+$', 'a' * 99 + 'b')\n"
    )
    parent = textwrap.dedent("""
        import sys, threading
        from pathlib import Path
        from rewards.base import RewardRequest
        from rewards.build import build_reward
        from rewards.settings import RewardSettings
        table = RewardSettings(kind="function", function="stuck.py:f")
        reward = build_reward([table], None, timeout_s=600, memory_gib=4, directory=Path(sys.argv[1]))
        print(reward._parts[0][1]._child.pid, flush=True)
        reward.score([RewardRequest("", "", {}, True)])
    """)
    root = Path(__file__).parents[2]
    process = subprocess.Popen(
        [sys.executable, "-c", parent, str(folder)], stdout=subprocess.PIPE, cwd=root, text=True
    )
    try:
        child = int(process.stdout.readline())
        time.sleep(0.5)  # let the call begin
        assert psutil.pid_exists(child)
    finally:
        process.kill()
        process.wait()
        process.stdout.close()
    assert gone(child)


def test_what_it_prints_goes_to_standard_error_and_it_has_no_input(load, capfd):
    reward = load("my_rewards.py:act")
    printed, read = ask(reward, "print", "read")
    assert (printed.value, read.value) == (0.5, 0.0)
    captured = capfd.readouterr()
    assert captured.out == ""
    assert all(text in captured.err for text in ('"reward": 99', "garbage", "from a shell"))


def test_secrets_are_kept_from_it(load, monkeypatch):
    for name in ("HR_API_KEY", "HR_ACCESS_TOKEN", "HR_SECRET_X", "HR_PASSWORD", "hr_key", "HR_PLAIN"):
        monkeypatch.setenv(name, "value")
    (score,) = ask(load("my_rewards.py:act", name="f"), "secrets")
    assert score.components == {"f": 0.0, "f/HR_PLAIN": 1.0}
    assert child_environment({"wandb_api_key": "x", "HOME": "/h"}).keys() >= {"HOME", "OMP_NUM_THREADS"}
    assert "wandb_api_key" not in child_environment({"wandb_api_key": "x"})
    assert child_environment({"TOKENIZERS_PARALLELISM": "false"})["TOKENIZERS_PARALLELISM"] == "false"


def test_a_secret_that_is_named_reaches_it(load, monkeypatch):
    monkeypatch.setenv("HR_JUDGE_KEY", "value")
    monkeypatch.setenv("HR_OTHER_KEY", "value")
    (score,) = ask(load("my_rewards.py:act", name="f", environment=["HR_JUDGE_KEY"]), "secrets")
    assert score.components == {"f": 0.0, "f/HR_JUDGE_KEY": 1.0}
    with pytest.raises(ValueError, match=r"scoring\.reward_env names 'HR_UNSET_KEY', which is not set"):
        load("my_rewards.py:act", environment=["HR_UNSET_KEY"])


def test_an_error_tells_no_secret_however_it_is_spelled_or_cut(load, monkeypatch):
    monkeypatch.setenv("HR_JUDGE_KEY", "sk-'ab+c/d=&\\äz")
    reward = load("my_rewards.py:act", name="f", environment=["HR_JUDGE_KEY"])
    for how, answer in zip(
        ("url", "repr", "cut"), ask(reward, "tell url", "tell repr", "tell cut"), strict=True
    ):
        assert "ab" not in answer.reason.partition(" (line")[0], how
        assert ("x" * 490 if how == "cut" else "[redacted]") in answer.reason


def test_the_memory_limit_is_the_one_given(load):
    # 3 GiB do not fit in 2 GiB but do in 8 GiB (pages that are never touched cost nothing).
    bad, good = ask(load("my_rewards.py:act", memory_gib=2.0), "memory", "fine")
    assert "MemoryError" in bad.reason
    assert bad.reason.endswith("; it may need more than scoring.reward_memory_gib allows")
    assert good.value == 1.0
    assert ask(load("my_rewards.py:act", memory_gib=8.0), "memory")[0].value == float(3 << 30)


@pytest.mark.parametrize(
    ("function", "message"),
    [
        ("my_rewards.py:missing", "has no 'missing'; it has .*echo"),
        ("my_rewards:missing", "'my_rewards' has no 'missing'"),
        ("no_such_module:f", "ModuleNotFoundError: No module named 'no_such_module'"),
        ("my_rewards.py:not_callable", "is a int, not a function"),
        ("my_rewards.py:two_arguments", r"it takes \(prompt, completion\), but is called as"),
        ("broken.py:f", "SyntaxError"),
        ("raises.py:f", r"RuntimeError: no licence \(line 1 of .*raises.py, in <module>"),
        ("hangs.py:f", "it did not load within 1 s"),
        ("dies.py:f", "exit status 9"),
        ("my_rewards.py", "name it 'module:function'"),
        ("my_rewards.py:", "name it 'module:function'"),
    ],
)
def test_a_function_that_cannot_be_used_is_refused_when_built(load, folder, monkeypatch, function, message):
    monkeypatch.setattr("rewards.build.START_TIMEOUT_S", 1.0 if "hangs" in function else 60.0)
    (folder / "broken.py").write_text("def f(:\n")
    (folder / "raises.py").write_text("raise RuntimeError('no licence')\n")
    (folder / "hangs.py").write_text("while True: pass\n")
    (folder / "dies.py").write_text("import os; os._exit(9)\n")
    before = {child.pid for child in psutil.Process().children()}
    with pytest.raises(ValueError, match=f"reward.function = '{function}'.*{message}"):
        load(function)
    assert {child.pid for child in psutil.Process().children()} <= before


def test_a_file_named_like_a_library_does_not_replace_it(load, folder):
    (folder / "json.py").write_text("import math\ndef f(p, c, r): return math.pi\n")
    assert ask(load("json.py:f"), "x")[0].value == math.pi


def test_rows_travel_as_plain_data_or_not_at_all(load):
    reward = load("my_rewards.py:echo", name="f")
    row = {
        "array": np.array([1, 2]),
        "number": np.float32(1.5),
        "date": datetime.date(2024, 1, 2),
        "price": decimal.Decimal("1.20"),
        "nested": {"a": (1, None)},
    }
    assert ask(reward, "abc", **row)[0].components["f/row_length"] == 5.0
    (bad,) = ask(reward, "abc", image=b"\x89PNG")
    assert bad.reason.startswith("the row, 'image', is bytes, which cannot be handed to a function")
