"""Reading caches of latents: joined with their images, refused for another run, damage found."""

import itertools
import json
import pickle

import numpy as np
import pytest
from absl import logging
from caches import Pictures, encode, encode_both, make_cache

from repae_jax.data.latents import CachedLatents, WithMoments, check_cache
from repae_jax.data.loader import Loader


@pytest.fixture
def cache_folder(tmp_path):
    make_cache(tmp_path / "cache", Pictures(20))
    return tmp_path / "cache"


def change(file, at, new):
    """Overwrites bytes of a file."""
    content = bytearray(file.read_bytes())
    content[at : at + len(new)] = new
    file.write_bytes(content)


# ---- reading --------------------------------------------------------------------------------------------------------


def test_round_trip(cache_folder):
    source, cache = Pictures(20), CachedLatents(cache_folder)
    assert len(cache) == 20 and cache.num_classes == 10 and cache.image_size == 4
    assert cache.latent_shape == (2, 2, 2) and not cache.flips
    assert cache.fingerprint == "0123456789abcdef" and cache.vae == "vae.pt"
    assert cache.labels.dtype == np.int32 and cache.labels.tolist() == source.labels.tolist()
    for i in (7, 8, 0, 19, 3):  # any order, all shards
        assert cache[i]["moments"].dtype == np.float32 and cache[i]["label"] == source.labels[i]
        np.testing.assert_array_equal(cache[i]["moments"], encode(source.pixels[i : i + 1])[0])
    with pytest.raises(IndexError):
        cache[20]


def test_flips_are_the_mirrored_image(tmp_path):
    source = Pictures(20)
    make_cache(tmp_path / "cache", source, flips=True)
    cache = CachedLatents(tmp_path / "cache")
    assert cache.flips and cache[11]["moments"].shape == (2, 2, 2, 4)
    for i in range(20):
        np.testing.assert_array_equal(cache[i]["moments"], encode_both(source.pixels[i : i + 1])[0])
        np.testing.assert_array_equal(cache[i]["moments"][1], encode(source.pixels[i : i + 1, :, ::-1])[0])


def test_more_shards_than_are_kept_open(tmp_path, monkeypatch):
    monkeypatch.setattr("repae_jax.data.shards._OPEN_SHARDS", 2)
    make_cache(tmp_path / "cache", Pictures(20), changes={"shard_size": 1})
    cache = CachedLatents(tmp_path / "cache")
    for i in np.random.default_rng(0).integers(0, 20, 100):
        np.testing.assert_array_equal(cache[i]["moments"], encode(Pictures(20).pixels[i : i + 1])[0])


def test_it_survives_pickling(cache_folder):
    cache = CachedLatents(cache_folder)
    cache[0]  # a file is open
    copy = pickle.loads(pickle.dumps(cache))
    np.testing.assert_array_equal(copy[12]["moments"], cache[12]["moments"])
    joined = pickle.loads(pickle.dumps(WithMoments(Pictures(20), cache)))
    np.testing.assert_array_equal(joined[12]["moments"], cache[12]["moments"])


@pytest.mark.parametrize("workers", [0, pytest.param(1, marks=pytest.mark.integration)])
def test_batches_of_a_cache_are_those_of_its_images(cache_folder, workers):
    source = Pictures(20)
    options = {"batch_size": 6, "seed": 3}
    with (
        Loader(source, **options) as images,
        Loader(CachedLatents(cache_folder), workers=workers, **options) as alone,
        Loader(WithMoments(source, CachedLatents(cache_folder)), **options) as joined,
    ):
        for image, moments, both in itertools.islice(zip(images, alone, joined), 8):
            assert moments.keys() == {"moments", "label"} and both.keys() == {"image", "moments", "label"}
            assert moments["moments"].flags.writeable and moments["moments"].dtype == np.float32
            np.testing.assert_array_equal(moments["moments"], encode(image["image"]))
            for field in both:
                np.testing.assert_array_equal(both[field], (image | moments)[field])


def test_bad_images_are_replaced_as_without_a_cache(tmp_path, monkeypatch):
    messages = []
    monkeypatch.setattr(logging, "warning", lambda message, *values: messages.append(message % values))
    source = Pictures(20, bad=[6, 7, 19])
    make_cache(tmp_path / "cache", source)
    cache = CachedLatents(tmp_path / "cache")
    options = {"batch_size": 5, "seed": 1, "max_bad_fraction": 0.15}
    messages.clear()
    with (
        Loader(source, **options) as images,
        Loader(cache, **options) as alone,
        Loader(WithMoments(source, cache), **options) as joined,
    ):
        for image, moments, both in itertools.islice(zip(images, alone, joined), 10):
            np.testing.assert_array_equal(moments["moments"], encode(image["image"]))
            for field in both:
                np.testing.assert_array_equal(both[field], (image | moments)[field])
        assert images.state() == alone.state() == joined.state()
    assert any("#7 (picture-7): ValueError: the image could not be decoded when the cache" in text for text in messages)
    with pytest.raises(RuntimeError, match="of 20 records .* cannot be decoded, 2 are allowed"):
        list(itertools.islice(Loader(cache, batch_size=5, seed=1, max_bad_fraction=0.1), 10))


# ---- other runs -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("images", "message"),
    [
        (Pictures(21), "made from 20 images, config.data has 21"),
        (Pictures(20, label_shift=1), "other labels in 20 places, first picture-0: 0 there, 1 here, picture-1: 1 there"),
        (Pictures(20, name="photo"), "made from images with other names"),
    ],
)
def test_other_images_are_refused(cache_folder, images, message):
    with pytest.raises(ValueError, match=f"{message}.*cache_latents` with its config and another --out"):
        WithMoments(images, CachedLatents(cache_folder))


def test_other_sizes_are_refused(cache_folder):
    images = Pictures(20)
    images.image_size = 8
    with pytest.raises(ValueError, match="made from 4 pixels on a side, config.data has 8"):
        WithMoments(images, CachedLatents(cache_folder))


def test_other_vaes_are_refused(cache_folder):
    cache = CachedLatents(cache_folder)
    check_cache(cache, "0123456789abcdef", (2, 2, 2), 4)
    another = r"another VAE \(fingerprint 0123456789abcdef, from 'vae.pt'; this run's has fedcba9876543210\)"
    with pytest.raises(ValueError, match=rf"{another}; make one for this run: `python -m repae_jax.cache_latents`"):
        check_cache(cache, "fedcba9876543210", (2, 2, 2), 4)
    with pytest.raises(
        ValueError, match=rf"{another} and latents of shape \(2, 2, 2\) \(this run's: \(1, 1, 4\)\) and an image"
    ):
        check_cache(cache, "fedcba9876543210", [1, 1, 4], 2)


# ---- damage ---------------------------------------------------------------------------------------------------------


def test_no_cache(tmp_path):
    with pytest.raises(ValueError, match="no cache of latents at .*make one with `python -m repae_jax.cache_latents --out"):
        CachedLatents(tmp_path / "nothing")
    with pytest.raises(ValueError, match="has no manifest.json: it is no cache of latents, or an unfinished one"):
        CachedLatents(tmp_path)


def test_a_damaged_shard_is_named(cache_folder):
    file = cache_folder / "shard-00001.array_record"
    whole = file.read_bytes()
    for content, message in (
        (whole[:-1], f"1 of 3 shards, first {file.name}: {len(whole) - 1} bytes instead of {len(whole)}"),
        (None, f"{file.name}: missing"),
    ):
        file.unlink()
        if content:
            file.write_bytes(content)
        else:
            assert not file.exists()
        with pytest.raises(ValueError, match=f"{message}; run .* again .*, which makes damaged parts anew"):
            CachedLatents(cache_folder)
        file.write_bytes(whole)
    CachedLatents(cache_folder)


def test_a_changed_byte_is_found_by_reading(cache_folder):
    file = cache_folder / "shard-00001.array_record"
    content = encode(Pictures(20).pixels[10:11]).tobytes()
    at = file.read_bytes().index(content)
    change(file, at + 17, bytes([content[17] ^ 1]))
    cache = CachedLatents(cache_folder)
    for i in set(range(20)) - {10}:
        np.testing.assert_array_equal(cache[i]["moments"], encode(Pictures(20).pixels[i : i + 1])[0])
    with pytest.raises(ValueError, match="record 2 of .*shard-00001.array_record is damaged .*hash mismatch.*run .* again"):
        cache[10]


def test_damaged_labels(cache_folder):
    change(cache_folder / "labels.npy", -4, b"\7\0\0\0")
    with pytest.raises(ValueError, match="labels.npy has another checksum than when it was written; run .* again"):
        CachedLatents(cache_folder)
    (cache_folder / "labels.npy").unlink()
    with pytest.raises(ValueError, match="labels.npy is missing"):
        CachedLatents(cache_folder)


def test_damaged_manifests(cache_folder):
    file = cache_folder / "manifest.json"
    manifest = json.loads(file.read_text())
    for content, message in (
        (file.read_text()[:100], "manifest.json is damaged .* again"),
        ("[]", "manifest.json is damaged"),
        (json.dumps(manifest | {"format": 2}), "is of format 2, this code reads 1: make the cache of latents again"),
    ):
        file.write_text(content)
        with pytest.raises(ValueError, match=message):
            CachedLatents(cache_folder)
