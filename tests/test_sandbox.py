"""Law: a program in the sandbox harms nothing outside, leaves nothing behind, and ends in time, whatever it does."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from errors import UserError
from train import sandbox
from train.sandbox import LAYERS, MIB, Outcome, run_many, run_python

ROOT = Path(__file__).parent.parent
HOLDS = [LAYERS, ("landlock", "seccomp")]
"""With namespaces, and as in a container that allows none."""


@pytest.fixture(params=HOLDS, ids=["namespaces", "without"])
def layers(request: pytest.FixtureRequest) -> tuple[str, ...]:
    """Layers to try; skips those that this machine has not."""
    try:
        if set(request.param) <= set(run_python("", layers=request.param).layers):
            return request.param
    except UserError:
        pass
    pytest.skip(f"this machine has not all of {', '.join(request.param)}")


@pytest.fixture
def marked() -> Iterator[str]:
    """A word for command lines; fails where a process with it is still there at the end."""
    word = f"left-behind-{os.getpid()}-{time.monotonic_ns()}"
    yield word
    deadline = time.monotonic() + 5
    while found := processes_with(word):
        assert time.monotonic() < deadline, found
        time.sleep(0.02)


def processes_with(word: str) -> list[str]:
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            text = path.read_bytes().decode("utf-8", "replace")
        except OSError:
            continue
        if word in text:
            found.append(text)
    return found


def test_what_it_prints_comes_back(layers: tuple[str, ...]) -> None:
    outcome = run_python(
        "print(input()[::-1]); import sys; print('aside', file=sys.stderr)", stdin="abc", layers=layers
    )
    assert (outcome.ok, outcome.stdout, outcome.stderr, outcome.reason) == (True, "cba\n", "aside\n", "finished")


def test_it_sees_no_variables_and_no_packages_of_the_caller(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SECRET_KEY", "hush")
    outcome = run_python("import os; print('SECRET_KEY' in os.environ)\nimport jax")
    assert outcome.stdout == "False\n" and "No module named 'jax'" in outcome.stderr and outcome.reason == "failed"


def test_neither_variables_nor_memory_of_the_caller_are_read(layers: tuple[str, ...]) -> None:
    code = (
        f"for name in ('environ', 'mem'):\n    try: open('/proc/{os.getpid()}/' + name, 'rb').read(1); print('read')\n"
        "    except OSError: print('no')"
    )
    assert run_python(code, layers=layers).stdout == "no\nno\n"


def test_reading_and_writing_in_its_own_folder_are_allowed() -> None:
    code = "open('a', 'w').write('x'); print(open('a').read(), len(open('/etc/passwd').read()) > 0)"
    assert run_python(code).stdout == "x True\n"


def test_strings_hash_alike_in_every_run() -> None:
    first, second = run_many(["print(list({'a', 'b', 'c', 'd'}))"] * 2)
    assert first.ok and first.stdout == second.stdout


@pytest.mark.parametrize(
    ("code", "reason"),
    [
        ("while True: pass", "timeout"),
        ("import time; time.sleep(60)", "timeout"),
        ("import signal; signal.signal(15, signal.SIG_IGN)\nwhile True: pass", "timeout"),
        ("a = []\nwhile True: a.append(bytearray(1 << 20))", "memory"),
        ("bytearray(1 << 40)", "memory"),
        ("def f(): f()\nf()", "failed"),
        ("import sys; sys.exit(3)", "failed"),
        ("import os; os.abort()", "killed"),
        ("raise ValueError('no')", "failed"),
        ("this is no program", "failed"),
    ],
)
def test_reasons(code: str, reason: str) -> None:
    started = time.monotonic()
    outcome = run_python(code, seconds=1, memory_bytes=128 * MIB)
    assert (outcome.ok, outcome.reason) == (False, reason), outcome
    assert time.monotonic() - started < 10


def test_memory_of_many_processes_is_counted_together(layers: tuple[str, ...]) -> None:
    code = (
        "import os, time\nfor i in range(8):\n    if not os.fork(): a = b'x' * (40 << 20); time.sleep(9)\ntime.sleep(9)"
    )
    outcome = run_python(code, memory_bytes=128 * MIB, layers=layers)
    assert outcome.reason == "memory"


def test_a_fork_bomb_ends(layers: tuple[str, ...]) -> None:
    code = "import os\nprint(os.getcwd(), flush=True)\nwhile True:\n    try: os.fork()\n    except OSError: pass"
    started = time.monotonic()
    outcome = run_python(code, seconds=1, layers=layers)
    assert not outcome.ok and time.monotonic() - started < 15
    assert not processes_with(str(Path(outcome.stdout.strip()).parent))


def test_the_kernel_counts_processes(layers: tuple[str, ...]) -> None:
    """Who only looks from time to time loses against a bomb on a machine that is busy."""
    code = """import os, time
for count in range(99):
    try: child = os.fork()
    except BlockingIOError: break
    if not child: time.sleep(9)
print(count)"""
    outcome = run_python(code, processes=8, layers=layers)
    assert outcome.ok and int(outcome.stdout) <= 8 + 2


def test_threads_are_limited_with_processes(layers: tuple[str, ...]) -> None:
    code = (
        "import threading as t, time\nfor i in range(500): t.Thread(target=time.sleep, args=(9,), daemon=True).start()"
    )
    outcome = run_python(code, layers=layers)
    assert not outcome.ok and "can't start new thread" in outcome.stderr


@pytest.mark.parametrize("leave", ["os.setsid()", "os.setpgid(0, 0)", "pass"])
def test_a_daemon_dies_with_the_program(layers: tuple[str, ...], marked: str, leave: str) -> None:
    code = f"""import os, sys
if os.fork() == 0:
    try: {leave}
    except OSError: pass
    if os.fork() == 0:
        os.execv(sys.executable, ['{marked}', '-c', '''import signal, time
for s in (1, 2, 15): signal.signal(s, signal.SIG_IGN)
time.sleep(60)''', '{marked}'])
    os._exit(0)
import time; time.sleep(0.3); print('done')"""
    started = time.monotonic()
    outcome = run_python(code, layers=layers)
    assert outcome.stdout == "done\n" and outcome.ok and time.monotonic() - started < 10


def test_nothing_outlives_a_caller_that_is_killed(layers: tuple[str, ...], marked: str, tmp_path: Path) -> None:
    sleeper = ["p", "-c", "import time; time.sleep(60)", marked]
    code = f"import os, sys\nos.fork()\nos.execv(sys.executable, {sleeper!r})"
    caller = f"from train.sandbox import run_python; run_python({code!r}, seconds=60, layers={layers!r})"
    with subprocess.Popen(
        [sys.executable, "-c", caller], cwd=ROOT, env=os.environ | {"TMPDIR": str(tmp_path)}
    ) as process:
        deadline = time.monotonic() + 20
        while len([text for text in processes_with(marked) if text.startswith("p\0")]) < 2:
            assert time.monotonic() < deadline and process.poll() is None
            time.sleep(0.02)
        process.kill()


def test_files_outside_stay_as_they_are(layers: tuple[str, ...], tmp_path: Path) -> None:
    victim = tmp_path / "victim"
    victim.write_text("whole")
    victim.chmod(0o666)
    tmp_path.chmod(0o777)
    repository = Path(__file__).parent
    code = f"""import os
def attempt(name, what):
    try: what(); print(name)
    except OSError: pass
attempt('write', lambda: open({str(victim)!r}, 'w').write('x'))
attempt('append', lambda: open({str(victim)!r}, 'a').write('x'))
attempt('truncate', lambda: os.truncate({str(victim)!r}, 0))
attempt('remove', lambda: os.remove({str(victim)!r}))
attempt('rename', lambda: os.rename({str(victim)!r}, {str(victim)!r} + '2'))
attempt('link', lambda: os.link({str(victim)!r}, {str(victim)!r} + '3'))
attempt('mode', lambda: os.chmod({str(victim)!r}, 0))
attempt('times', lambda: os.utime({str(victim)!r}, (1, 1)))
for folder in ('/tmp', '/var/tmp', '/dev/shm', {str(Path.home())!r}, {str(repository)!r}, {str(tmp_path)!r}, '..'):
    attempt('make ' + folder, lambda: open(folder + '/made-by-program', 'w'))
    attempt('folder ' + folder, lambda: os.mkdir(folder + '/made-by-program'))
print('tried')"""
    before = victim.stat()
    assert run_python(code, layers=layers).stdout == "tried\n"
    after = victim.stat()
    assert victim.read_text() == "whole" and (before.st_mode, before.st_mtime) == (after.st_mode, after.st_mtime)
    assert list(tmp_path.iterdir()) == [victim]


def test_no_socket_reaches_anybody(layers: tuple[str, ...], tmp_path: Path) -> None:
    with (
        socket.create_server(("127.0.0.1", 0)) as tcp,
        socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as udp,
        socket.socket(socket.AF_UNIX) as unix,
    ):
        udp.bind(("127.0.0.1", 0))
        unix.bind(str(tmp_path / "s"))
        unix.listen()
        os.chmod(tmp_path / "s", 0o777)
        for listener in (tcp, udp, unix):
            listener.settimeout(0.05)
        code = f"""import socket
for what in (
    lambda: socket.create_connection(('127.0.0.1', {tcp.getsockname()[1]}), timeout=1),
    lambda: socket.socket(type=socket.SOCK_DGRAM).sendto(b'x', ('127.0.0.1', {udp.getsockname()[1]})),
    lambda: socket.socket(socket.AF_UNIX).connect({str(tmp_path / "s")!r}),
    lambda: socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, 0),
):
    try: what(); print('reached')
    except OSError as error: print('no')"""
        assert run_python(code, layers=layers).stdout == "no\n" * 4
        for receive in (tcp.accept, lambda: udp.recv(9), unix.accept):
            with pytest.raises(TimeoutError):
                receive()


def test_parents_and_callers_cannot_be_killed(layers: tuple[str, ...]) -> None:
    code = f"""import os
for pid in (os.getppid(), {os.getpid()}, -1):
    try: os.kill(pid, 9)
    except OSError: pass
print('on')"""
    outcome = run_python(code, layers=layers)
    assert outcome.ok and outcome.stdout == "on\n"


def test_a_flood_of_output_is_cut(layers: tuple[str, ...]) -> None:
    code = (
        "import sys\nfor i in range(300): print('y' * 9999); print('z' * 9999, file=sys.stderr)\nraise KeyError('end')"
    )
    outcome = run_python(code, output_bytes=1000, layers=layers)
    assert outcome.stdout == "y" * 1000 and len(outcome.stderr) <= 1000 + sandbox.TAIL
    assert sandbox.last_line(outcome.stderr) == "KeyError: 'end'"
    assert run_python("while True: print('y' * 99999)", seconds=0.5, layers=layers).reason == "timeout"


def test_a_huge_file_is_refused(layers: tuple[str, ...]) -> None:
    code = "with open('big', 'wb') as file:\n    while True: file.write(bytes(1 << 20))"
    outcome = run_python(code, file_bytes=4 * MIB, layers=layers)
    assert outcome.reason == "failed" and "OSError" in outcome.stderr


def test_its_folder_is_gone_afterwards(layers: tuple[str, ...]) -> None:
    code = "import os; os.mkdir('a', 0o500); os.umask(0o777); open('b', 'w').close(); os.mkdir('c'); print(os.getcwd())"
    folder = Path(run_python(code, layers=layers).stdout.strip())
    assert folder.name == "work" and not folder.parent.exists()


def test_several_run_side_by_side_in_order() -> None:
    outcomes = run_many([f"print({i})" for i in range(5)] + ["1 / 0"], workers=3)
    assert [o.stdout.strip() for o in outcomes] == ["0", "1", "2", "3", "4", ""]
    assert isinstance(outcomes[-1], Outcome) and outcomes[-1].reason == "failed"


def test_a_machine_that_can_hold_nothing_is_refused_unless_allowed() -> None:
    with pytest.raises(UserError, match=r"from the network and writing to files.*Landlock"):
        run_python("print(1)", layers=())
    assert run_python("print(1)", layers=(), unprotected=True).stdout == "1\n"


def test_any_text_is_a_program() -> None:
    assert run_python("\ud800 \x00").reason == "failed"
