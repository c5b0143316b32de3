"""Names and places of workdirs that are taken, and that are refused."""

import argparse
from pathlib import Path

import pytest

from repae_jax import buckets, cli
from repae_jax.training.workdir import prepare_workdir


def test_prepare_workdir_creates_it(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    path = prepare_workdir("a/b")
    assert Path(path) == tmp_path / "a" / "b"
    assert list((tmp_path / "a" / "b").iterdir()) == []
    prepare_workdir(path)


@pytest.mark.parametrize("name", ["file", "file/below"])
def test_prepare_workdir_refuses_a_file(tmp_path, name):
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="cannot be written to.*give a folder"):
        prepare_workdir(tmp_path / name)


@pytest.mark.parametrize("path", ["/proc/run", "/proc"])
def test_prepare_workdir_refuses_an_unwritable_place(path):
    with pytest.raises(ValueError, match="/proc.*cannot be written to"):
        prepare_workdir(path)


@pytest.mark.parametrize(("name", "message"), [("", "is empty"), ("gs:/bucket/run", "an address has two slashes")])
def test_prepare_workdir_refuses_what_is_no_name(name, message):
    with pytest.raises(ValueError, match=message):
        prepare_workdir(name)


def test_the_parent_of_a_link_is_where_the_link_leads(tmp_path):
    (tmp_path / "far" / "away").mkdir(parents=True)
    (tmp_path / "link").symlink_to(tmp_path / "far" / "away")
    assert Path(prepare_workdir(tmp_path / "link" / ".." / "run")) == tmp_path / "far" / "run"
    assert Path(prepare_workdir(tmp_path / "link" / "run")) == tmp_path / "link" / "run"


@pytest.mark.parametrize("name", ["[lr=1e-4]", "a[1", "a*b", "a?b", "a\\b", "below/[x]/run"])
def test_prepare_workdir_refuses_names_that_lose_checkpoints(tmp_path, name):
    with pytest.raises(ValueError, match="take .* for a pattern; give a path without them, for instance '[^[*?]*'"):
        prepare_workdir(tmp_path / name)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(("name", "message"), [("\udcff", "not UTF-8"), ("/".join(["x" * 200] * 19), "bytes long, of 3800")])
def test_prepare_workdir_refuses_names_that_nothing_can_be_saved_under(tmp_path, name, message):
    with pytest.raises(ValueError, match=message):
        prepare_workdir(tmp_path / name)
    assert not list(tmp_path.iterdir())


def test_without_the_client_that_reaches_buckets(monkeypatch, tmp_path):
    monkeypatch.setattr(buckets.importlib.util, "find_spec", lambda name: None)
    line = "gs://bucket/run: buckets are reached by TensorFlow's client, which is not installed: pip install -e .[gcs]"
    with pytest.raises(ImportError) as caught:
        prepare_workdir("gs://bucket/run")
    assert str(caught.value) == line
    with pytest.raises(argparse.ArgumentTypeError) as caught:
        cli.path("gs://bucket/run")
    assert str(caught.value) == line
    with pytest.raises(ImportError), buckets.reached("gs://bucket/run"):
        pytest.fail("it is not tried")
    prepare_workdir(tmp_path / "run")
    with buckets.reached(tmp_path):
        pass
