"""The command that starts a sandbox, and whether it does so here."""

import os
import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path

from rl import sandbox_seccomp
from rl.config_env import SandboxConfig

_GUEST = (Path(__file__).parent / "sandbox_guest.py").read_text()
_NOBODY = "65534"
_INSTALL = (
    "install it (`apt-get install bubblewrap`), allow user namespaces, or, for code that you trust as you trust your "
    "own, say `unsafe_local` in the config"
)


class NoSandbox(RuntimeError):
    """Nothing here can shut code in."""


def command(config: SandboxConfig, inside: Sequence[int], calls: int | None) -> list[str]:
    """inside: the guest's descriptors; calls: one to read the filter of system calls from, if there is one."""
    megabyte = 2**20
    limits = {
        "RLIMIT_AS": config.memory_mib * megabyte,
        "RLIMIT_CPU": config.cpu_s,
        "RLIMIT_NPROC": config.processes,
        "RLIMIT_FSIZE": config.file_mib * megabyte,
        "RLIMIT_NOFILE": config.open_files,
        "RLIMIT_CORE": 0,
    }
    limit = ",".join(f"{name}={value}" for name, value in limits.items())
    guest = [config.python, "-I", "-S", "-X", "utf8", "-c", _GUEST, *map(str, inside), limit]
    if config.backend == "unsafe_local":
        return guest
    size = str(config.file_mib * megabyte)
    folders = [part for path in ("/usr", *config.read_only) for part in ("--ro-bind", path, path)]
    links = [
        part
        for name in ("bin", "sbin", "lib", "lib32", "lib64")
        if Path("/", name).is_symlink()
        for part in ("--symlink", f"usr/{name}", f"/{name}")
    ]
    return [
        *_as_nobody(),
        "bwrap", *([] if calls is None else ["--seccomp", str(calls)]),
        "--unshare-all", "--unshare-user", "--disable-userns", "--die-with-parent", "--new-session",
        "--cap-drop", "ALL", "--clearenv", "--setenv", "HOME", "/tmp", "--setenv", "PATH", "/usr/bin",
        "--hostname", "sandbox", *folders, *links,
        "--proc", "/proc", "--dev", "/dev", "--size", size, "--tmpfs", "/dev/shm", "--remount-ro", "/dev",
        "--size", size, "--tmpfs", "/tmp", "--remount-ro", "/", "--chdir", "/tmp", "--",
        *guest,
    ]  # fmt: skip


def _as_nobody() -> list[str]:
    """Limits on processes are not kept for root."""
    if os.geteuid() != 0:
        return []
    return ["setpriv", "--reuid", _NOBODY, "--regid", _NOBODY, "--clear-groups", "--no-new-privs"]


def require(config: SandboxConfig) -> None:
    """Raises NoSandbox unless a sandbox starts here."""
    programs = [] if config.backend == "unsafe_local" else ["bwrap", *_as_nobody()[:1]]
    for program in programs:
        if shutil.which(program) is None:
            raise NoSandbox(f"running a model's code needs {program}, which is not here: {_INSTALL}")
    if shutil.which(config.python) is None:
        raise NoSandbox(f"sandbox.python: there is no {config.python}")
    for folder in config.read_only:
        if not Path(folder).is_dir():
            raise NoSandbox(f"sandbox.read_only: there is no folder {folder}")
    calls = sandbox_seccomp.as_pipe()
    try:
        tried = subprocess.run(
            command(config, (0, 1), calls),
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            env={},
            pass_fds=() if calls is None else (calls,),
        )
    finally:
        if calls is not None:
            os.close(calls)
    if tried.returncode:
        said = (tried.stderr.strip().splitlines() or ["nothing"])[-1]
        raise NoSandbox(f"bubblewrap does not start here (it says: {said}): {_INSTALL}")
