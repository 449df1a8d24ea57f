"""The rest of PID 1 inside lab/uml's kernel: an overlay root in memory, devices, modules; the command; its exit code; power off.

Runs on the machine's own Python, without a venv. Anything that fails here is shown, and the caller sees 125.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import pathlib
import sys
import termios
import traceback

LIBC = ctypes.CDLL(None, use_errno=True)
FINIT_MODULE = 313  # x86_64: the only machine that Debian builds user-mode Linux for
PIVOT_ROOT = 155
DETACH = 2  # umount2(2)
POWER_OFF = 0x4321FEDC  # reboot(2), LINUX_REBOOT_CMD_POWER_OFF
BIND, REC = 4096, 16384  # mount(2)


def check(result: int, what: str) -> None:
    if result < 0:
        raise OSError(ctypes.get_errno(), f"{what}: {os.strerror(ctypes.get_errno())}")


def mount(source: str, target: str, kind: str, flags: int = 0, data: str = "") -> None:
    os.makedirs(target, exist_ok=True)
    check(LIBC.mount(source.encode(), target.encode(), kind.encode(), flags, data.encode()), f"mount {kind} {target}")


def load(modules: str, names: list[str]) -> None:
    """modprobe, as far as needed: what is listed (or built in), after what it depends on."""
    needs = {}
    for line in pathlib.Path(modules, "modules.dep").read_text().splitlines():
        path, _, others = line.partition(":")
        needs[os.path.basename(path).split(".")[0]] = [*reversed(others.split()), path]
    for name in names:
        for path in needs.get(name, []):
            fd = os.open(os.path.join(modules, path), os.O_RDONLY)
            if LIBC.syscall(FINIT_MODULE, fd, b"", 0) and ctypes.get_errno() != 17:  # EEXIST: is loaded
                check(-1, f"module {path}")
            os.close(fd)


def new_root(job: str, modules: str) -> None:
    """Everything may be written, nothing stays: the machine's root lies read-only below a tmpfs."""
    mount("tmpfs", "/mnt", "tmpfs")
    for folder in ("upper", "work", "root"):
        os.mkdir(f"/mnt/{folder}")
    mount("overlay", "/mnt/root", "overlay", 0, "lowerdir=/,upperdir=/mnt/upper,workdir=/mnt/work")
    # No chroot: whoever joins a mount namespace made in here (nsenter) would find itself in the old root.
    os.chdir("/mnt/root")
    check(LIBC.syscall(PIVOT_ROOT, b".", b"."), "pivot_root")
    check(LIBC.umount2(b".", DETACH), "umount of the old root")
    os.chdir("/")
    mount("proc", "/proc", "proc")
    mount("sysfs", "/sys", "sysfs")
    mount("devtmpfs", "/dev", "devtmpfs")
    for folder in ("/run", "/dev/shm"):
        mount("tmpfs", folder, "tmpfs")
    mount("devpts", "/dev/pts", "devpts")
    os.makedirs("/dev/net", exist_ok=True)
    if not os.path.exists("/dev/net/tun"):
        os.mknod("/dev/net/tun", 0o20666, os.makedev(10, 200))
    for number, name in enumerate(("stdin", "stdout", "stderr")):
        os.symlink(f"/proc/self/fd/{number}", f"/dev/{name}")
    os.symlink("/proc/self/fd", "/dev/fd")
    release = os.uname().release
    os.makedirs(f"/lib/modules/{release}", exist_ok=True)  # for whoever asks what this kernel has
    mount("hostfs", f"/lib/modules/{release}", "hostfs", 1, modules)
    mount("hostfs", "/run/job", "hostfs", 0, job)


def more_mounts() -> None:
    """What lab/uml asks for besides: kind, source, target."""
    wanted = words("/run/job/mounts")
    for kind, source, target in zip(wanted[::3], wanted[1::3], wanted[2::3], strict=True):
        mount(source, target, kind, 0, source if kind == "hostfs" else "")


def words(path: str) -> list[str]:
    return pathlib.Path(path).read_bytes().decode().split("\0")[:-1]


def run() -> int:
    """The command in the caller's folder and environment, as a child: its exit code, 128 + N for signal N."""
    cwd, *_ = words("/run/job/where")
    environ = dict(line.split("=", 1) for line in words("/run/job/env"))
    environ["TMPDIR"] = "/tmp"
    argv = words("/run/job/argv")
    child = os.fork()
    if not child:
        try:
            os.chdir(cwd)
            os.execvpe(argv[0], argv, environ)
        except OSError as error:
            print(f"lab/uml: {argv[0]}: {error.strerror}", file=sys.stderr, flush=True)
        os._exit(127)
    while True:
        pid, status = os.wait()
        if pid == child:
            code = os.waitstatus_to_exitcode(status)
            return code if code >= 0 else 128 - code


def main(job: str) -> None:
    modules, *names = words(f"{job}/where")[1:]
    modules = os.path.join(modules, os.uname().release)
    load(modules, ["overlay"])
    new_root(job, modules)
    load(f"/lib/modules/{os.uname().release}", names)
    more_mounts()
    os.system("ip link set lo up")
    # Nobody's controlling terminal: at that one's end the console would be hung up, with what is still to be shown.
    console = os.open("/dev/tty1", os.O_RDWR | os.O_NOCTTY)
    attributes = termios.tcgetattr(console)
    attributes[1] &= ~termios.OPOST  # no carriage returns in the caller's log
    termios.tcsetattr(console, termios.TCSANOW, attributes)
    for number in (0, 1, 2):
        os.dup2(console, number)
    pathlib.Path("/run/job/code").write_text(f"{run()}\n")
    termios.tcdrain(1)


try:
    main(sys.argv[1])
except BaseException:
    traceback.print_exc()
finally:
    with contextlib.suppress(OSError):
        sys.stderr.flush()
    os.sync()
    LIBC.reboot(POWER_OFF)
