"""Functions in processes of their own: what they return, and how they end."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from repae_jax.distributed.child_process import Crashed, run_in_subprocess


def divide(a, b):
    print(f"dividing by {b}", file=sys.stderr)
    return {"process": os.getpid(), "result": a / b}


def abort():
    """Aborts as libtpu does."""
    os.write(2, b"W0000 00:00:1 7 a.cc:1] careful\nF0000 00:00:1.5 7 b.cc:22] Check failed: shape.rank() == 2 (3 vs. 2)\n")
    os.write(2, b"*** Check failure stack trace: ***\n    @     0x7f0000000000  (unknown)\n")
    os.abort()


def be_killed():
    os.kill(os.getpid(), signal.SIGKILL)


def leave():
    os._exit(3)


class Odd(Exception):
    """Cannot be made again from its message alone, as pickle does."""

    def __init__(self, a, b):
        super().__init__(f"{a} and {b}")


def fail_oddly():
    raise Odd(1, 2)


def sleep_long(file):
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # as while a compiler works, which is not Python
    Path(file).write_text(str(os.getpid()))
    time.sleep(600)


@pytest.mark.integration
def test_what_it_returns(capsys):
    quotient = run_in_subprocess(divide, 6, 3)
    assert quotient["result"] == 2 and quotient["process"] != os.getpid()
    assert capsys.readouterr().err == "dividing by 3\n"


@pytest.mark.integration
@pytest.mark.parametrize(
    ("function", "message", "exitcode", "shown"),
    [
        (abort, r"Check failed: shape.rank\(\) == 2 \(3 vs. 2\)", -signal.SIGABRT, "stack trace"),
        (be_killed, "killed by SIGKILL, most likely because the memory of this machine ran out", -signal.SIGKILL, ""),
        (leave, "^exit code 3, without a word$", 3, ""),
    ],
)
def test_how_its_process_ends(function, message, exitcode, shown, capsys):
    with pytest.raises(Crashed, match=message) as caught:
        run_in_subprocess(function)
    assert caught.value.exitcode == exitcode and shown in capsys.readouterr().err


@pytest.mark.integration
@pytest.mark.parametrize(
    ("function", "arguments", "kind", "message"),
    [
        (divide, (1, 0), ZeroDivisionError, "^division by zero$"),
        (fail_oddly, (), RuntimeError, "^Odd: 1 and 2$"),
    ],
)
def test_what_it_raises(function, arguments, kind, message, capsys):
    with pytest.raises(kind, match=message) as caught:
        run_in_subprocess(function, *arguments)
    assert type(caught.value) is kind and f"in {function.__name__}" in capsys.readouterr().err, "with its own traceback"


def is_running(pid):
    """A zombie is not."""
    try:
        return "State:\tZ" not in Path(f"/proc/{pid}/status").read_text()
    except FileNotFoundError:
        return False


@pytest.mark.integration
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="looks at processes as Linux shows them")
@pytest.mark.parametrize("by", [signal.SIGKILL, signal.SIGINT])
def test_it_ends_with_who_waits_for_it(by, tmp_path):
    heeds = "import signal; signal.signal(signal.SIGINT, signal.default_int_handler)"  # background processes ignore it
    script = f"{heeds}; import test_child_process as t; t.run_in_subprocess(t.sleep_long, {str(tmp_path / 'pid')!r})"
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(map(str, (Path(__file__).parent, Path(__file__).parents[2])))}
    waiting = subprocess.Popen([sys.executable, "-c", script], env=env, stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 60

    def until(condition):
        while not condition() and time.monotonic() < deadline:
            time.sleep(0.1)
        assert condition()

    try:
        until(lambda: (tmp_path / "pid").exists() and (tmp_path / "pid").read_text())
        waiting.send_signal(by)
        until(lambda: waiting.poll() is not None)
        until(lambda: not is_running(int((tmp_path / "pid").read_text())))
    finally:
        waiting.kill()
        errors = waiting.communicate()[1]
    assert errors.rstrip().endswith("KeyboardInterrupt") == (by == signal.SIGINT)
