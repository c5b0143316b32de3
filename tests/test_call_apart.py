"""Functions in processes of their own: what they return, and how they end."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from repae_jax.call_apart import Crashed, call_apart


def divide(a, b):
    print(f"dividing by {b}", file=sys.stderr)
    return {"process": os.getpid(), "result": a / b}


def abort():
    """As libtpu does."""
    os.write(2, b"W0000 00:00:1 7 a.cc:1] careful\nF0000 00:00:1.5 7 b.cc:22] Check failed: shape.rank() == 2 (3 vs. 2)\n")
    os.write(2, b"*** Check failure stack trace: ***\n    @     0x7f0000000000  (unknown)\n")
    os.abort()


def be_killed():
    os.kill(os.getpid(), signal.SIGKILL)


def sleep_long(file):
    Path(file).write_text(str(os.getpid()))
    time.sleep(600)


def test_what_it_returns(capsys):
    found = call_apart(divide, 6, 3)
    assert found["result"] == 2 and found["process"] != os.getpid()
    assert capsys.readouterr().err == "dividing by 3\n"


@pytest.mark.parametrize(
    ("function", "arguments", "message", "shown"),
    [
        (divide, (1, 0), "ZeroDivisionError: division by zero", "Traceback"),
        (abort, (), r"Check failed: shape.rank\(\) == 2 \(3 vs. 2\)", "stack trace"),
        (be_killed, (), "exit code -9, without a word", ""),
    ],
)
def test_how_it_ends(function, arguments, message, shown, capsys):
    with pytest.raises(Crashed, match=message):
        call_apart(function, *arguments)
    assert shown in capsys.readouterr().err


def is_running(pid):
    """A zombie is not."""
    try:
        return "State:\tZ" not in Path(f"/proc/{pid}/status").read_text()
    except FileNotFoundError:
        return False


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="looks at processes as Linux shows them")
def test_it_ends_with_who_waits_for_it(tmp_path):
    script = f"import test_call_apart as t; t.call_apart(t.sleep_long, {str(tmp_path / 'pid')!r})"
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(map(str, (Path(__file__).parent, Path(__file__).parents[1])))}
    waiting = subprocess.Popen([sys.executable, "-c", script], env=env)
    deadline = time.monotonic() + 60

    def until(condition):
        while not condition() and time.monotonic() < deadline:
            time.sleep(0.1)
        assert condition()

    until(lambda: (tmp_path / "pid").exists() and (tmp_path / "pid").read_text())
    waiting.kill()
    waiting.wait()
    until(lambda: not is_running(int((tmp_path / "pid").read_text())))
