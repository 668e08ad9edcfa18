"""The system calls that a program in the sandbox may make, as a seccomp filter (classic BPF) in bytes.

It is a list of what a Python interpreter needs to compute, to use files that it may see and to run threads.
Everything else, also what a newer kernel will add, answers "function not implemented": sockets, processes,
exec, mount, ptrace, keyctl, bpf, namespaces, io_uring. Two calls are looked into:

    clone   only for a thread of the same process, never with a new namespace
    ioctl   only what opening a file asks (is it a terminal, close on exec, bytes to read)
"""

import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

LOAD, JUMP_EQUAL, JUMP_BITS, RETURN = 0x20, 0x15, 0x45, 0x06
AT_NUMBER, AT_MACHINE, AT_ARGUMENTS = 0, 4, 16  # places in the kernel's struct seccomp_data
ALLOW, KILL, ERRNO = 0x7FFF0000, 0x80000000, 0x00050000
ENOSYS = 38  # with it the C library tries an older call, where EPERM would make it give up
CLONE_THREAD = 0x00010000
CLONE_NEW = 0x7E020000  # mount, cgroup, uts, ipc, user, pid, network
IOCTLS = (0x5401, 0x5413, 0x541B, 0x5450, 0x5451)  # TCGETS TIOCGWINSZ FIONREAD FIONCLEX FIOCLEX

_Instruction = tuple[int, int, int, int]  # code, jump if true, jump if false, constant


@dataclass(frozen=True, slots=True)
class Machine:
    """A processor's numbers: for the filter, and of the one call that the C library has no function for."""

    audit: int
    pivot_root: int
    clone: int
    ioctl: int
    allowed: Mapping[str, int]


_X86_64 = """
    read 0 write 1 open 2 close 3 stat 4 fstat 5 lstat 6 poll 7 lseek 8 mmap 9 mprotect 10 munmap 11 brk 12
    rt_sigaction 13 rt_sigprocmask 14 rt_sigreturn 15 pread64 17 pwrite64 18 readv 19 writev 20 access 21
    pipe 22 select 23 sched_yield 24 mremap 25 madvise 28 dup 32 dup2 33 nanosleep 35 getitimer 36 alarm 37
    setitimer 38 getpid 39 exit 60 kill 62 uname 63 fcntl 72 fsync 74 fdatasync 75 truncate 76 ftruncate 77
    getdents 78 getcwd 79 chdir 80 fchdir 81 rename 82 mkdir 83 rmdir 84 creat 85 unlink 87 readlink 89
    umask 95 gettimeofday 96 getrlimit 97 getrusage 98 times 100 getuid 102 getgid 104 geteuid 107
    getegid 108 getppid 110 getpgrp 111 sigaltstack 131 gettid 186 tkill 200 time 201 futex 202
    sched_getaffinity 204 getdents64 217 set_tid_address 218 restart_syscall 219 clock_gettime 228
    clock_getres 229 clock_nanosleep 230 exit_group 231 tgkill 234 openat 257 mkdirat 258 newfstatat 262
    unlinkat 263 renameat 264 readlinkat 267 faccessat 269 pselect6 270 ppoll 271 set_robust_list 273
    dup3 292 pipe2 293 prlimit64 302 renameat2 316 getrandom 318 statx 332 rseq 334 faccessat2 439
"""
_AARCH64 = """
    getcwd 17 dup 23 dup3 24 fcntl 25 mkdirat 34 unlinkat 35 renameat 38 truncate 45 ftruncate 46
    faccessat 48 chdir 49 fchdir 50 openat 56 close 57 pipe2 59 getdents64 61 lseek 62 read 63 write 64
    readv 65 writev 66 pread64 67 pwrite64 68 pselect6 72 ppoll 73 readlinkat 78 newfstatat 79 fstat 80
    fsync 82 fdatasync 83 exit 93 exit_group 94 set_tid_address 96 futex 98 set_robust_list 99
    nanosleep 101 getitimer 102 setitimer 103 clock_gettime 113 clock_getres 114 clock_nanosleep 115
    sched_getaffinity 123 sched_yield 124 restart_syscall 128 kill 129 tkill 130 tgkill 131
    sigaltstack 132 rt_sigaction 134 rt_sigprocmask 135 rt_sigreturn 139 times 153 uname 160
    getrlimit 163 getrusage 165 umask 166 gettimeofday 169 getpid 172 getppid 173 getuid 174 geteuid 175
    getgid 176 getegid 177 gettid 178 brk 214 munmap 215 mremap 216 mmap 222 mprotect 226 madvise 233
    prlimit64 261 renameat2 276 getrandom 278 statx 291 rseq 293 faccessat2 439
"""


def _numbers(table: str) -> dict[str, int]:
    words = table.split()
    return dict(zip(words[::2], map(int, words[1::2]), strict=True))


MACHINES = {
    "x86_64": Machine(0xC000003E, pivot_root=155, clone=56, ioctl=16, allowed=_numbers(_X86_64)),
    "aarch64": Machine(0xC00000B7, pivot_root=41, clone=220, ioctl=29, allowed=_numbers(_AARCH64)),
}


def filter_program(machine: Machine) -> bytes:
    """The filter for `machine`, as an array of the kernel's struct sock_filter.

    A call by another processor's convention kills the process: its numbers would mean other calls.
    """
    numbers = sorted(machine.allowed.values())
    head: list[_Instruction] = [
        (LOAD, 0, 0, AT_MACHINE),
        (JUMP_EQUAL, 1, 0, machine.audit),
        (RETURN, 0, 0, KILL),
        (LOAD, 0, 0, AT_NUMBER),
    ]
    looked_into = [
        # clone: a thread, and nothing new
        (JUMP_EQUAL, 0, 4, machine.clone),
        (LOAD, 0, 0, AT_ARGUMENTS),
        (JUMP_BITS, 0, 2, CLONE_THREAD),
        (JUMP_BITS, 1, 0, CLONE_NEW),
        (RETURN, 0, 0, ALLOW),
        # Not reached by an allowed clone; one refused comes here with its flags loaded, so load anew.
        (LOAD, 0, 0, AT_NUMBER),
        (JUMP_EQUAL, 0, len(IOCTLS) + 1, machine.ioctl),
        (LOAD, 0, 0, AT_ARGUMENTS + 8),
        *_any_of(IOCTLS, skip_after=1),
    ]
    tail = [(RETURN, 0, 0, ERRNO | ENOSYS), (RETURN, 0, 0, ALLOW)]
    common = _any_of(numbers, skip_after=len(looked_into) + 1)
    return b"".join(struct.pack("<HBBI", *one) for one in (*head, *common, *looked_into, *tail))


def _any_of(values: Sequence[int], *, skip_after: int) -> list[_Instruction]:
    """Compare what is loaded with each value; on a match jump over the rest and `skip_after` more."""
    last = len(values) - 1
    return [(JUMP_EQUAL, last - place + skip_after, 0, value) for place, value in enumerate(values)]
