"""The filter of system calls, judged instruction by instruction as the kernel would."""

import struct

import pytest

from rewards.sandbox_filter import ALLOW, ERRNO, KILL, MACHINES, filter_program

X86, ARM = MACHINES["x86_64"], MACHINES["aarch64"]
REFUSED = ERRNO | 38  # function not implemented
THREAD = 0x003D0F00  # what the C library asks for a thread


def answer(machine, number, *arguments, audit=None):
    """What the filter says to a call: a small interpreter of the few instructions that it is made of."""
    data = struct.pack("<IIQ6Q", number, audit or machine.audit, 0, *(*arguments, *[0] * 6)[:6])
    program = list(struct.iter_unpack("<HBBI", filter_program(machine)))
    loaded = place = 0
    while True:
        code, yes, no, constant = program[place]
        place += 1
        if code == 0x20:  # load a word of the data
            (loaded,) = struct.unpack_from("<I", data, constant)
        elif code == 0x15:  # jump if equal
            place += yes if loaded == constant else no
        elif code == 0x45:  # jump if a bit is set
            place += yes if loaded & constant else no
        else:
            assert code == 0x06  # return
            return constant


@pytest.mark.parametrize("machine", [X86, ARM], ids=["x86_64", "aarch64"])
def test_what_is_listed_is_allowed_and_nothing_else(machine):
    looked_into = {machine.clone, machine.ioctl}
    for number in range(1100):
        if number not in looked_into:
            expected = ALLOW if number in machine.allowed.values() else REFUSED
            assert answer(machine, number) == expected, number


def test_the_dangerous_calls_are_not_in_the_lists():
    # fork vfork execve ptrace mount unshare keyctl bpf socket, by the kernel's tables
    assert {57, 58, 59, 101, 165, 272, 250, 321, 41}.isdisjoint(X86.allowed.values())
    # execve ptrace mount unshare keyctl bpf socket
    assert {221, 117, 40, 97, 219, 280, 198}.isdisjoint(ARM.allowed.values())
    assert X86.allowed.keys() >= {"read", "write", "mmap", "futex", "exit_group", "getrandom"}


@pytest.mark.parametrize("machine", [X86, ARM], ids=["x86_64", "aarch64"])
@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        (THREAD, ALLOW),
        (17, REFUSED),  # SIGCHLD alone: fork
        (0x4111, REFUSED),  # vfork
        (THREAD | 0x10000000, REFUSED),  # with a new user namespace
        (THREAD | 0x00020000, REFUSED),  # mounts
        (THREAD | 0x40000000, REFUSED),  # network
        (0, REFUSED),
    ],
)
def test_clone_makes_threads_only(machine, flags, expected):
    assert answer(machine, machine.clone, flags) == expected


@pytest.mark.parametrize("machine", [X86, ARM], ids=["x86_64", "aarch64"])
def test_ioctl_asks_only_about_files(machine):
    assert answer(machine, machine.ioctl, 0, 0x5401) == ALLOW  # TCGETS: is it a terminal?
    assert answer(machine, machine.ioctl, 0, 0x5412) == REFUSED  # TIOCSTI: type into a terminal
    assert answer(machine, machine.ioctl, 0, 0x8914) == REFUSED  # SIOCSIFFLAGS: switch a network on


def test_calls_by_another_convention_kill():
    assert answer(X86, 0, audit=0x40000003) == KILL  # 32 bits: 0 is another call there
    assert answer(X86, 0x40000000 | 39) == REFUSED  # x32
