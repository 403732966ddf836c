"""Which system calls code in a sandbox may not make: a filter for `bwrap --seccomp`, in classic BPF.

Refused are those with which a process reaches into another or into keys, holds memory that is seen nowhere, or that
code has no use for and kernels have had holes in. For x86_64 and aarch64; on other machines there is no filter, and
what it refuses is left to the rest: namespaces, no capabilities, limits.
"""

import errno
import os
import platform
import socket
import struct

_X86_64 = {
    "ptrace": 101, "process_vm_readv": 310, "process_vm_writev": 311, "shmget": 29, "semget": 64, "msgget": 68,
    "memfd_create": 319, "memfd_secret": 447, "keyctl": 250, "add_key": 248, "request_key": 249,
    "io_uring_setup": 425, "io_uring_enter": 426, "io_uring_register": 427, "userfaultfd": 323, "bpf": 321,
    "perf_event_open": 298, "mount": 165, "umount2": 166, "pivot_root": 155, "unshare": 272, "setns": 308,
    "open_by_handle_at": 304, "kexec_load": 246,
}  # fmt: skip
_AARCH64 = {
    "ptrace": 117, "process_vm_readv": 270, "process_vm_writev": 271, "shmget": 194, "semget": 190, "msgget": 186,
    "memfd_create": 279, "memfd_secret": 447, "keyctl": 219, "add_key": 217, "request_key": 218,
    "io_uring_setup": 425, "io_uring_enter": 426, "io_uring_register": 427, "userfaultfd": 282, "bpf": 280,
    "perf_event_open": 241, "mount": 40, "umount2": 39, "pivot_root": 41, "unshare": 97, "setns": 268,
    "open_by_handle_at": 265, "kexec_load": 104,
}  # fmt: skip
_MACHINES = {"x86_64": (0xC000003E, _X86_64, (41, 53)), "aarch64": (0xC00000B7, _AARCH64, (198, 199))}
"""The architecture as the kernel numbers it, the calls refused, and socket and socketpair."""
_FAMILIES = (socket.AF_UNIX, socket.AF_INET, socket.AF_INET6, socket.AF_NETLINK)
_X32 = 0x40000000
"""From here on a number is a call of the x32 ABI, which does the same under another number."""

_LOAD, _IF_EQUAL, _IF_AT_LEAST, _RETURN = 0x20, 0x15, 0x35, 0x06
_NUMBER, _ARCHITECTURE, _FIRST_ARGUMENT = 0, 4, 16  # places in struct seccomp_data; the argument's lower half
_ALLOW, _ERROR = 0x7FFF0000, 0x00050000


def program(machine: str) -> bytes | None:
    """The filter; None: there is none for this machine."""
    if machine not in _MACHINES:
        return None
    architecture, refused, sockets = _MACHINES[machine]
    no = _step(_RETURN, _ERROR | errno.EPERM)
    steps = [_step(_LOAD, _ARCHITECTURE), _step(_IF_EQUAL, architecture, 1, 0), no]
    steps += [_step(_LOAD, _NUMBER), _step(_IF_AT_LEAST, _X32, 0, 1), no]
    for number in refused.values():
        steps += [_step(_IF_EQUAL, number, 0, 1), no]
    families = [_step(_LOAD, _FIRST_ARGUMENT)]
    for family in _FAMILIES:
        families += [_step(_IF_EQUAL, family, 0, 1), _step(_RETURN, _ALLOW)]
    families += [_step(_RETURN, _ERROR | errno.EAFNOSUPPORT)]
    for number in sockets:
        steps += [_step(_IF_EQUAL, number, 0, len(families)), *families]
    return b"".join([*steps, _step(_RETURN, _ALLOW)])


def as_pipe() -> int | None:
    """A descriptor to read the filter from, once, to be closed by the caller; None: no filter here."""
    text = program(platform.machine())
    if text is None:
        return None
    end, other = os.pipe()
    os.write(other, text)  # fits into a pipe
    os.close(other)
    return end


def _step(what: int, value: int, if_so: int = 0, if_not: int = 0) -> bytes:
    """One instruction; a condition skips so many of those that follow."""
    return struct.pack("=HBBI", what, if_so, if_not, value)
