"""The frame of measurements/on_gpu.py: time, failures, results; what its stages read."""

import json
import time
from pathlib import Path

import compare_published
import on_gpu
import pytest

from configs import repae
from repae_jax.cost import roofline

STAGES = tuple(on_gpu.STAGES)


def options(folder, *words):
    return on_gpu.parse_args(["--out", str(folder), *words])


def lines(folder):
    return [json.loads(line) for line in (folder / "results.jsonl").read_text().splitlines()]


@pytest.fixture
def ended(monkeypatch):
    """Processes of stages that only seem to run: a list of (stage, limit), and a dict of (exit code, seconds) of each."""
    clock, begun, ends = [0.0], [], {}

    def run_apart(command, limit, log):
        stage = command[command.index("--only") + 1]
        begun.append((stage, limit))
        code, seconds = ends.get(stage, (0, 1.0))
        log.write_text(f"output of {stage}")
        clock[0] += seconds
        return code, seconds

    monkeypatch.setattr(on_gpu, "run_apart", run_apart)
    monkeypatch.setattr(on_gpu.time, "monotonic", lambda: clock[0])
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", "set, so that it is restored")
    return begun, ends


def test_a_stage_that_fails_does_not_stop_the_others(ended, tmp_path):
    begun, ends = ended
    ends |= {"tests": (1, 3.0), "compare": ("killed after 220 s", 220.0)}
    assert not on_gpu.run(options(tmp_path, "--stages", "tests", "compare", "quickstart"))
    assert begun == [(name, on_gpu.STAGES[name].limit) for name in ("tests", "compare", "quickstart")]
    assert lines(tmp_path) == [
        {"stage": "tests", "ended": 1, "took": 3.0, "output": "output of tests"},
        {"stage": "compare", "ended": "killed after 220 s", "took": 220.0, "output": "output of compare"},
        {"stage": "quickstart", "ended": 0, "took": 1.0},
    ]


def test_no_stage_is_begun_when_the_time_is_over(ended, tmp_path):
    begun, ends = ended
    given = options(tmp_path, "--seconds", "100", "--stages", "tests", "compare", "quickstart")
    ends["tests"] = 0, 75.0
    assert on_gpu.run(given)
    assert begun == [("tests", 100.0), ("compare", 25.0), ("quickstart", 24.0)], "as long as is left"
    begun.clear()
    ends["compare"] = 0, 20.0
    assert not on_gpu.run(given)
    assert [stage for stage, _ in begun] == ["tests", "compare"]
    assert lines(tmp_path)[-1] == {"stage": "quickstart", "ended": "not begun: the time is over"}


def test_all_stages_by_default_the_most_important_first(ended, tmp_path):
    assert on_gpu.run(options(tmp_path, "--seconds", "9000"))
    assert [stage for stage, _ in ended[0]] == list(STAGES)
    assert STAGES[:3] == ("step-f8d4-32", "compare", "fast-f8d4-32")


def test_the_chosen_tests_exist():
    assert all((on_gpu.ROOT / "tests" / name).exists() for name in on_gpu.TESTS)


def test_fast_values_are_those_that_the_documentation_advises():
    config = repae.get_config()
    compare_published.set_fast(config)
    values = {"sit.unroll": config.sit.unroll, "sit.remat": config.sit.remat, "attention": config.attention}
    advised = " ".join(f"--config.{name}={value}" for name, value in values.items())
    assert advised in (on_gpu.ROOT / "docs/performance.md").read_text()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--stages", "steps"], "argument --stages: invalid choice: 'steps' (choose from"),
        (["--seconds", "0"], "argument --seconds: 0 must be at least 1"),
        (["--device", "tpu"], "argument --device: invalid choice: 'tpu'"),
    ],
)
def test_mistakes(words, message, tmp_path, capsys):
    with pytest.raises(SystemExit) as caught:
        options(tmp_path, *words)
    assert caught.value.code == 2 and message in capsys.readouterr().err


@pytest.mark.integration
def test_a_process_is_ended_at_its_limit_with_those_that_it_has_started(tmp_path):
    began = time.monotonic()
    code, seconds = on_gpu.run_apart(["sh", "-c", "sleep 60 & echo $!; wait"], 1, tmp_path / "log")
    assert code == "killed after 1 s" and 1 <= seconds < 20 and time.monotonic() - began < 20
    command = Path("/proc", (tmp_path / "log").read_text().strip(), "cmdline")
    while command.exists() and command.read_bytes():
        assert time.monotonic() - began < 30, "what it has started is alive"
        time.sleep(0.05)


@pytest.mark.integration
def test_a_stage_in_a_process_of_its_own(tmp_path):
    """The stage ends with what it says, as nothing to compare with is given."""
    assert not on_gpu.run(options(tmp_path, "--device", "cpu", "--tiny", "--stages", "compare"))
    (line,) = lines(tmp_path)
    assert line["ended"] == 1 and "--published is not given" in line["output"]


def event(tid, duration, name="kernel", op=None):
    return {"ph": "X", "pid": 1, "tid": tid, "name": name, "ts": 0, "dur": duration, "args": {"hlo_op": op} if op else {}}


def thread(tid, name):
    return {"ph": "M", "pid": 1, "tid": tid, "name": "thread_name", "args": {"name": name}}


def test_kernels_of_a_trace():
    """Microseconds of two steps. What the host does is no kernel, even where it names an instruction."""
    gpu = [thread(1, "Stream #14(Compute)"), thread(2, "python"), thread(3, "Stream #20(MemcpyD2D)")]
    gpu += [event(1, 6.0, op="fusion.1"), event(1, 8.0, op="fusion.1"), event(1, 30.0, "cudnn_kernel")]
    gpu += [event(3, 2.0, op="copy.3"), event(2, 99.0, "a call"), event(2, 99.0, op="fusion.1")]
    gpu += [{"ph": "C", "pid": 1, "tid": 1, "name": "counter"}]
    found = on_gpu.kernel_seconds(gpu, 2)
    assert list(found) == ["cudnn_kernel", "fusion.1", "copy.3"]
    assert list(found.values()) == pytest.approx([15e-6, 7e-6, 1e-6])
    cpu = [thread(1, "worker/1"), thread(2, "worker/2"), event(1, 4.0, op="dot.1"), event(2, 2.0, op="dot.1"), event(2, 9.0)]
    assert on_gpu.kernel_seconds(cpu, 2) == {"dot.1": pytest.approx(3e-6)}


def test_kernels_beside_the_roofline(monkeypatch):
    kernel = roofline.Kernel("loop_fusion.2", "fusion", "SiT", "jit(step)/SiT/add", 28.0, {}, 1e6, 1e-4, roofline.MEMORY)
    monkeypatch.setattr(roofline, "analyze", lambda text, chip: roofline.Roofline((kernel,), {}, 0))
    measured = {"loop_fusion_2": 3e-3, "cudnn_kernel": 2e-3} | {f"other.{i}": 1e-4 for i in range(20)}
    found = on_gpu.beside_the_roofline(measured, "text", "NVIDIA H200")
    assert found["seconds"] == pytest.approx(7e-3) and found["of_known_kernels"] == pytest.approx(3e-3)
    assert found["roofline_seconds"] == pytest.approx(2.8e-3)
    first, second, *others = found["largest"]
    assert first["roofline_seconds"] == pytest.approx(2.8e-3) and first["part"] == "SiT" and first["bound"] == "memory"
    assert second == {"name": "cudnn_kernel", "seconds": 2e-3, "roofline_seconds": None} and len(others) == 8
    assert on_gpu.beside_the_roofline(measured, "text", "cpu")["roofline_seconds"] is None
    json.dumps(found)


def test_what_the_tests_report(tmp_path):
    (tmp_path / "tests.xml").write_text("""<testsuites><testsuite>
        <testcase name="a"><properties>
            <property name="q" value="1e-06"/><property name="p" value="3e-06"/>
        </properties></testcase>
        <testcase name="b"><failure message="no"/></testcase><testcase name="c"><skipped/></testcase>
        <testcase name="d"><error/></testcase><testcase name="e"/></testsuite></testsuites>""")
    found = on_gpu.numbers_of_tests(tmp_path / "tests.xml")
    assert found == {"passed": 2, "failed": ["b", "d"], "skipped": ["c"], "largest_errors": {"a p": 3e-06, "a q": 1e-06}}
    assert list(found["largest_errors"]) == ["a p", "a q"]
