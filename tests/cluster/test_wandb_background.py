"""The thread behind the copy in W&B: order, room, failures, and an end that does not wait for ever."""

import threading

from cluster.background import Background


def test_calls_are_done_in_order_and_the_last_one_last() -> None:
    done: list[int] = []
    background = Background("test", room=100)
    for number in range(50):
        background.do("count", lambda number=number: done.append(number))
    assert background.close("end", lambda: done.append(50), 10.0)
    assert done == list(range(51))
    assert (background.errors, background.take_first_error()) == (0, None)


def test_what_raises_is_counted_and_the_first_is_told_once() -> None:
    def fail() -> None:
        raise OSError("no route to host")

    background = Background("test", room=100)
    for what in ("log", "send"):
        background.do(what, fail)
    assert background.close("end", lambda: None, 10.0)
    assert background.errors == 2
    assert background.take_first_error() == "log: OSError: no route to host"
    assert background.take_first_error() is None


def test_what_finds_no_room_is_counted_and_not_done() -> None:
    release, begun = threading.Event(), threading.Event()
    done: list[int] = []

    def hang() -> None:
        begun.set()
        release.wait(30)

    background = Background("test", room=2)
    background.do("hang", hang)
    assert begun.wait(30)
    for number in range(5):
        background.do("log", lambda number=number: done.append(number))
    assert (background.waiting, background.errors) == (2, 3)  # of 5, 2 wait
    release.set()
    assert background.close("end", lambda: done.append(99), 30.0)
    assert done == [0, 1, 99]  # the end finds room always


def test_a_call_that_hangs_is_given_up_and_what_waited_is_counted() -> None:
    release = threading.Event()
    done: list[int] = []
    background = Background("test", room=10)
    background.do("hang", lambda: release.wait(30) and None)
    background.do("log", lambda: done.append(1))
    assert not background.close("end", lambda: done.append(2), 0.05)
    background.abandon()
    assert background.errors == 2  # the row and the end
    release.set()
    background._thread.join(30)
    assert done == []
    background.do("log", lambda: done.append(3))
    assert (background.errors, done) == (3, [])
