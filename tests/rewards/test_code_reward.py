"""The reward for programs: what passes, what counts as which failure, and what cannot be forged."""

import json
import textwrap

import pytest
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from rewards.base import RewardError, RewardRequest, Score
from rewards.build import build_reward, check_rewards, check_row, required_columns, uses_child
from rewards.code_tests import Case, Verdict, cases_of, judge, program_of, same
from rewards.sandbox import Sandbox, SandboxError
from rewards.settings import RewardSettings, TaskSettings

pytestmark = pytest.mark.alone

# f(x) = 3x + 1 at four places
TESTS = [{"input": [x], "output": 3 * x + 1} for x in (0, 2, -5, 70)]
ROW = {"tests": TESTS, "entry_point": "f"}


@pytest.fixture(scope="module")
def reward():
    try:
        Sandbox().start()
    except SandboxError as error:
        pytest.skip(str(error))
    made = build_reward([RewardSettings(kind="code")], None, timeout_s=3, memory_gib=1)
    yield made
    made.close()


def score(reward, program, row=ROW, *, finished=True):
    (answer,) = reward.score([RewardRequest("", textwrap.dedent(program), row, finished)])
    return answer


def told(answer):
    """The components that are not zero, without the reward's own value."""
    names = ("all_passed", "ran", "stopped", "wrote_own_answers")
    return {name for name in names if answer.components[f"code/{name}"]}


@pytest.mark.parametrize(
    ("program", "value", "components"),
    [
        ("def f(x): return 3*x+1", 1.0, {"all_passed", "ran"}),
        ("f=lambda x:x*3+1", 1.0, {"all_passed", "ran"}),
        ("def f(x): return 3.0*x+1", 1.0, {"all_passed", "ran"}),  # 7.0 is 7
        ("def f(x): return 3*abs(x)+1", 3 / 4, {"ran"}),
        ("def f(x): return 1", 1 / 4, {"ran"}),
        ("def f(x): return True", 0.0, {"ran"}),  # True is not 1
        ("def f(x): return str(3*x+1)", 0.0, {"ran"}),
        ("def f(x): print(3*x+1)", 0.0, {"ran"}),
        ("def f(x): return 6 / x and 3*x+1", 3 / 4, {"ran"}),  # a division by zero at 0
        ("def f(x):\n    if x < 0: raise SystemExit\n    return 3*x+1", 3 / 4, {"ran"}),
        ("def f(x):\n    if x < 0:\n        while True: pass\n    return 3*x+1", 2 / 4, {"stopped"}),
        ("def f(x):\n    if x < 0: bytearray(1 << 40)\n    return 3*x+1", 3 / 4, {"ran"}),
        ("def g(x): return 3*x+1", 0.0, {"ran"}),
        ("def f(x, y): return 3*x+1", 0.0, {"ran"}),
        ("1/0", 0.0, set()),
        ("def f(x) return 3*x+1", 0.0, set()),
        ("", 0.0, set()),
        (
            "from dataclasses import dataclass\n@dataclass\nclass A:\n    x: int\n"
            "def f(x): return 3*A(x).x+1",
            1.0,
            {"all_passed", "ran"},
        ),
        (
            "import pickle\nclass A: pass\ndef f(x): return pickle.loads(pickle.dumps(A())) and 3*x+1",
            1.0,
            None,
        ),
        ("Here it is:\n```python\ndef f(x): return 3*x+1\n```\nDone.", 1.0, {"all_passed", "ran"}),
    ],
)
def test_the_share_of_tests_passed(reward, program, value, components):
    answer = score(reward, program)
    assert isinstance(answer, Score), answer
    assert answer.value == value
    assert components is None or told(answer) == components


def test_a_cut_off_program_is_not_run(reward):
    assert score(reward, "def f(x): return 3*x+1", finished=False).value == 0.0
    assert score(reward, "```\ndef f(x): return 3*x+1\n```\nand", finished=False).value == 1.0


def test_all_or_nothing():
    table = RewardSettings(kind="code", entry_point="f", all_or_nothing=True)
    try:
        reward = build_reward([table], None, timeout_s=3, memory_gib=1)
    except ValueError as error:
        pytest.skip(str(error))
    row = {"tests": TESTS}
    assert score(reward, "def f(x): return 3*x+1", row).value == 1.0
    assert score(reward, "def f(x): return 3*abs(x)+1", row).value == 0.0
    reward.close()


# --- Forgery ---------------------------------------------------------------------------------------------

SHOUT = "".join(f'{{"call": {n}, "value": {value}}}\\n' for n, value in enumerate((1, 7, -14, 211)))


@pytest.mark.parametrize(
    ("program", "most", "components"),
    [
        # Ending early, with the look of success
        ("import os; os._exit(0)", 0.0, {"ran"}),
        ("raise SystemExit(0)", 0.0, {"ran"}),
        ("def f(x):\n    import os; os._exit(0)", 0.0, {"ran"}),
        # Printing a verdict
        ('print("ok")\nprint({"passed": 4})\nimport os; os._exit(0)', 0.0, {"ran"}),
        # Objects that equal everything, or are written as they please
        ("class A:\n    def __eq__(self, other): return True\ndef f(x): return A()", 0.0, {"ran"}),
        ("class A(int):\n    def __eq__(self, other): return True\ndef f(x): return A(5)", 0.0, {"ran"}),
        ("class A(int):\n    def __repr__(self): return '1,\"value\":1'\ndef f(x): return A()", 0.0, {"ran"}),
        ("def f(x): return float('nan')", 0.0, {"ran"}),
        # Changing what sends the answers
        ('import json\njson.dumps = lambda *a, **k: \'{"call": 0, "value": true}\'\ndef f(x): 1', 0.0, None),
        (
            "import json\njson.dumps = lambda *a, **k: 'passed'\ndef f(x): 1",
            0.0,
            {"ran", "wrote_own_answers"},
        ),
        # Several guesses for one call: only one answer a call is read
        (
            "import os\ndef f(x):\n    for n in range(300):\n"
            '        os.write(3, b\'{"call": 0, "value": %d}\\n\' % n)\n    return 1',
            0.0,
            {"ran", "wrote_own_answers"},
        ),
        (
            'import os\nfor _ in range(2): os.write(3, b\'{"call": 0, "value": 1}\\n\')',
            0.0,
            {"ran", "wrote_own_answers"},
        ),
        # Answers of its own beside the runner's
        (f"import os\nos.write(3, b'{SHOUT}')\ndef f(x): return 0", 0.0, {"ran", "wrote_own_answers"}),
        # Not JSON as we read it
        (
            'import os\nos.write(3, b\'{"call": 0, "value": NaN}\\n\'); os._exit(0)',
            0.0,
            {"ran", "wrote_own_answers"},
        ),
        ("import os\nos.write(3, b'[' * 100000 + b'\\n'); os._exit(0)", 0.0, {"ran", "wrote_own_answers"}),
        ("import os\nos.write(3, b'9' * 100000 + b'\\n'); os._exit(0)", 0.0, {"ran", "wrote_own_answers"}),
        ("import os\nos.write(3, b'\\xff\\n'); os._exit(0)", 0.0, {"ran", "wrote_own_answers"}),
        ("import os\nos.write(3, b'null\\n' * 4); os._exit(0)", 0.0, {"ran", "wrote_own_answers"}),
        # Flooding
        ("def f(x): return 'a' * (1 << 24)", 0.0, {"stopped"}),
        ("print('a' * (1 << 24))\ndef f(x): return 3*x+1", 0.0, {"stopped"}),
    ],
)
def test_no_verdict_can_be_forged(reward, program, most, components):
    answer = score(reward, program)
    assert isinstance(answer, Score), answer
    assert answer.value <= most
    assert components is None or told(answer) == components


def test_the_expected_outputs_are_nowhere_in_the_sandbox(reward):
    # The program searches every object and frame it can reach for its input and for a number that only the
    # expected output of the other test is. Finding the input alone shows that the search works.
    number = 91823747712938
    row = {
        "entry_point": "f",
        "tests": [{"input": [number], "output": ["input"]}, {"input": [0], "output": number + 1}],
    }
    program = """
    import gc, sys
    def everything():
        seen, todo = set(), [sys._getframe(1), sys.modules, *gc.get_objects()]
        while todo:
            one = todo.pop()
            if id(one) in seen: continue
            seen.add(id(one))
            yield one
            todo += gc.get_referents(one)
    def f(x):
        found = set()
        for one in everything():
            text = str(one) if type(one) in (int, str, bytes) else ""
            if str(x) in text: found.add("input")
            if str(x + 1) in text: found.add("output")
        return sorted(found)
    """
    assert score(reward, program, row).value == 1 / 2


def test_one_program_cannot_spoil_the_next(reward):
    requests = [
        RewardRequest("", program, ROW, True)
        for program in (
            "import os, json\njson.loads = None\nopen('left', 'w').close()\nos.kill(os.getpid(), 11)",
            "def f(x): return 3*x+1",
            "while True: pass",
            "def f(x): return 3*x+1",
        )
    ]
    assert [answer.value for answer in reward.score(requests)] == [0.0, 1.0, 0.0, 1.0]


def test_a_broken_sandbox_is_an_error_and_not_a_zero(reward, monkeypatch):
    def broken(self, *arguments, **named):
        raise SandboxError("the keeper ended")

    monkeypatch.setattr(Sandbox, "run", broken)
    answer = score(reward, "def f(x): return 3*x+1")
    assert isinstance(answer, RewardError)
    assert str(answer) == "reward 'code': the keeper ended"


def test_a_host_without_a_sandbox_is_refused_before_anything_runs(monkeypatch):
    monkeypatch.setattr("rewards.sandbox.platform.machine", lambda: "riscv64")
    with pytest.raises(
        ValueError, match=r'reward.kind = "code" of .code. cannot be used on this host: .*riscv64'
    ):
        build_reward([RewardSettings(kind="code")], None, timeout_s=3, memory_gib=1)


# --- Comparing -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("expected", "found", "equal"),
    [
        (2, 2, True),
        (2, 2.0, True),
        (2.0, 2, True),
        (2, 2.0000000001, False),  # whole numbers are exact
        (0.1 + 0.2, 0.3, True),
        (0.3, 0.3001, False),
        (1.0, 10**400, False),
        (1, True, False),
        (True, 1, False),
        (False, False, True),
        (None, None, True),
        (None, 0, False),
        (0, None, False),
        ("2", 2, False),
        ([1, [2]], [1, [2]], True),
        ([1, 2], [1, 2, 3], False),
        ([1, 2], [1, True], False),
        ([], None, False),
        ({"a": 1}, {"a": 1.0}, True),
        ({"a": 1}, {"a": 1, "b": 2}, False),
        ({"a": 1}, [["a", 1]], False),
    ],
)
def test_when_an_answer_is_right(expected, found, equal):
    assert same(expected, found) is equal


CASES = [Case([0], 1), Case([2], 7)]


@pytest.mark.parametrize(
    ("answers", "verdict"),
    [
        (b'{"call": 0, "value": 1}\n{"call": 1, "value": 7}\n', Verdict(2, True)),
        (b'{"call": 0, "error": "KeyError"}\n{"call": 1, "value": 7}\n', Verdict(1, True)),
        (b'{"call": 0, "value": 1}\n{"call": 1, "val', Verdict(1, True)),  # ended in the middle
        (b"", Verdict(0, True)),
        (b'{"call": 1, "value": 7}\n', Verdict(0, False)),  # out of order
        (b'{"call": 0, "value": 1}\n{"call": 0, "value": 1}\n', Verdict(0, False)),
        (b'{"call": 0, "value": 1}\n{"call": 1, "value": 7}\n\n', Verdict(0, False)),
        (b'{"call": 0, "value": 1, "error": ""}\n', Verdict(0, False)),
        (b'{"call": 0}\n', Verdict(0, False)),
        (b'{"call": 0, "value": 1e999}\n', Verdict(0, True)),
        (b'{"call": 0, "value": Infinity}\n', Verdict(0, False)),
        (b"[0, 1]\n", Verdict(0, False)),
    ],
)
def test_how_answers_are_read(answers, verdict):
    assert judge(CASES, answers) == verdict


@hypothesis_settings(deadline=None, max_examples=200)
@given(st.binary(max_size=200) | st.text('{}"[]:,\n call0value1', max_size=60).map(str.encode))
def test_any_bytes_are_judged(answers):
    verdict = judge(CASES, answers)
    assert verdict.passed in (0, 1, 2)
    assert verdict.readable or verdict.passed == 0


values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=8,
)


@hypothesis_settings(deadline=None, max_examples=200)
@given(values)
def test_every_value_equals_itself_after_its_way_through_json(value):
    assert same(value, json.loads(json.dumps(value)))


# --- Programs and rows -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("completion", "finished", "program"),
    [
        ("x = 1", True, "x = 1"),
        ("x = 1", False, None),
        ("Well:\n```python\nx = 1\n```", True, "x = 1\n"),
        ("```\nx = 1\n```\nor\n```py\nx = 2\n```", True, "x = 2\n"),
        ("```\nx = 1\n```\nand then", False, "x = 1\n"),
        ("```\nx = 1\n```\nor\n```\nx = 2", True, "x = 1\n"),  # the last closed one
        ("```Python3 \nx = 1\n```", True, "x = 1\n"),
        ("```python\nx = 1\n```\nprints\n```text\n1\n```", True, "x = 1\n"),
        ("```python\nx = 1\n```\nprints\n```\n1\n```", True, "x = 1\n"),  # one that says Python first
        ('```python title="a.py"\nx = 1\n```', True, "x = 1\n"),
        ("1. So:\n   ```python\n   x = 1\n   ```", True, "x = 1\n"),
        ("```json\n1\n```", True, None),
        ("so\n```python\nx = 1", True, "x = 1"),
        ("so\n```python\nx = 1", False, None),
        ("", True, ""),
    ],
)
def test_where_the_program_stands(completion, finished, program):
    assert program_of(completion, finished) == program


@pytest.mark.parametrize(
    "definition", ["def f(x):\n    return x\n", "class f: pass\n", "f = len\n", "async def f(): pass\n"]
)
def test_of_several_fences_the_one_with_the_function_is_the_program(definition):
    use = "print(f(2))\nfound = f(3)\n"
    completion = f"```python\nf = None\n```\nno:\n```python\n{definition}```\nthus:\n```python\n{use}```"
    assert program_of(completion, True, "f") == definition
    assert program_of(completion, True, "g") == use
    assert program_of(completion, True) == use


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({}, r"no column 'tests' \(its columns: none\); set reward.tests_column"),
        ({"tests": []}, "not a list of 1 to 256 tests"),
        ({"tests": [{"input": [1], "output": 1}] * 257}, "not a list of 1 to 256 tests"),
        ({"tests": "[1"}, "is text, but not JSON"),
        ({"tests": ["assert f(1) == 2"]}, "test 0, is 'assert f"),
        ({"tests": [{"input": 1, "output": 1}]}, "test 0"),
        ({"tests": [{"input": [1]}]}, "test 0"),
        ({"tests": [{"input": [1], "output": float("nan")}]}, "test 0, 'output', holds nan"),
        ({"tests": [{"input": [1], "output": 1}]}, "column 'entry_point' is None"),
        ({"tests": [{"input": [1], "output": 1}], "entry_point": "f()"}, "no name of a function"),
        ({"tests": [{"input": [1], "output": json.loads("[" * 40 + "]" * 40)}]}, "nested more than 32 deep"),
    ],
)
def test_rows_that_no_program_could_pass_are_refused(reward, row, message):
    with pytest.raises(ValueError, match=message):
        check_row([RewardSettings(kind="code")], row)
    answer = score(reward, "def f(x): return 1", row)
    assert isinstance(answer, RewardError)


def test_tests_may_come_as_json_text():
    assert cases_of({"tests": json.dumps(TESTS)}, "tests") == cases_of({"tests": TESTS}, "tests")


def test_settings_of_programs():
    code = RewardSettings(kind="code")
    assert required_columns([code]) == {"tests", "entry_point"}
    assert required_columns([RewardSettings(kind="code", entry_point="f", tests_column="t")]) == {"t"}
    assert uses_child(code)
    gold = RewardSettings(kind="task")
    assert uses_child(gold, TaskSettings(kind="programs"))
    assert not uses_child(gold, TaskSettings(kind="reversal"))
    with pytest.raises(ValueError, match=r"reward.entry_point = 'f\(\)' of 'code' is no name of a function"):
        check_rewards([RewardSettings(kind="code", entry_point="f()")], None)
    with pytest.raises(
        ValueError, match=r"reward.memory_mib = 512 of 'exact' has no effect with kind = 'exact'"
    ):
        check_rewards([RewardSettings(kind="exact", memory_mib=512)], None)


def test_the_task_of_programs_is_graded_by_its_tests(reward):
    task = TaskSettings(kind="programs")
    made = build_reward([RewardSettings(kind="task", name="gold")], task, timeout_s=3, memory_gib=1)
    (answer,) = made.score([RewardRequest("", "def f(x):return x*3+1", {"tests": TESTS}, True)])
    made.close()
    assert answer == Score(
        1.0,
        {
            "gold": 1.0,
            **{
                f"gold/{name}": float(name in ("all_passed", "ran"))
                for name in ("all_passed", "ran", "stopped")
            },
            "gold/wrote_own_answers": 0.0,
        },
    )
