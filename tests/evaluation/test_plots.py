import json

import numpy as np
import pytest
from PIL import Image

from repae_jax.evaluation import plots


def write_metrics(path, last=""):
    lines = [{"step": i, "time": 1e9 + i, "vae/l1": 1 / (i + 1), "sit/velocity": 2.0} for i in range(50)]
    lines[7]["vae/l1"], lines[8]["vae/l1"] = "nan", "inf"
    lines.append({"step": 49, "time": 2e9, "fid": 3.5})  # one point, as a hook writes
    path.write_text("".join(json.dumps(line) + "\n" for line in lines) + last)
    return path


@pytest.mark.parametrize("last", ["", '{"step": 50, "ti'])  # the second: a run that still writes
def test_plot_curves(tmp_path, last):
    metrics = write_metrics(tmp_path / "metrics.jsonl", last)
    groups = {"VAE": ["vae/l1"], "SiT": ["sit/velocity", "vae/l1"], "Quality": ["fid"], "Again": ["fid"]}
    plots.plot_curves(metrics, tmp_path / "curves.png", groups)
    pixels = np.asarray(Image.open(tmp_path / "curves.png").convert("RGB"))
    assert pixels.shape[0] > 500 and pixels.shape[1] > 1000
    assert len(np.unique(pixels.reshape(-1, 3), axis=0)) > 50
    assert sorted(path.name for path in tmp_path.iterdir()) == ["curves.png", "metrics.jsonl"]


def test_plot_curves_errors(tmp_path):
    metrics = write_metrics(tmp_path / "metrics.jsonl")
    with pytest.raises(ValueError, match="no metric vae/kl; allowed: fid, sit/velocity, vae/l1"):
        plots.plot_curves(metrics, tmp_path / "curves.png", {"VAE": ["vae/l1", "vae/kl"]})
    with pytest.raises(ValueError, match="groups is empty"):
        plots.plot_curves(metrics, tmp_path / "curves.png", {})
    metrics.write_text("{broken\n" + metrics.read_text())
    with pytest.raises(ValueError, match="line 1 is no JSON"):
        plots.plot_curves(metrics, tmp_path / "curves.png", {"VAE": ["vae/l1"]})


def test_moving_average():
    np.testing.assert_allclose(plots.moving_average(np.full(100, 3.0)), 3)
    np.testing.assert_array_equal(plots.moving_average([1.0, 5.0, np.nan]), [1, 5, np.nan])  # short: as it is
    values = np.arange(80.0)
    values[10] = np.nan
    averaged = plots.moving_average(values)
    assert averaged[40] == 40 and averaged[0] == 1 and averaged[10] == 10


def test_label_rows():
    images = np.stack([np.full((4, 4, 3), 10 * i, np.uint8) for i in range(4)])
    picture = plots.label_rows(images, [7, 2, 7, 2], scale=2)
    assert picture.shape == (2 * 10 + 2, 2 * 10 + 2, 3)
    assert picture[2::10, 2::10, 0].tolist() == [[10, 30], [0, 20]]
    uneven = plots.label_rows(images[:3], [0, 1, 1], scale=1)
    assert uneven[2::6, 2::6, 0].tolist() == [[0, 255], [10, 20]]
    with pytest.raises(ValueError, match=r"4 images and labels of shape \[3\]"):
        plots.label_rows(images, [1, 2, 3])


def read(path):
    return np.asarray(Image.open(path).convert("RGB"))


def test_pca_colors():
    latents = np.random.default_rng(0).gamma(2.0, size=(2, 4, 4, 5))
    colors = plots.pca_colors(latents)
    assert colors.shape == (2, 4, 4, 3) and colors.dtype == np.uint8
    assert colors.min(axis=(0, 1, 2)).tolist() == [0] * 3 and colors.max(axis=(0, 1, 2)).tolist() == [255] * 3
    np.testing.assert_array_equal(plots.pca_colors(3 * latents[..., ::-1] + 1), colors)  # whatever order, scale and offset
    assert not plots.pca_colors(np.full((1, 2, 2, 4), 7.0)).any()
    with pytest.raises(ValueError, match="C >= 3"):
        plots.pca_colors(np.zeros((1, 2, 2, 2)))


def test_rows_lines_channels_and_bars(tmp_path):
    small, large = np.zeros((3, 4, 4, 3), np.uint8), np.full((3, 32, 32, 3), 255, np.uint8)
    plots.show_rows(tmp_path / "rows.png", {"latents": small, "images": large, "missing": "two channels"})
    lines = {"a": ([1, 2, 3], [1.0, 0.5, 0.25]), "b": ([1, 2, 3], [1, None, 0.5], {"linestyle": "--"})}
    reference = ("images", [1, 2, 3], [1, 0.1, 0.01])
    plots.plot_lines(tmp_path / "lines.png", {"one": lines, "two": lines}, "x", ["y", "z"], log_scale=True, reference=reference)
    shares = np.array([[0.5, 0.5], [0.0, 0.0]])  # the second channel: all values lie outside
    panel = {"edges": [0, 1, 2], "shares": shares, "median": [1, 1], "low": [0, 0], "high": [2, 2]}
    plots.plot_channels(tmp_path / "channels.png", {"a": panel, "b": panel, "c": panel})
    plots.plot_bars(tmp_path / "bars.png", {"error": {"scale": [0.5, np.nan], "turn": [0.1, 0.2]}}, ["a", "b"])
    for name in ("rows", "lines", "channels", "bars"):
        pixels = read(tmp_path / f"{name}.png")
        assert min(pixels.shape[:2]) > 200 and len(np.unique(pixels.reshape(-1, 3), axis=0)) > 10, name


def test_nothing_to_draw(tmp_path):
    path = tmp_path / "x.png"
    for draw in (
        lambda: plots.show_rows(path, {}),
        lambda: plots.plot_lines(path, {}, "x", []),
        lambda: plots.plot_channels(path, {}),
        lambda: plots.plot_bars(path, {}, ["a"]),
    ):
        with pytest.raises(ValueError, match="allowed: at least one"):
            draw()
    assert not path.exists()
