"""The rest of PID 1 inside lab/vm: /dev and the like; the command on the second serial port; its exit code; power off.

Runs on the machine's own Python, without a venv. Anything that fails here is shown, and the caller sees 125.
"""

from __future__ import annotations

import ctypes
import fcntl
import os
import pathlib
import subprocess
import sys
import termios
import traceback
import tty

LIBC = ctypes.CDLL(None, use_errno=True)
POWER_OFF = 0x4321FEDC  # reboot(2), LINUX_REBOOT_CMD_POWER_OFF
KVM_CREATE_VM = 0xAE01  # linux/kvm.h
PLACES = (
    ("proc", "/proc"), ("sysfs", "/sys"), ("cgroup2", "/sys/fs/cgroup"), ("devtmpfs", "/dev"), ("devpts", "/dev/pts"),
    ("tmpfs", "/dev/shm"),
)  # fmt: skip
JOB = pathlib.Path("/run/job")


def mount(kind: str, target: str, options: str = "") -> None:
    os.makedirs(target, exist_ok=True)
    if LIBC.mount(kind.encode(), target.encode(), kind.encode(), 0, options.encode()):
        raise OSError(ctypes.get_errno(), f"mount {kind} {target}")


def places() -> None:
    """What a program expects to find."""
    for kind, target in PLACES:
        mount(kind, target)
    for number, name in enumerate(("stdin", "stdout", "stderr")):
        os.symlink(f"/proc/self/fd/{number}", f"/dev/{name}")
    os.symlink("/proc/self/fd", "/dev/fd")
    if (JOB / "rooms").exists():
        for line in (JOB / "rooms").read_text().splitlines():
            target, size = line.rsplit(" ", 1)
            mount("tmpfs", target, f"size={size}")


def one_guest() -> int:
    """A guest of KVM's that never runs, for as long as this file is open.

    The first guest's begin and the last one's end patch the scheduler's code under the other processor (preempt_notifier_key). An
    emulator whose translator misses such a change dies of it ("Oops: int3" in __schedule): so the first one comes before all.
    """
    with open("/dev/kvm", "rb") as device:
        return fcntl.ioctl(device, KVM_CREATE_VM, 0)


def words(name: str) -> list[str]:
    return [word for word in (JOB / name).read_bytes().decode().split("\0") if word]


def run() -> int:
    """The command in the caller's folder and environment: its exit code, 128 + N for signal N."""
    environ = dict(line.split("=", 1) for line in words("env"))
    argv = words("argv")
    try:
        child = subprocess.Popen(argv, cwd=words("cwd")[0], env=environ, stdin=subprocess.DEVNULL, start_new_session=True)
    except OSError as error:
        print(f"lab/vm: {argv[0]}: {error.strerror}", file=sys.stderr, flush=True)
        return 127
    while True:
        pid, status = os.wait()
        if pid == child.pid:
            code = os.waitstatus_to_exitcode(status)
            return code if code >= 0 else 128 - code


def main() -> None:
    places()
    port = os.open("/dev/ttyS1", os.O_RDWR | os.O_NOCTTY)
    tty.setraw(port)  # no carriage returns in the caller's log
    for number in (0, 1, 2):
        os.dup2(port, number)
    os.system("ip link set lo up")
    if (JOB / "rooms").exists() and os.path.exists("/dev/kvm"):
        one_guest()
    code = run()
    termios.tcdrain(1)
    (JOB / "code").write_text(f"{code}\n")


try:
    main()
except BaseException:
    traceback.print_exc()
finally:
    sys.stderr.flush()
    os.sync()
    LIBC.reboot(POWER_OFF)
