"""A few of the trials of measurements/kill_trials.py."""

import kill_trials
import numpy as np
import pytest


@pytest.mark.slow
def test_killed_runs_end_as_if_nothing_had_happened(tmp_path, compiled):
    lines = []
    moments = kill_trials.run("ldm", 24, 1, 0, tmp_path, compiled, lines.append, most=3)
    assert set(moments) - {"before the first checkpoint"}, "no run was continued"
    assert moments.total() >= 1 and len(lines) == 1 and "equal" in lines[0]


def test_differences_are_found():
    def left(value=1.0, position=8, losses=((1, 0.5), (2, 0.25))):
        lines = [{"step": step, "loss": loss} for step, loss in losses]
        return {"kernel": np.float32([value])}, ({"next_batch": position}, 2, [2]), lines

    kill_trials.check(left(), left(), "trial 0")
    for other, message in [
        (left(value=np.nextafter(np.float32(1), np.float32(2))), "differs in .'kernel'."),
        (left(position=9), "checkpoints .*9"),
        (left(losses=((1, 0.5), (1, 0.5), (2, 0.25))), r"a gap or a duplicate: \[1, 1, 2\]"),
        (left(losses=((2, 0.25),)), r"a gap or a duplicate: \[2\]"),
        (left(losses=((1, 0.5), (2, 0.26))), "metrics of step 2 differ"),
    ]:
        with pytest.raises(AssertionError, match=f"trial 0: .*{message}"):
            kill_trials.check(other, left(), "trial 0")
