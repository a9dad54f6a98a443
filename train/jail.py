"""Runs one Python program shut in: started as a script by `sandbox.py`, imports nothing of ours.

    python -S -P -s -B jail.py SETTINGS      JSON: the fields of `sandbox.Settings`; reports to descriptor `report`

Three processes: the keeper (this script), in new namespaces a first process that mounts, watches the clock, the
memory and the number of processes, and the program. When the first process of a PID namespace ends, the kernel kills
all others in it, whatever they did to get away. Without namespaces the keeper itself watches, and adopts orphans.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import json
import os
import platform
import resource
import signal
import struct
import sys
import time
from typing import Any, NoReturn

NOBODY = 65534
INNER_ID = 1000
NEW_USER, NEW_MOUNTS, NEW_PIDS, NEW_NETWORK, NEW_IPC, NEW_UTS = 1 << 28, 1 << 17, 1 << 29, 1 << 30, 1 << 27, 1 << 26
NEW_ANY = NEW_USER | NEW_MOUNTS | NEW_PIDS | NEW_NETWORK | NEW_IPC | NEW_UTS | 0x02000000  # and cgroups
PR_DEATH_SIGNAL, PR_DUMPABLE, PR_SECCOMP, PR_DROP, PR_SUBREAPER, PR_NO_NEW_PRIVILEGES = 1, 4, 22, 24, 36, 38
MS_BIND, MS_REC, MS_PRIVATE, MS_NOSUID, MS_NODEV, MS_NOEXEC = 4096, 16384, 1 << 18, 2, 4, 8
ATTR_RDONLY, ATTR_NOSUID, ATTR_NODEV = 1, 2, 4
AT_FDCWD, AT_RECURSIVE = -100, 0x8000
MOUNT_SETATTR, LANDLOCK_CREATE, LANDLOCK_ADD, LANDLOCK_RESTRICT = 442, 444, 445, 446  # the same on every machine
DEVICES = ("/dev/null", "/dev/zero", "/dev/urandom", "/dev/random")
ENDING = (signal.SIGCHLD, signal.SIGTERM)
OVERHEAD = 2
"""Processes of ours in the namespace."""
PYTHON, PREFIX, LIBRARY = map(os.path.realpath, (sys.executable, sys.base_prefix, os.__file__))
"""Followed at the start: nobody may not do that everywhere."""
POLL = 0.05
"""Seconds between two looks at memory and processes; the end of the program is noticed at once."""

# Syscalls as name:number on x86-64:number on 64-bit ARM.
MACHINES = {"x86_64": (0xC000003E, 0), "aarch64": (0xC00000B7, 1)}
ALWAYS_DENIED = """
socket:41:198 ptrace:101:117 process_vm_readv:310:270 process_vm_writev:311:271 mount:165:40 umount2:166:39
pivot_root:155:41 chroot:161:51 unshare:272:97 setns:308:268 bpf:321:280 perf_event_open:298:241
userfaultfd:323:282 add_key:248:217 request_key:249:218 keyctl:250:219 mknod:133:33 mknodat:259:33
open_by_handle_at:304:265 io_uring_setup:425:425 io_uring_enter:426:426 io_uring_register:427:427
pidfd_open:434:434 pidfd_getfd:438:438 mount_setattr:442:442 fsopen:430:430 move_mount:429:429 open_tree:428:428
"""
ALONE_DENIED = """
setsid:112:157 setpgid:109:154 setpriority:141:140 pidfd_send_signal:424:424 chmod:90:53 fchmod:91:52
fchmodat:268:53 fchmodat2:452:452 chown:92:54 fchown:93:55 lchown:94:54 fchownat:260:54 utime:132:88 utimes:235:88
futimesat:261:88 utimensat:280:88 setxattr:188:5 lsetxattr:189:6 fsetxattr:190:7 removexattr:197:14
lremovexattr:198:15 fremovexattr:199:16
"""
"""Without namespaces: nobody leaves the process group; Landlock knows nothing of modes, owners, times, attributes."""
OWN_PROCESS_ONLY = """
kill:62:129 tkill:200:130 tgkill:234:131 rt_sigqueueinfo:129:138 rt_tgsigqueueinfo:297:240 prlimit64:302:261
sched_setaffinity:203:122 sched_setscheduler:144:119 sched_setparam:142:118 sched_setattr:314:274
"""
"""Without namespaces: first argument must be 0 or the program's own process."""
CLONE, CLONE3 = (56, 220), 435

libc = ctypes.CDLL(None, use_errno=True)


def check(result: int, what: str) -> int:
    """A syscall's result. Raises OSError, with `what` in the place of a file."""
    if result < 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number), what)
    return result


def prctl(option: int, *values: int) -> None:
    """prctl(2) with integer arguments."""
    check(libc.prctl(option, *(ctypes.c_ulong(value) for value in (*values, 0, 0, 0, 0)[:4])), f"prctl {option}")


def syscall(number: int, *values: Any) -> int:
    """A syscall that the C library has no name for. Raises OSError."""
    return check(libc.syscall(ctypes.c_long(number), *values), f"syscall {number}")


def tell(descriptor: int, **words: Any) -> None:
    """One line to the sandbox's caller."""
    os.write(descriptor, (json.dumps(words) + "\n").encode())


def leave_root(settings: dict[str, Any]) -> bool:
    """From root to nobody, as the kernel counts no processes of root. False where that does not go.

    Nobody may not pass root's home, where the interpreter may lie: `settings["prefix"]` then names it by a descriptor.
    """
    settings["prefix"] = ""
    if os.getuid():
        return True
    place = os.open(PREFIX, os.O_PATH | os.O_DIRECTORY)
    try:
        os.chown(settings["folder"], NOBODY, NOBODY)
        os.setgroups([])
        os.setresgid(NOBODY, NOBODY, NOBODY)
        os.setresuid(NOBODY, NOBODY, NOBODY)
    except OSError:
        with open("/proc/self/uid_map") as file:
            return int(file.read().split()[1]) != 0  # outside of its container it is not root
    prctl(PR_DUMPABLE, 1)  # changing the user took it away; without it /proc/self may not be written
    if usable(settings):
        return True
    os.set_inheritable(place, True)
    settings["prefix"] = f"/proc/self/fd/{place}"
    return usable(settings)


def interpreter(settings: dict[str, Any]) -> tuple[str, dict[str, str]]:
    """The path of Python for the program, and the variables that it needs to find its library."""
    home = settings["prefix"]
    if not home:
        return PYTHON, {}
    name = os.path.relpath(PYTHON, PREFIX) if PYTHON.startswith(PREFIX + "/") else f"bin/{os.path.basename(PYTHON)}"
    return f"{home}/{name}", {"PYTHONHOME": home, "LD_LIBRARY_PATH": f"{home}/lib"}


def usable(settings: dict[str, Any]) -> bool:
    """Whether this user may run the interpreter and read its library and the program."""
    path, _ = interpreter(settings)
    library = f"{settings['prefix']}/{os.path.relpath(LIBRARY, PREFIX)}" if settings["prefix"] else LIBRARY
    return os.access(path, os.X_OK) and os.access(library, os.R_OK) and os.access(settings["program"], os.R_OK)


def enter_namespaces() -> bool:
    """Into new user, mount, PID, network, IPC and host name namespaces; PIDs are new for children only."""
    user, group = os.getuid(), os.getgid()
    try:
        check(libc.unshare(NEW_USER | NEW_MOUNTS | NEW_PIDS | NEW_NETWORK | NEW_IPC | NEW_UTS), "unshare")
    except OSError:
        return False
    for name, text in (
        ("setgroups", "deny"),
        ("uid_map", f"{INNER_ID} {user} 1"),
        ("gid_map", f"{INNER_ID} {group} 1"),
    ):
        with open(f"/proc/self/{name}", "w") as file:
            file.write(text)
    return True


def mount(source: str, target: str, kind: str, flags: int, options: str = "") -> None:
    """mount(2). Raises OSError."""
    words = (source.encode(), target.encode(), kind.encode(), ctypes.c_ulong(flags), options.encode())
    check(libc.mount(*words), f"mount {target}")


def set_mount(target: str, flags: int, *, add: int = 0, clear: int = 0) -> None:
    """mount_setattr(2), Linux 5.12. Raises OSError."""
    attributes = struct.pack("QQQQ", add, clear, 0, 0)
    syscall(MOUNT_SETATTR, AT_FDCWD, target.encode(), ctypes.c_uint(flags), attributes, ctypes.c_size_t(32))


def mount_read_only(settings: dict[str, Any]) -> bool:
    """Everything read-only, no devices but a few, and the program's folder in memory, of a limited size."""
    folder = settings["folder"]
    try:
        mount("none", "/", "", MS_REC | MS_PRIVATE)
        options = f"size={settings['file_bytes']},nr_inodes=10000,mode=0700,uid={INNER_ID},gid={INNER_ID}"
        mount("tmpfs", folder, "tmpfs", MS_NOSUID | MS_NODEV, options)
        for device in DEVICES:
            mount(device, device, "", MS_BIND)
        set_mount("/", AT_RECURSIVE, add=ATTR_RDONLY | ATTR_NOSUID | ATTR_NODEV)
        for device in DEVICES:
            set_mount(device, 0, clear=ATTR_NODEV)
        set_mount(folder, 0, clear=ATTR_RDONLY)
    except OSError:
        return False
    try:
        mount("proc", "/proc", "proc", MS_NOSUID | MS_NODEV | MS_NOEXEC)
        set_mount("/proc", 0, add=ATTR_RDONLY)
    except OSError:
        return True  # a container that hides parts of /proc allows no fresh one; it is read-only as it is
    return True


def landlock(folder: str) -> bool:
    """Writing only below `folder` and to a few devices (Linux 5.13); no TCP (6.7), no signals outwards (6.12)."""
    try:
        version = syscall(LANDLOCK_CREATE, None, ctypes.c_size_t(0), ctypes.c_uint(1))
        truncate = 1 << 14 if version >= 3 else 0
        writing = (
            0b1_1111_1111_0010 | (1 << 13 if version >= 2 else 0) | truncate
        )  # write, remove, make, move, truncate
        rules = struct.pack("QQQ", writing, 0b11 if version >= 4 else 0, 0b11 if version >= 6 else 0)
        size = 24 if version >= 6 else 16 if version >= 4 else 8
        ruleset = syscall(LANDLOCK_CREATE, rules, ctypes.c_size_t(size), ctypes.c_uint(0))
        for path, access in ((folder, writing), *((device, 0b10 | truncate) for device in DEVICES)):
            place = os.open(path, os.O_PATH | os.O_CLOEXEC)
            rule = struct.pack("=Qi", access, place)
            syscall(LANDLOCK_ADD, ruleset, ctypes.c_int(1), rule, ctypes.c_uint(0))
            os.close(place)
        syscall(LANDLOCK_RESTRICT, ruleset, ctypes.c_uint(0))
        os.close(ruleset)
    except OSError:
        return False
    return True


def numbers(table: str, column: int) -> set[int]:
    """The syscalls of a table on one machine."""
    return {int(entry.split(":")[1 + column]) for entry in table.split()}


def seccomp(*, alone: bool) -> bool:
    """Refuses sockets, other processes' memory, new namespaces; where `alone`, what namespaces would have kept off."""
    if platform.machine() not in MACHINES:
        return False
    audit, column = MACHINES[platform.machine()]
    load, equal, at_least, any_bit, end = 0x20, 0x15, 0x35, 0x45, 0x06
    allow, refuse, absent, kill = 0x7FFF0000, 0x00050000 | errno.EPERM, 0x00050000 | errno.ENOSYS, 0x80000000
    program = [(load, 0, 0, 4), (equal, 1, 0, audit), (end, 0, 0, kill), (load, 0, 0, 0)]
    if column == 0:  # the x32 interface has other numbers for the same calls
        program += [(at_least, 0, 1, 0x40000000), (end, 0, 0, absent)]
    program += [(equal, 0, 1, CLONE3), (end, 0, 0, absent)]  # its flags lie in memory; clone's can be read
    program += [(equal, 0, 4, CLONE[column]), (load, 0, 0, 16), (any_bit, 0, 1, NEW_ANY), (end, 0, 0, refuse)]
    program += [(end, 0, 0, allow)]
    for number in sorted(numbers(ALWAYS_DENIED + (ALONE_DENIED if alone else ""), column)):
        program += [(equal, 0, 1, number), (end, 0, 0, refuse)]
    for number in sorted(numbers(OWN_PROCESS_ONLY, column)) if alone else ():
        program += [(equal, 0, 5, number), (load, 0, 0, 16), (equal, 2, 0, 0), (equal, 1, 0, os.getpid())]
        program += [(end, 0, 0, refuse), (end, 0, 0, allow)]
    program += [(end, 0, 0, allow)]
    code = ctypes.create_string_buffer(b"".join(struct.pack("HBBI", *line) for line in program))
    header = struct.pack("HxxxxxxQ", len(program), ctypes.addressof(code))
    buffer = ctypes.create_string_buffer(header)
    try:
        prctl(PR_SECCOMP, 2, ctypes.addressof(buffer))
    except OSError:
        return False
    return True


def tasks_of_user() -> int:
    """Processes and threads that the kernel counts for this user now."""
    count = 0
    for name in filter(str.isdigit, os.listdir("/proc")):
        try:
            if os.stat(f"/proc/{name}").st_uid == os.getuid():
                count += len(os.listdir(f"/proc/{name}/task"))
        except OSError:
            continue
    return count


def limit(settings: dict[str, Any], *, alone: bool) -> None:
    """What the kernel limits for each process, and the number of them."""
    cpu = int(settings["seconds"]) + 1
    processes = settings["processes"] + (tasks_of_user() if alone else OVERHEAD)  # a namespace counts its own only
    wanted = {
        resource.RLIMIT_AS: settings["memory_bytes"],
        resource.RLIMIT_FSIZE: settings["file_bytes"],
        resource.RLIMIT_NPROC: processes,
        resource.RLIMIT_NOFILE: 128,
        resource.RLIMIT_CORE: 0,
        resource.RLIMIT_MSGQUEUE: 0,
    }
    resource.setrlimit(resource.RLIMIT_CPU, (cpu, cpu + 1))
    for what, value in wanted.items():
        hard = resource.getrlimit(what)[1]
        value = value if hard == resource.RLIM_INFINITY else min(value, hard)
        resource.setrlimit(what, (value, value))


def drop_capabilities() -> None:
    """None is left, and none comes back by running another program."""
    prctl(PR_NO_NEW_PRIVILEGES, 1)
    for capability in range(64):
        try:
            prctl(PR_DROP, capability)
        except OSError:
            break  # beyond the last one, or none may be dropped as there are none
    header, nothing = struct.pack("Ii", 0x20080522, 0), bytes(24)
    check(libc.capset(header, nothing), "capset")


def become_program(settings: dict[str, Any], layers: list[str], *, alone: bool) -> NoReturn:
    """The last steps of the program's process; reports which layers stand, or refuses."""
    report = settings["report"]
    try:
        os.setsid()
        prctl(PR_DEATH_SIGNAL, signal.SIGKILL)
        limit(settings, alone=alone)
        drop_capabilities()
        os.chdir(settings["folder"])
        if "landlock" in settings["layers"] and landlock(settings["folder"]):
            layers.append("landlock")
        if "seccomp" in settings["layers"] and seccomp(alone=alone):
            layers.append("seccomp")
        missing = []
        if not {"namespaces", "seccomp"} & set(layers):
            missing.append("the network")
        if not {"read-only mounts", "landlock"} & set(layers):
            missing.append("writing to files")
        if not settings["counted"]:
            missing.append("starting processes without end")
        tell(report, layers=layers, missing=missing)
        if not missing or settings["unprotected"]:
            signal.pthread_sigmask(signal.SIG_SETMASK, [])
            path, variables = interpreter(settings)
            words = [path, "-S", "-P", "-s", "-B", "-X", "utf8", settings["program"]]
            os.execve(path, words, dict(os.environ) | variables)
    except BaseException as error:
        tell(report, broken=f"{type(error).__name__}: {error}")
    os._exit(1)


def usage(group: int | None) -> tuple[int, int]:
    """Processes and bytes of memory of a process group; None: of all in this PID namespace but its first process."""
    count = pages = 0
    for name in filter(str.isdigit, os.listdir("/proc")):
        try:
            with open(f"/proc/{name}/stat") as file:
                fields = file.read().rpartition(")")[2].split()
        except OSError:
            continue
        if int(fields[2]) == group if group else name != "1":
            count, pages = count + 1, pages + int(fields[21])
    return count, pages * resource.getpagesize()


def watch(program: int, settings: dict[str, Any], *, alone: bool) -> dict[str, Any]:
    """Waits for the program, at most as long as it may run. Returns what became of it."""
    deadline = time.monotonic() + settings["seconds"]
    looks = alone or os.readlink("/proc/self") == "1"  # /proc may be that of another namespace
    while True:
        while True:  # orphans come to this process as well
            try:
                pid, status = os.waitpid(-1, os.WNOHANG)
            except ChildProcessError:
                return {"code": 1}
            if pid == program:
                return {"code": os.waitstatus_to_exitcode(status)}
            if pid == 0:
                break
        left = deadline - time.monotonic()
        if left <= 0:
            return {"reason": "timeout"}
        if looks:
            processes, memory = usage(program if alone else None)
            if processes > settings["processes"] + OVERHEAD:
                return {"reason": "processes"}
            if memory > settings["memory_bytes"]:
                return {"reason": "memory"}
        told = signal.sigtimedwait(ENDING, min(left, POLL))
        if told is not None and told.si_signo == signal.SIGTERM:
            return {"reason": "timeout"}


def sweep(program: int) -> None:
    """Kills the program's group and every child of this process, orphans included, until none is left."""
    own = os.getpid()
    while True:
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(program, signal.SIGKILL)
        for name in filter(str.isdigit, os.listdir("/proc")):
            try:
                with open(f"/proc/{name}/stat") as file:
                    parent = int(file.read().rpartition(")")[2].split()[1])
                if parent == own:
                    os.kill(int(name), signal.SIGKILL)
            except OSError:
                continue
        try:
            while os.waitpid(-1, os.WNOHANG)[0]:
                pass
        except ChildProcessError:
            return
        time.sleep(0.005)


def oversee(settings: dict[str, Any], layers: list[str], *, alone: bool) -> None:
    """Starts the program, waits, ends all of it and reports. Runs in the namespace's first process, or the keeper."""
    signal.pthread_sigmask(signal.SIG_BLOCK, ENDING)
    program = os.fork()
    if program == 0:
        become_program(settings, layers, alone=alone)
    for descriptor in (0, 1, 2):
        os.close(descriptor)  # the caller reads until every writer is gone
    ended = watch(program, settings, alone=alone)
    if alone:
        sweep(program)
    tell(settings["report"], **ended)


def main() -> None:
    """The keeper."""
    settings = json.loads(sys.argv[1])
    os.set_inheritable(settings["report"], False)
    settings["counted"] = leave_root(settings)
    prctl(PR_DEATH_SIGNAL, signal.SIGKILL)
    if "namespaces" not in settings["layers"] or not enter_namespaces():
        signal.pthread_sigmask(signal.SIG_BLOCK, ENDING)
        prctl(PR_DEATH_SIGNAL, signal.SIGTERM)  # so that it can end what it keeps
        prctl(PR_SUBREAPER, 1)
        oversee(settings, [], alone=True)
        return
    first = os.fork()
    if first:
        for descriptor in (0, 1, 2):
            os.close(descriptor)
        os.waitpid(first, 0)
        return
    prctl(PR_DEATH_SIGNAL, signal.SIGKILL)
    layers = ["namespaces", *(["read-only mounts"] if mount_read_only(settings) else [])]
    try:
        oversee(settings, layers, alone=False)
    except BaseException as error:
        tell(settings["report"], broken=f"{type(error).__name__}: {error}")
    os._exit(0)


if __name__ == "__main__":
    main()
