"""Statistics of real images: from ADM's files, from ours, and what is wrong with others."""

import dataclasses
import json

import numpy as np
import pytest
from feature_stub import Noise, StubNetwork

from repae_jax.evaluation import inception_features, reference_stats
from repae_jax.evaluation.image_sets import dataset_images
from repae_jax.evaluation.reference_stats import (
    KEPT_IMAGES,
    PUBLISHED_COUNT,
    count_warnings,
    measure_reference,
    read_reference,
    write_reference,
)
from repae_jax.metrics.frechet import gaussian_stats

COUNT = 50


@pytest.fixture(autouse=True)
def short(monkeypatch):
    monkeypatch.setattr(inception_features, "PART_SIZE", 16)
    monkeypatch.setattr(reference_stats, "KEPT_IMAGES", 20)


@pytest.fixture
def features():
    return StubNetwork(COUNT)(Noise(COUNT).pixels)


def stats(features):
    (mu, sigma), (mu_s, sigma_s) = gaussian_stats(features.pool), gaussian_stats(features.spatial)
    return {"mu": mu, "sigma": sigma, "mu_s": mu_s, "sigma_s": sigma_s}


def measured(folder, count=COUNT, **options):
    return measure_reference(dataset_images(Noise(count), {"data": "noise"}), StubNetwork(), folder, **options)


def test_measured(tmp_path, features):
    reference, _ = measured(tmp_path)
    expected = stats(features)
    for actual, name in zip((*reference.pool, *reference.spatial), expected, strict=True):
        np.testing.assert_allclose(actual, expected[name], rtol=1e-10, atol=1e-14)
    assert reference.features.shape == (20, 6)
    rows = {row.tobytes() for row in features.pool}
    assert {row.tobytes() for row in reference.features} <= rows and len(np.unique(reference.features, axis=0)) == 20
    assert reference.description["count"] == COUNT and reference.shape == [4, 4]


def test_written_and_read(tmp_path):
    reference, parts = measured(tmp_path / "parts", keep_images=True)
    path = tmp_path / "ours.npz"
    write_reference(path, reference, parts)
    back = read_reference(path, StubNetwork())
    for actual, expected in zip((*back.pool, *back.spatial), (*reference.pool, *reference.spatial), strict=True):
        np.testing.assert_array_equal(actual, expected)
    np.testing.assert_array_equal(back.features, reference.features)
    assert back.shape == [4, 4] and back.images is None
    source = {"data": "noise", "images": COUNT, "image_size": 4}
    assert source.items() <= back.description["source"].items() and len(back.description["checksum"]) == 16
    with np.load(path) as archive:  # as ADM's evaluator does, pickle not allowed
        assert set(archive) == {"arr_0", "mu", "sigma", "mu_s", "sigma_s", "pool", "about"}
        np.testing.assert_array_equal(StubNetwork(20)(archive["arr_0"]).pool, reference.features)
    with pytest.raises(FileExistsError, match="ours.npz exists"):
        write_reference(path, reference, parts)


def test_few_images_are_all_kept(tmp_path):
    assert len(measured(tmp_path, count=7)[0].features) == 7
    with pytest.raises(ValueError, match="features of 1 images; a covariance needs 2"):
        measured(tmp_path / "one", count=1)


def test_adms_file(tmp_path, features):
    pixels = Noise(COUNT).pixels
    np.savez(tmp_path / "adm.npz", arr_0=pixels, **stats(features))
    reference = read_reference(tmp_path / "adm.npz", StubNetwork())
    assert reference.features is None and reference.images.count == COUNT and reference.shape == [4, 4]
    np.savez(tmp_path / "old.npz", mu=stats(features)["mu"], sigma=stats(features)["sigma"])
    reference = read_reference(tmp_path / "old.npz", StubNetwork())
    assert reference.spatial is None and reference.images is None and reference.shape is None


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"mu": None}, "holds sigma, mu_s, sigma_s; needed: mu and sigma.*--make_reference"),
        ({"sigma": np.eye(5)}, r"mu and sigma of .* have shapes \[6\] and \[5, 5\]; needed: \[6\] and \[6, 6\]"),
        ({"mu_s": np.zeros(4)}, r"mu_s and sigma_s .* \[4\]"),
        ({"mu": np.full(6, np.nan)}, "mu or sigma .* is not finite"),
        ({"arr_0": np.zeros((4, 4, 4, 3))}, "arr_0 of .* is float64"),
        ({"mu": np.array([{}] * 6, object)}, "no npz, or it is damaged .*pickle"),
        ({"about": json.dumps({"inception": "0123"})}, "weights of checksum 0123, these have stub"),
        ({"pool": np.zeros((9, 7), np.float32)}, r"pool of .* is float32 \[9, 7\]; needed: floats \[M, 6\]"),
        ({"pool": np.full((9, 6), "a")}, r"pool of .* is <U1 \[9, 6\]; needed: floats \[M, 6\]"),
        ({"mu": np.full(6, "a")}, "no npz, or it is damaged .*could not convert"),
        ({"about": json.dumps(["a"])}, r"about of .* is \['a'\], which does not tell"),
        ({"about": json.dumps({"other": 1})}, "about of .* does not tell"),
        ({"about": "{"}, "no npz, or it is damaged .*JSONDecodeError"),
    ],
)
def test_other_files(tmp_path, features, changes, message):
    arrays = {name: array for name, array in {**stats(features), **changes}.items() if array is not None}
    np.savez(tmp_path / "other.npz", **arrays)
    with pytest.raises(ValueError, match=message):
        read_reference(tmp_path / "other.npz", StubNetwork())


def test_damaged_files(tmp_path, features):
    np.savez(tmp_path / "whole.npz", **stats(features))
    content = (tmp_path / "whole.npz").read_bytes()
    for name, damaged in {"cut": content[: len(content) // 2], "page": b"<html>404</html>", "empty": b""}.items():
        (tmp_path / f"{name}.npz").write_bytes(damaged)
        with pytest.raises(ValueError, match=f"{name}.npz is no npz, or it is damaged or incomplete"):
            read_reference(tmp_path / f"{name}.npz", StubNetwork())
    with pytest.raises(FileNotFoundError, match="absent.npz does not exist"):
        read_reference(tmp_path / "absent.npz", StubNetwork())


def test_what_is_wrong_with_too_few(tmp_path):
    reference, _ = measured(tmp_path)
    (published,) = count_warnings(30, reference)
    assert "of 30 samples; published ones are of 50000" in published
    few = dataclasses.replace(reference, description={**reference.description, "count": 5})
    rank, *_ = count_warnings(30, few)
    assert "features of 5 reference images span at most 4 dimensions, of 6 in FID" in rank
    assert PUBLISHED_COUNT == 50_000 and KEPT_IMAGES == 10_000
