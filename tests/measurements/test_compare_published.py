"""The parts of measurements/compare_published.py that do not need the published code."""

import json

import compare_published
import pytest


def checkout(folder, without=()):
    for name in compare_published.FILES:
        if name not in without:
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).touch()
    return folder


def test_ratio_is_taken_within_each_repeat():
    # the machine was half as quick in the second repeat, which says nothing about either side
    seconds = {"published": [2.0, 4.0, 3.0], "ours": [1.0, 2.0, 2.0]}
    result = compare_published.summarize(seconds, 8)
    assert result["ratio"] == {"median": 2.0, "low": 1.5, "high": 2.0, "repeats": 3}
    assert (result["published"], result["ours"]) == (8 / 3, 4.0)


def test_both_clocks_start_and_stop_when_nothing_is_left_to_do(monkeypatch):
    """A device that takes a second per step, and a host that takes half a second to dispatch one."""
    now, busy_until = [0.0], [0.0]

    def step():
        now[0] += 0.5
        busy_until[0] = max(busy_until[0], now[0]) + 1
        return busy_until[0]

    def wait(losses):
        now[0] = max(now[0], losses)

    monkeypatch.setattr(compare_published.time, "perf_counter", lambda: now[0])
    assert compare_published.time_steps(step, wait, 4) == 4.5 / 4


def test_networks_of_other_sizes_are_refused():
    counts = {"vae": 1000, "sit": 2000}
    compare_published.check_parameters(counts, {"vae": 1009, "sit": 1981})
    with pytest.raises(ValueError, match=r"more than 1% in parameters: vae \(1,000 published, 1,011 ours\)$"):
        compare_published.check_parameters(counts, {**counts, "vae": 1011})
    for missing in ({"vae": 1000}, {**counts, "disc": 1}):
        with pytest.raises(ValueError, match=r"(sit \(2,000 published, 0 ours\)|disc \(0 published, 1 ours\))"):
            compare_published.check_parameters(counts, missing)


def test_losses_of_another_size_are_refused():
    losses = {"l1": 0.5, "kl": 1000.0, "hinge": 1.0, "velocity": 2.0}
    compare_published.check_losses(losses, {**losses, "kl": 101.0, "l1": 4.9})
    with pytest.raises(ValueError, match=r"factor of 10: kl \(1000 published, 99 ours\); velocity \(2 .* 21 ours\)$"):
        compare_published.check_losses(losses, {**losses, "kl": 99.0, "velocity": 21.0})


@pytest.mark.parametrize("size", compare_published.SIZES)
def test_sizes(size):
    config = compare_published.config_of(size, None)
    assert config["data"]["batch_size"] == 8 and config["precision"]["compute"] == "float32"
    assert compare_published.config_of(size, 3)["data"]["batch_size"] == 3
    published = compare_published.config_of("sit=B/1,vae=f16d32", None)
    assert (published["data"]["batch_size"], published["sit"]["hidden_size"]) == (32, 768)


def test_mistakes_end_before_anything_runs(tmp_path, monkeypatch):
    def error_of(*arguments):
        monkeypatch.setattr("sys.argv", ["compare_published.py", *map(str, arguments)])
        with pytest.raises(SystemExit) as caught:
            compare_published.main()
        return str(caught.value.code)

    monkeypatch.setattr(compare_published, "Side", None)
    folder, exists = checkout(tmp_path / "whole"), tmp_path / "exists.json"
    exists.touch()
    part = checkout(tmp_path / "part", without=("models/sit.py", "loss/lpips.py"))
    assert "lacks loss/lpips.py, models/sit.py; give a checkout of" in error_of("--published", part)
    assert f"--json={exists} exists" in error_of("--published", folder, "--json", exists)
    assert "there is no folder" in error_of("--published", folder, "--json", tmp_path / "no" / "file.json")
    assert "SiT size 'XXL' is unknown" in error_of("--published", folder, "--sizes", "conv", "sit=XXL/2")
    assert "'convv' in 'convv' is unknown" in error_of("--published", folder, "--sizes", "convv")


def test_what_was_measured_before_a_failure_is_kept(tmp_path, monkeypatch):
    def fail_at_the_second(size, *_):
        if size == "transformer":
            raise RuntimeError("out of memory")
        return {"ours": 1.0}

    monkeypatch.setattr(compare_published, "compare", fail_at_the_second)
    given = ["--published", str(checkout(tmp_path)), "--json", str(tmp_path / "x.json")]
    with pytest.raises(RuntimeError, match="out of memory"):
        compare_published.run(compare_published.parse_args(given), lambda line: None)
    assert json.loads((tmp_path / "x.json").read_text())["sizes"] == {"conv": {"ours": 1.0}}
    monkeypatch.setattr(compare_published, "compare", lambda size, *_: size)
    lines, given[-1] = [], str(tmp_path / "y.json")
    result = compare_published.run(compare_published.parse_args(given), lines.append)
    assert json.loads((tmp_path / "y.json").read_text()) == result and lines == [f"all numbers: {tmp_path}/y.json"]
    assert list(result["sizes"]) == ["conv", "transformer"]


def test_defaults_follow_the_device():
    def defaults(*arguments):
        options = compare_published.parse_args(["--published", "x", *arguments])
        return options.published_precision, options.compile, options.steps

    assert defaults() == ("float32", False, 3) and defaults("--compile", "--steps=5") == ("float32", True, 5)
    assert defaults("--device", "cuda") == ("bfloat16", True, 20)


def test_numbers_must_be_whole(capsys):
    for value, problem in (("0", "0 must be at least 1"), ("-1", "-1 must be at least 1"), ("1.5", "'1.5' is no whole number")):
        with pytest.raises(SystemExit):
            compare_published.parse_args(["--published", "x", f"--steps={value}"])
        assert f"error: argument --steps: {problem}" in capsys.readouterr().err


def test_a_failing_process_is_told(tmp_path):
    options = compare_published.parse_args(["--published", str(tmp_path)])
    config = compare_published.config_of("conv", 1)
    config["encoders"]["target"]["architecture"]["hidden_size"] = 7
    message = "the published step failed: .*hidden_size 7 is not divisible by num_heads 3"
    with compare_published.Side("published", config, options) as side, pytest.raises(RuntimeError, match=message):
        side.receive()
