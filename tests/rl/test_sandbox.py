"""Attacks on the sandbox: each does what it is meant to where its limit is taken away, and nothing where it is not."""

import asyncio
import json
import os
import pwd
import re
import signal
import socket
import subprocess
import sys
import threading
import time
import uuid
from pathlib import Path

import pytest

import rl.sandbox
from rl import sandbox_seccomp, sandbox_watch
from rl.config_env import SandboxConfig
from rl.env import InfraError
from rl.sandbox import NoSandbox, Sandbox

SAFE = SandboxConfig()
LOCAL = SandboxConfig(backend="unsafe_local")
HERE = Path(__file__).resolve()


def processes(mark: str) -> list[int]:
    """Processes of this machine that have the mark on their command line."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            if mark.encode() in (folder / "cmdline").read_bytes() and int(folder.name) != os.getpid():
                found.append(int(folder.name))
        except OSError:
            pass
    return found


def descriptors() -> int:
    return len(os.listdir("/proc/self/fd"))


async def run(code: str, config: SandboxConfig = SAFE):
    """The code's result. Nothing of it is left behind: no process, no descriptor, no file."""
    mark = uuid.uuid4().hex
    before, files = descriptors(), set(os.listdir("/tmp"))
    result = await Sandbox(config).run(f"mark = '{mark}'\n{code}")
    assert descriptors() == before
    if config.backend == "bubblewrap":
        # Code is handed over by pipe, so only what it starts itself can carry the mark.
        deadline = time.monotonic() + 5
        while (left := processes(mark)) and time.monotonic() < deadline:
            await asyncio.sleep(0.02)
        assert not left
    assert {name for name in set(os.listdir("/tmp")) - files if name.startswith("repertory-")} == set()
    return result


BOMBS = {
    "fork bomb": (
        "import os, time\nfor i in range(40):\n    if os.fork() == 0:\n        time.sleep(60)\n        os._exit(0)\n"
        "print('reached')",
        "processes", {"processes": 16}, {"processes": 200},
    ),
    "thread bomb": (
        "import os, threading, time\n"
        "for i in range(40): threading.Thread(target=time.sleep, args=(60,), daemon=True).start()\n"
        "print('reached', flush=True)\nos._exit(0)",
        "processes", {"processes": 16, "memory_mib": 4096}, {"processes": 200, "memory_mib": 4096},
    ),
    "memory bomb": (
        "a = bytearray(300 * 2**20)\nprint('reached')", "memory", {"memory_mib": 128}, {"memory_mib": 1024},
    ),
    "memory bomb in many processes": (
        "import os, time\nchildren = []\nfor i in range(8):\n    if (child := os.fork()) == 0:\n"
        "        a = bytearray(60 * 2**20)\n        time.sleep(1.5)\n        os._exit(0)\n    children.append(child)\n"
        "for child in children: os.waitpid(child, 0)\nprint('reached')",
        "memory", {"memory_mib": 256}, {"memory_mib": 1024},
    ),
    "memory bomb of what detaches itself": (
        "import os, time\nif os.fork() == 0:\n    os.setsid()\n    for i in range(8):\n        if os.fork() == 0:\n"
        "            a = bytearray(60 * 2**20)\n            time.sleep(1.5)\n            os._exit(0)\n    os._exit(0)\n"
        "time.sleep(1.5)\nprint('reached')",
        "memory", {"memory_mib": 256}, {"memory_mib": 1024},
    ),
    "memory bomb under a name that is no text": (
        "import os, time\nopen('/proc/self/comm', 'wb').write(b'\\xff\\xfe')\nfor i in range(6):\n"
        "    if os.fork() == 0:\n        a = bytearray(70 * 2**20)\n        time.sleep(1.5)\n        os._exit(0)\n"
        "time.sleep(1.5)\nprint('reached')",
        "memory", {"memory_mib": 256}, {"memory_mib": 1024},
    ),
    "memory bomb of threads whose process's first has ended": (
        "import ctypes, os, threading, time\nexit = 60 if os.uname().machine == 'x86_64' else 93\n"
        "def hold():\n    time.sleep(0.2)\n    a = bytearray(70 * 2**20)\n    time.sleep(1.5)\n    os._exit(0)\n"
        "for i in range(6):\n    if os.fork() == 0:\n        threading.Thread(target=hold).start()\n"
        "        ctypes.CDLL(None).syscall(exit, 0)\n"
        "time.sleep(1.5)\nprint('reached')",
        "memory", {"memory_mib": 256}, {"memory_mib": 1024},
    ),
    "memory bomb that nobody has mapped": (
        "import mmap, os, time\nfor i in range(4):\n    if os.fork() == 0:\n        a = mmap.mmap(-1, 120 * 2**20)\n"
        "        for o in range(0, 120 * 2**20, 2**20):\n            a[o : o + 2**20] = b'x' * 2**20\n"
        "            a.madvise(mmap.MADV_DONTNEED)\n"
        "        time.sleep(1.5)\n        os._exit(0)\ntime.sleep(2)\nprint('reached')",
        "memory", {"memory_mib": 256}, {"memory_mib": 1024},
    ),
    "empty files": (
        "import os, time\nfor i in range(50_000):\n    os.mknod(f'/tmp/{i}')\n    os.mknod(f'/dev/shm/{i}')\n"
        "time.sleep(0.3)\nprint('reached')",
        "memory", {"memory_mib": 64}, {"memory_mib": 256},
    ),
    "infinite loop": (
        "import time\nend = time.process_time() + 1.5\nwhile time.process_time() < end: pass\nprint('reached')",
        "cpu", {"cpu_s": 1}, {"cpu_s": 10},
    ),
    "a loop that catches what it can": (
        "import signal, time\nfor s in (signal.SIGTERM, signal.SIGINT, signal.SIGXCPU):\n"
        "    signal.signal(s, signal.SIG_IGN)\n"
        "end = time.monotonic() + 2\n"
        "while time.monotonic() < end:\n    try: time.sleep(0.1)\n    except BaseException: pass\nprint('reached')",
        "wall", {"wall_s": 0.7}, {"wall_s": 20},
    ),
    "output flood": (
        "import sys\nfor i in range(3000): print('x' * 1000)\nprint('reached')", "output",
        {"output_kib": 64}, {"output_kib": 4096},
    ),
    "flood of errors": (
        "import sys\nfor i in range(3000): print('x' * 1000, file=sys.stderr)\nprint('reached')", "output",
        {"output_kib": 64}, {"output_kib": 4096},
    ),
    "one large file": (
        "with open('/tmp/a', 'wb') as f:\n    for i in range(24): f.write(bytes(2**20))\nprint('reached')", "file_size",
        {"file_mib": 16}, {"file_mib": 64},
    ),
    "disk full of files": (
        "for i in range(24):\n    with open(f'/tmp/{i}', 'wb') as f: f.write(bytes(2**20))\nprint('reached')",
        "file_size", {"file_mib": 16}, {"file_mib": 64},
    ),
    "shared memory full": (
        "for i in range(24):\n    with open(f'/dev/shm/{i}', 'wb') as f: f.write(bytes(2**20))\nprint('reached')",
        "file_size", {"file_mib": 16}, {"file_mib": 64},
    ),
    "descriptors": (
        "files = [open('/dev/null') for i in range(100)]\nprint('reached')", "open_files",
        {"open_files": 64}, {"open_files": 256},
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", BOMBS)
async def test_a_limit_holds_and_is_named(name):
    code, limit, tight, wide = BOMBS[name]
    result = await run(code, SandboxConfig(**tight))
    assert "reached" not in result.output
    assert (result.limit, result.ok) == (limit, False), result
    result = await run(code, SandboxConfig(**wide))
    assert result.output.rstrip().endswith("reached"), (result.output[-80:], result.error)
    assert (result.exit, result.limit) == (0, None)


async def test_memory_that_processes_share_counts_once():
    code = (
        "import os, time\na = bytearray(b'x') * (120 * 2**20)\nchildren = []\nfor i in range(4):\n"
        "    if (child := os.fork()) == 0:\n        time.sleep(0.6)\n        os._exit(0)\n    children.append(child)\n"
        "for child in children: os.waitpid(child, 0)\nprint('reached')"
    )
    result = await run(code, SandboxConfig(memory_mib=256))
    assert (result.output, result.limit) == ("reached\n", None), result


async def test_a_sandbox_that_cannot_be_watched_is_ended(monkeypatch, caplog):
    def fail(*given):
        raise UnicodeError("no text")

    monkeypatch.setattr(rl.sandbox, "usage_of", fail)
    started = time.monotonic()
    result = await run("import time\ntime.sleep(5)\nprint('reached')")
    assert (result.output, result.exit) == ("", None) and time.monotonic() - started < 3
    assert "could not be seen" in caplog.text


def test_children_are_found_where_the_kernel_does_not_list_them(monkeypatch):
    child = subprocess.Popen(["sleep", "60"])
    try:
        found = sandbox_watch.children(os.getpid())
        monkeypatch.setattr(sandbox_watch.os.path, "exists", lambda path: False)
        assert child.pid in found and sorted(sandbox_watch.children(os.getpid())) == sorted(found)
    finally:
        child.kill()
        child.wait()


async def test_memory_that_grows_between_calls_ends_the_session():
    """A thread of the Python that runs the calls goes on after them."""
    code = (
        "import os, threading, time\ndef grow():\n    time.sleep(0.3)\n    for i in range(8):\n"
        "        if os.fork() == 0:\n            a = bytearray(60 * 2**20)\n            time.sleep(60)\n"
        "            os._exit(0)\nthreading.Thread(target=grow, daemon=True).start()\nprint('started')"
    )
    async with Sandbox(SandboxConfig(memory_mib=256)).session() as session:
        assert (await session.run(code)).output == "started\n"
        await asyncio.sleep(2.5)
        asked = time.monotonic()
        result = await session.run("print('reached')")
        assert time.monotonic() - asked < 5, "not only when its wall time is over"
        assert (result.output, result.exit, result.limit) == ("", None, "memory")
        assert (await session.run("print(1)")).output == "1\n"


async def test_a_session_whose_process_ended_between_calls_says_so_at_once():
    code = "import os, threading\nthreading.Timer(0.3, os._exit, (3,)).start()"
    async with Sandbox(SandboxConfig()).session() as session:
        assert (await session.run(code)).ok
        await asyncio.sleep(1.0)
        asked = time.monotonic()
        result = await session.run("print('reached')")
        assert (result.output, result.exit, result.limit) == ("", 3, None) and time.monotonic() - asked < 5
        assert (await session.run("print(1)")).output == "1\n"


async def test_code_that_kills_itself_has_met_no_limit():
    result = await run("import os, signal\nos.kill(os.getpid(), signal.SIGKILL)")
    assert (result.exit, result.limit) == (None, None)


async def test_a_machine_with_many_cores_does_not_make_a_kill_one_for_cpu_time(monkeypatch):
    monkeypatch.setattr(os, "cpu_count", lambda: 96)
    result = await run("import os, signal\nos.kill(os.getpid(), signal.SIGKILL)")
    assert (result.exit, result.limit) == (None, None)


class Listener:
    """A server of ours that writes down who reached it."""

    def __init__(self, family: int, kind: int, address):
        self.socket = socket.socket(family, kind)
        self.socket.bind(address)
        if kind == socket.SOCK_STREAM:
            self.socket.listen()
        self.socket.settimeout(0.3)

    @property
    def reached(self) -> bool:
        try:
            if self.socket.type == socket.SOCK_STREAM:
                self.socket.accept()[0].close()
            else:
                self.socket.recv(10)
        except TimeoutError:
            return False
        return True


SOCKETS = {
    "TCP": (socket.AF_INET, socket.SOCK_STREAM, "socket.AF_INET, socket.SOCK_STREAM"),
    "UDP": (socket.AF_INET, socket.SOCK_DGRAM, "socket.AF_INET, socket.SOCK_DGRAM"),
    "a Unix socket's file": (socket.AF_UNIX, socket.SOCK_STREAM, "socket.AF_UNIX, socket.SOCK_STREAM"),
    "an abstract Unix socket": (socket.AF_UNIX, socket.SOCK_STREAM, "socket.AF_UNIX, socket.SOCK_STREAM"),
}


@pytest.mark.parametrize("name", SOCKETS)
async def test_no_socket_of_ours_is_reached(name, tmp_path):
    """Ray's, vLLM's and the server's ports are such sockets."""
    family, kind, text = SOCKETS[name]
    address = {"a Unix socket's file": str(tmp_path / "s"), "an abstract Unix socket": f"\0{uuid.uuid4().hex}"}
    server = Listener(family, kind, address.get(name, ("127.0.0.1", 0)))
    os.chmod(tmp_path, 0o755)
    code = f"import socket\ns = socket.socket({text})\ns.connect({server.socket.getsockname()!r})\ns.send(b'hello')"
    result = await run(code)
    assert not result.ok or name == "UDP"
    assert not server.reached
    assert (await run(code, LOCAL)).ok and server.reached


SECRETS = {
    "/etc/passwd": lambda: pwd.getpwuid(0).pw_dir + ":",
    "/etc/shadow": lambda: "root:",
    str(HERE): lambda: "Attacks on the sandbox",
    str(HERE.parent.parent.parent / "pyproject.toml"): lambda: "[project]",
}


@pytest.mark.parametrize("path", SECRETS)
@pytest.mark.parametrize("way", ["directly", "by a link", "by a descriptor of a folder"])
async def test_no_file_of_ours_is_read(path, way):
    if not os.access(path, os.R_OK):
        pytest.skip(f"this user may not read {path} either")
    code = {
        "directly": f"print(open({path!r}).read())",
        "by a link": f"import os\nos.symlink({path!r}, 'link')\nprint(open('link').read())",
        "by a descriptor of a folder": f"import os\nd = os.open({os.path.dirname(path)!r}, os.O_RDONLY)\n"
        f"print(os.fdopen(os.open({os.path.basename(path)!r}, os.O_RDONLY, dir_fd=d)).read())",
    }[way]
    secret = SECRETS[path]()
    result = await run(code)
    assert not result.ok and secret not in result.output
    assert secret in (await run(code, LOCAL)).output


async def test_no_home_no_environment_and_no_other_process_is_seen(monkeypatch):
    monkeypatch.setenv("WANDB_API_KEY", secret := uuid.uuid4().hex)
    holder = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
    time.sleep(0.3)
    try:
        code = (
            "import glob, os\nfound = []\n"
            "for p in glob.glob('/proc/[0-9]*/environ'):\n"
            f"    try: found += [p] * (b'{secret}' in open(p, 'rb').read())\n    except OSError: pass\n"
            "print(dict(os.environ))\nprint(found)\n"
            f"print([os.path.exists(p) for p in ({str(Path.home())!r}, '/proc/{holder.pid}')])\n"
            "print(len(glob.glob('/proc/[0-9]*')))"
        )
        inside, outside = (result.output.splitlines() for result in [await run(code), await run(code, LOCAL)])
    finally:
        holder.kill()
        holder.wait()
    assert eval(inside[0]) == {"HOME": "/tmp", "LC_CTYPE": "C.UTF-8", "PATH": "/usr/bin", "PWD": "/tmp"}
    assert inside[1:3] == ["[]", "[False, False]"]
    assert int(inside[3]) <= 3, "its own processes and bubblewrap's"
    assert f"/proc/{holder.pid}/environ" in outside[1] and outside[2] == "[True, True]"


async def test_no_process_of_ours_is_killed():
    victim = subprocess.Popen(["sleep", "60"])
    code = (
        "import os, signal\n"
        f"for pid in (os.getppid(), 1, {victim.pid}, {os.getpid()}):\n"
        "    if pid in (%s): continue\n"
        "    try: os.kill(pid, signal.SIGTERM if pid == 1 else signal.SIGKILL)\n    except OSError as e: print(e)"
    )
    result = await run(code % f"{os.getpid() + 10**7},")
    assert victim.poll() is None and result.exit in (0, None)
    await run(code % f"os.getppid(), 1, {os.getpid()}", LOCAL)
    assert victim.wait(timeout=5) == -signal.SIGKILL


async def test_what_detaches_itself_does_not_outlive_the_call():
    mark = uuid.uuid4().hex
    code = (
        "import os, subprocess, sys, time\n"
        "if os.fork() == 0:\n    os.setsid()\n"
        "    if os.fork() == 0:\n"
        f"        os.execv('/usr/bin/python3', ['python3', '-c', 'import time; time.sleep(60)', '{mark}'])\n"
        "    os._exit(0)\n"
        "time.sleep(0.3)\nprint('reached')"
    )
    assert (await run(code)).output == "reached\n"
    time.sleep(0.3)
    assert processes(mark) == []
    await run(code, LOCAL)
    left = processes(mark)
    assert len(left) == 1, "without bubblewrap it lives on"
    os.kill(left[0], signal.SIGKILL)


OF_INIT = """
import ctypes, os
c = ctypes.CDLL(None)
c.ptrace.restype, c.ptrace.argtypes = ctypes.c_long, [ctypes.c_long] * 2 + [ctypes.c_void_p] * 2
if os.fork() == 0:
    os.execv('/usr/bin/python3', ['python3', '-c', 'import time; time.sleep(20)', 'MARK'])
now = (ctypes.c_ulonglong * 27)()
print(c.ptrace(16, 1, None, None))
os.waitpid(1, 0x40000000)
c.ptrace(12, 1, None, now)
then = (ctypes.c_ulonglong * 27)(*now)
now[16] -= 2  # the call again, but as prctl(PR_SET_PDEATHSIG, 0)
now[10], now[14], now[13], now[15] = 157, 1, 0, 2**64 - 1
c.ptrace(13, 1, None, now)
c.ptrace(9, 1, None, None)
os.waitpid(1, 0x40000000)
then[16] -= 2
then[10], then[15] = then[15], 2**64 - 1
c.ptrace(13, 1, None, then)
c.ptrace(17, 1, None, None)
print('reached', flush=True)
os._exit(0)
"""


@pytest.mark.skipif(os.uname().machine != "x86_64", reason="the attack is written for x86_64's registers")
async def test_nothing_outlives_the_sandbox_even_where_init_no_longer_dies_with_bubblewrap(monkeypatch):
    mark = uuid.uuid4().hex
    monkeypatch.setattr(sandbox_seccomp, "as_pipe", lambda: None)  # which alone refuses the attack
    started = time.monotonic()
    result = await Sandbox(SAFE).run(OF_INIT.replace("MARK", mark))
    assert result.output == "0\nreached\n" and time.monotonic() - started < 5, "not only when it ends of itself"
    assert processes(mark) == []


async def test_what_a_call_leaves_behind_ends_with_it():
    """Even one that is another process each moment. What the session remembers stays."""
    code = (
        "import os, time\nif os.fork() == 0:\n    os.setsid()\n    while True:\n"
        "        if os.fork(): os._exit(0)\n        open('/tmp/beat', 'a').write('x')\n        time.sleep(0.002)\n"
        "time.sleep(0.3)\nx = 1"
    )
    look = "before = os.path.getsize('/tmp/beat')\ntime.sleep(0.3)\nprint(x, os.path.getsize('/tmp/beat') - before)"
    async with Sandbox(SAFE).session() as session:
        assert (await session.run(code)).ok
        assert (await session.run(look)).output == "1 0\n"


async def test_what_comes_back_however_often_it_is_ended_ends_the_session(monkeypatch):
    monkeypatch.setattr(rl.sandbox.Namespace, "end_others", lambda self: True)
    async with Sandbox(SAFE).session() as session:
        result = await session.run("print(1)")
        assert (result.output, result.exit, result.limit) == ("1\n", None, "processes") and not session.alive


CALLS = {
    "a user namespace": ("c.unshare(0x10000000)", True),
    "mount": ("c.mount(b'none', b'/tmp', b'tmpfs', 0, None) if c.unshare(0x00020000) == 0 else -1", False),
    "setuid": ("c.setuid(0)", False),
    "raw sockets": ("-(c.socket(2, 3, 1) < 0)", False),
    "ptrace": ("c.ptrace(16, {pid}, 0, 0)", False),
}


@pytest.mark.parametrize("name", CALLS)
async def test_no_way_to_more_rights(name):
    """By the C library, past what Python would check. `unsafe_local` shows that the call is the right one."""
    call, anyone = CALLS[name]
    traced = subprocess.Popen(["sleep", "60"])
    try:
        returned = call.format(pid=traced.pid)
        code = f"import ctypes\nc = ctypes.CDLL(None)\nprint('reached' if ({returned}) == 0 else 'refused')"
        assert (await run(code)).output == "refused\n"
        if anyone or os.geteuid() == 0:
            assert (await run(code, LOCAL)).output == "reached\n"
    finally:
        traced.kill()
        traced.wait()


ANYONES = {
    "process_vm_readv", "process_vm_writev", "shmget", "semget", "msgget", "memfd_create", "keyctl", "add_key",
    "request_key", "ptrace", "unshare", "setns",
}  # fmt: skip
"""Calls of which the kernel does not say EPERM of itself, given arguments that are none."""


@pytest.mark.skipif(os.uname().machine != "x86_64", reason="numbers of x86_64")
async def test_calls_that_reach_out_or_hide_memory_are_refused():
    """EPERM, of arguments with which nothing comes of them. `unsafe_local` shows whose EPERM it is."""
    numbers = sandbox_seccomp._X86_64
    code = (
        "import ctypes\nc = ctypes.CDLL(None, use_errno=True)\ndef call(name, number):\n"
        "    given = (1, 0) if name == 'msgget' else (ctypes.c_long(-1),) * 5\n"
        "    return ctypes.get_errno() if c.syscall(number, *given) < 0 else 0\n"
        f"print([name for name, number in {numbers}.items() if call(name, number) != 1])\n"
        "c.syscall(0x40000000 + 39)\nprint(ctypes.get_errno())"
    )
    assert (await run(code)).output == "[]\n1\n"
    allowed, of_x32 = (await run(code, LOCAL)).output.splitlines()
    assert set(eval(allowed)) >= ANYONES and of_x32 != "1"


HEADERS = {"x86_64": "/usr/include/x86_64-linux-gnu/asm/unistd_64.h", "aarch64": "/usr/include/asm-generic/unistd.h"}


@pytest.mark.parametrize("machine", HEADERS)
def test_the_numbers_of_calls_are_the_systems(machine):
    if not Path(HEADERS[machine]).exists():
        pytest.skip("no headers of the kernel here")
    _, refused, sockets = sandbox_seccomp._MACHINES[machine]
    text = Path(HEADERS[machine]).read_text()
    known = dict(re.findall(r"#define __NR(?:3264)?_(\w+) (\d+)", text))
    wanted = refused | dict(zip(("socket", "socketpair"), sockets, strict=True))
    assert {name: int(known.get(name, number)) for name, number in wanted.items()} == wanted
    assert len(known.keys() & wanted.keys()) >= len(wanted) - 1  # older headers lack memfd_secret


async def test_sockets_that_no_namespace_holds_back_are_refused():
    code = (
        "import errno, socket\nfor family in (1, 2, 10, 16, 17, 38, 40):\n"
        "    try: socket.socket(family, {16: 3, 17: 3, 38: 5}.get(family, 1)).close(); print(family, 'OK')\n"
        "    except OSError as error: print(family, errno.errorcode.get(error.errno))"
    )
    said = dict(line.split() for line in (await run(code)).output.splitlines())
    assert {family for family, what in said.items() if what == "OK"} == {"1", "2", "10", "16"}
    assert {said["17"], said["38"], said["40"]} == {"EAFNOSUPPORT"}
    outside = dict(line.split() for line in (await run(code, LOCAL)).output.splitlines())
    assert outside["17"] != "EAFNOSUPPORT"


async def test_programs_that_give_rights_give_none():
    """setuid programs are there to be seen, and cannot raise anyone."""
    code = "print([l for l in open('/proc/self/status') if l.startswith(('NoNewPrivs', 'CapEff', 'CapPrm', 'CapBnd'))])"
    shown = (await run(code)).output
    assert "NoNewPrivs:\\t1" in shown and shown.count("0000000000000000") == 3
    assert "NoNewPrivs:\\t1" not in (await run(code, LOCAL)).output


@pytest.mark.parametrize("folder", ["/", "/usr", "/dev", "/proc", "/usr/bin"])
async def test_the_system_cannot_be_written_to(folder):
    result = await run(f"open('{folder}/planted', 'w')")
    assert not result.ok and not Path(folder, "planted").exists()


async def test_what_one_call_writes_another_does_not_see():
    assert (await run("open('/tmp/planted', 'w').write('x')")).ok
    assert (await run("import os\nprint(os.listdir('/tmp'))")).output == "[]\n"
    assert not Path("/tmp/planted").exists()


# -- what a result says -----------------------------------------------------------------------------------------------


async def test_bytes_that_are_no_text_come_back_as_text():
    result = await run("import os\nos.write(1, b'a\\xff\\x00\\x1b[2Jz\\r\\n\\tb')")
    assert result.output == "a�\\x00\\x1b[2Jz\n\tb"


async def test_an_error_shows_the_codes_own_lines_and_no_others():
    result = await run("def f():\n    return 1 / 0\nf()")
    assert result.exit == 1 and result.limit is None
    assert result.error.splitlines()[-1] == "ZeroDivisionError: division by zero"
    assert "return 1 / 0" in result.error and "sandbox" not in result.error
    assert (await run("x = (")).error.splitlines()[-1].startswith("SyntaxError")


EXITS = {
    "exit(3)": 3,
    "raise SystemExit": 0,
    "raise SystemExit('no')": 1,
    "import os; os._exit(7)": 7,
    "import os; os._exit(200)": 200,
    "exit(10**10 + 7)": 7,
    "import os; os.abort()": None,
}


@pytest.mark.parametrize("code", EXITS)
async def test_exit_statuses(code):
    result = await run(code)
    assert (result.exit, result.limit) == (EXITS[code], None)


async def test_the_value_of_a_last_expression_is_shown_where_it_is_asked_for():
    sandbox = Sandbox(SandboxConfig())
    assert (await sandbox.run("x = 6\nx * 7", echo=True)).output == "42\n"
    assert (await sandbox.run("x = 6\nx * 7")).output == ""
    assert (await sandbox.run("None", echo=True)).output == ""


async def test_faked_answers_neither_break_a_session_nor_leak_into_the_next_call():
    """Code can say anything of itself: an answer that is none is a killed call, and one too many is not the next's."""
    fakes = [b"0 -\n" * 3, b"0 -", b"garbage\n", b"0 all\n", b"99999999999 -\n", b"\xff" * 10, b"\n"]
    find = "import os\nfor d in range(3, 20):\n    try: os.write(d, FAKE)\n    except OSError: pass\n"
    async with Sandbox(SandboxConfig(wall_s=2)).session() as session:
        for fake in fakes:
            await session.run(f"FAKE = {fake!r}\n{find}raise SystemExit(5)")
            await asyncio.sleep(0.05)
            for value in (1, 2):
                result = await session.run(f"print({value})")
                assert result.output in (f"{value}\n", "") and isinstance(result.exit, int | None)
        await session.close()
        assert (await session.run("print(3)")).output == "3\n"


# -- sessions ---------------------------------------------------------------------------------------------------------


async def test_a_session_remembers_until_a_limit_ends_it():
    before = descriptors()
    async with Sandbox(SandboxConfig(wall_s=1)).session() as session:
        assert (await session.run("x = 1\nopen('a', 'w').write('file')")).ok
        assert (await session.run("x += 1\nprint(x, open('a').read())")).output == "2 file\n"
        assert (await session.run("1 / 0")).exit == 1
        assert (await session.run("print(x)")).output == "2\n", "an error ends nothing"
        assert (await session.run("import time\ntime.sleep(9)")).limit == "wall"
        assert not session.alive
        assert "NameError" in (await session.run("print(x)")).error
    assert descriptors() == before


async def test_a_child_that_the_code_forks_does_not_answer_for_it():
    async with Sandbox(SandboxConfig()).session() as session:
        assert (await session.run("import os\nchild = os.fork()\nprint('x')")).exit == 0
        for i in range(5):
            assert (await session.run(f"print({i})")).output.splitlines()[-1] == str(i)


async def test_one_that_is_stuck_delays_no_other():
    sandbox = Sandbox(SandboxConfig(wall_s=3, parallel=4))
    stuck = asyncio.ensure_future(sandbox.run("import time\ntime.sleep(60)"))
    await asyncio.sleep(0.2)
    started = time.monotonic()
    assert all(r.ok for r in await asyncio.gather(*(sandbox.run("print(1)") for _ in range(6))))
    assert time.monotonic() - started < 2 and not stuck.done()
    assert (await stuck).limit == "wall"


async def test_a_call_that_is_cancelled_leaves_nothing():
    before, mark = descriptors(), uuid.uuid4().hex
    code = f"import subprocess, sys\nsubprocess.run([sys.executable, '-c', 'import time; time.sleep(60)', '{mark}'])"
    call = asyncio.ensure_future(Sandbox(SandboxConfig()).run(code))
    await asyncio.sleep(0.5)
    assert processes(mark)
    call.cancel()
    with pytest.raises(asyncio.CancelledError):
        await call
    await asyncio.sleep(0.1)
    assert descriptors() == before and not processes(mark)


async def test_calls_of_a_session_come_one_after_the_other():
    before = descriptors()
    async with Sandbox(SAFE).session() as session:
        codes = ("import time\ntime.sleep(0.3)\nx = 1\nprint(x)", "x += 1\nprint(x)", "x += 1\nprint(x)")
        results = await asyncio.gather(*map(session.run, codes))
    assert [result.output for result in results] == ["1\n", "2\n", "3\n"]
    assert descriptors() == before


@pytest.mark.parametrize("after_s", [0.0, 0.002, 0.005, 0.3])
async def test_a_session_that_is_closed_meanwhile_stays_closed(after_s):
    """While it starts, or runs a call, with another that waits."""
    before, session = descriptors(), Sandbox(SAFE).session()
    calls = [asyncio.ensure_future(session.run("import time\ntime.sleep(5)")) for _ in range(2)]
    await asyncio.sleep(after_s)
    started = time.monotonic()
    await session.close()
    results = await asyncio.gather(*calls, return_exceptions=True)
    assert [type(result) for result in results] == [InfraError] * 2 and time.monotonic() - started < 3
    assert not session.alive and descriptors() == before
    assert (await session.run("print(1)")).output == "1\n", "and can be used again"
    await session.close()
    assert descriptors() == before


async def test_a_close_that_is_cancelled_leaves_nothing():
    before = descriptors()
    for _ in range(5):
        session = Sandbox(SAFE).session()
        await session.run("1")
        closing = asyncio.ensure_future(session.close())
        await asyncio.sleep(0)
        closing.cancel()
        with pytest.raises(asyncio.CancelledError):
            await closing
    await asyncio.sleep(0.2)
    assert descriptors() == before


# -- where it cannot be made ------------------------------------------------------------------------------------------


def test_without_bubblewrap_it_is_refused_and_says_what_to_install(monkeypatch):
    monkeypatch.setattr(rl.sandbox.shutil, "which", lambda name: None if name == "bwrap" else f"/usr/bin/{name}")
    with pytest.raises(NoSandbox, match=r"bwrap, which is not here: .*apt-get install bubblewrap.*unsafe_local"):
        Sandbox(SandboxConfig())
    Sandbox(LOCAL)


@pytest.mark.parametrize("settings", [{"python": "/no/python"}, {"read_only": ["/no/folder"]}])
def test_settings_that_name_nothing_are_refused(settings):
    with pytest.raises(NoSandbox, match="/no/"):
        Sandbox(SandboxConfig(**settings))


async def test_a_machine_that_starts_no_process_is_no_result(monkeypatch):
    sandbox = Sandbox(SandboxConfig())
    monkeypatch.setattr(rl.sandbox, "command", lambda *given: ["/no/such/program"])
    before = descriptors()
    with pytest.raises(InfraError, match="no sandbox could be started"):
        await sandbox.run("print(1)")
    assert descriptors() == before


@pytest.mark.parametrize("backend", ["bubblewrap", "unsafe_local"])
async def test_one_that_does_not_come_to_be_ready_says_why(monkeypatch, backend):
    sandbox = Sandbox(SandboxConfig(backend=backend))
    monkeypatch.setattr(rl.sandbox, "command", lambda *given: ["/bin/sh", "-c", "echo no luck >&2"])
    before = descriptors()
    with pytest.raises(InfraError, match="no sandbox could be started: it says no luck"):
        await sandbox.run("print(1)")
    assert descriptors() == before


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can try as another user")
def test_as_another_user_too(tmp_path):
    """The limits that root needs help with, by a user who is not root."""
    sources = [*(HERE.parent.parent.parent / "rl").glob("sandbox*.py")]
    sources += [HERE.parent.parent.parent / "rl" / name for name in ("config_base.py", "config_env.py")]
    for source in sources:
        text = source.read_text().replace("from rl.env import InfraError", "class InfraError(Exception): pass")
        (tmp_path / source.name).write_text(text.replace("from rl.", "from ").replace("from rl import", "import"))
    (tmp_path / "main.py").write_text(
        "import asyncio, json\nfrom sandbox import *\n"
        "codes = ['import os\\nwhile True: os.fork()', 'print(1)', 'import os\\nprint(os.getuid())']\n"
        "async def main():\n    s = Sandbox(SandboxConfig(processes=8))\n"
        "    print(json.dumps([[r.limit, r.output] for r in [await s.run(c) for c in codes]]))\n"
        "asyncio.run(main())\n"
    )
    for path in (tmp_path, *tmp_path.parents[:2]):
        path.chmod(0o755)
    done = subprocess.run(
        ["setpriv", "--reuid", "1234", "--regid", "1234", "--clear-groups", sys.executable, str(tmp_path / "main.py")],
        capture_output=True, text=True,
    )  # fmt: skip
    if "Permission denied" in done.stderr:
        pytest.skip("another user cannot reach this Python")
    assert json.loads(done.stdout)[0][0] == "processes", done.stderr
    assert [output for _, output in json.loads(done.stdout)[1:]] == ["1\n", "1234\n"]


def test_threads_of_ours_may_make_sandboxes():
    """A sandbox dies with the thread that started it: an event loop in a thread keeps its own."""
    found = []
    thread = threading.Thread(target=lambda: found.append(asyncio.run(Sandbox(SandboxConfig()).run("print(1)"))))
    thread.start()
    thread.join()
    assert found[0].output == "1\n"
