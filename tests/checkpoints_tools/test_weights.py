import argparse
import errno
import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import zipfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy
from weight_files import write_torch

from checkpoints_tools import locate, weights
from repae_jax import files

POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12345\n"


@pytest.fixture
def arrays():
    rng = np.random.default_rng(0)
    return {
        "a.weight": rng.standard_normal((3, 4)).astype(np.float32),
        "half": rng.standard_normal((2, 5)).astype(np.float16),
        "counter": np.asarray(7, np.int64),
    }


def assert_same(actual, expected):
    assert set(actual) == set(expected)
    for name, array in expected.items():
        assert actual[name].dtype == array.dtype and actual[name].shape == array.shape, name
        np.testing.assert_array_equal(actual[name], array, err_msg=name)


def test_safetensors_round_trip(tmp_path, arrays):
    arrays["transposed"] = arrays["a.weight"].T  # not contiguous
    arrays["brain"] = arrays["a.weight"].astype(ml_dtypes.bfloat16)
    path = tmp_path / "w.safetensors"
    weights.write_safetensors(path, arrays, {"steps": "400000"})
    assert_same(weights.read_state_dict(path), arrays)
    with safetensors.safe_open(path, "np") as file:
        assert file.metadata() == {"steps": "400000"}


def test_tensors_that_share_memory(tmp_path, torch):
    """keras-hub #3075: safetensors.torch.save_model keeps the second name in the header alone."""
    network = torch.nn.ModuleDict({"a": torch.nn.Linear(2, 2), "b": torch.nn.Linear(2, 2)})
    network["b"].weight = network["a"].weight
    pytest.importorskip("safetensors.torch").save_model(network, tmp_path / "w.safetensors")
    expected = {name: tensor.numpy() for name, tensor in network.state_dict().items()}
    assert_same(weights.read_state_dict(tmp_path / "w.safetensors"), expected)


def test_write_refuses_to_overwrite_and_leaves_nothing_half_written(tmp_path, arrays, monkeypatch):
    path = tmp_path / "w.safetensors"
    weights.write_safetensors(path, arrays)
    with pytest.raises(FileExistsError, match="w.safetensors exists; .*--overwrite"):
        weights.write_safetensors(path, {})
    changed = {**arrays, "counter": np.asarray(8, np.int64)}

    def fail(*_):
        raise OSError("disk full")

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", fail)
        with pytest.raises(OSError, match="disk full"):
            weights.write_safetensors(path, changed, overwrite=True)
    assert_same(weights.read_state_dict(path), arrays)
    weights.write_safetensors(path, changed, overwrite=True)
    assert_same(weights.read_state_dict(path), changed)
    assert [file.name for file in tmp_path.iterdir()] == ["w.safetensors"]


@pytest.mark.parametrize("write", [weights.write_safetensors, write_torch, files.write_json])
def test_no_space_left(tmp_path, monkeypatch, write):
    if write is write_torch:
        pytest.importorskip("torch")
    path = tmp_path / "w"
    path.write_bytes(b"before")

    def full(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match=f"{path} could not be written .*No space left.*nothing was changed there.* GB free"):
        write(path, {}, overwrite=True)
    assert path.read_bytes() == b"before" and list(tmp_path.iterdir()) == [path]


def test_writes_that_really_fail(tmp_path):
    """Files must stay small here, and the three libraries raise three types of error."""
    pytest.importorskip("torch")
    handler, limits = signal.signal(signal.SIGXFSZ, signal.SIG_IGN), resource.getrlimit(resource.RLIMIT_FSIZE)
    big = {"a": np.zeros(10**6)}
    writes = ((weights.write_safetensors, big), (write_torch, big), (files.write_json, {"a": "x" * 10**6}))
    for write, content in writes:
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limits[1]))
        try:
            with pytest.raises(OSError, match=f"{tmp_path / 'w'} could not be written"):
                write(str(tmp_path / "w"), content)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    signal.signal(signal.SIGXFSZ, handler)
    assert list(tmp_path.iterdir()) == []


def full_disk(monkeypatch, successes):
    """os.fsync fails after so many files, as on a disk that is full by then."""
    real, calls = os.fsync, []

    def fsync(descriptor):
        calls.append(descriptor)
        if len(calls) > successes:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        real(descriptor)

    monkeypatch.setattr(os, "fsync", fsync)


@pytest.fixture
def three(tmp_path):
    """Three old files, and what would write new ones."""
    folder = tmp_path / "three"
    folder.mkdir()
    for name in "abc":
        (folder / name).write_text("old")
    return folder, {folder / name: lambda file: file.write_text("new") for name in "abc"}


def contents(folder):
    return {file.name: file.read_text() for file in folder.iterdir()}


def test_files_that_belong_together(three):
    folder, writes = three
    with pytest.raises(FileExistsError, match="three/a, .*three/b, .*three/c exists"):
        files.write_all(writes)
    files.write_all(writes, overwrite=True)
    assert contents(folder) == dict.fromkeys("abc", "new")


@pytest.mark.parametrize("successes", [0, 1, 2])
def test_no_space_for_all_of_several_files(three, monkeypatch, successes):
    folder, writes = three
    full_disk(monkeypatch, successes)
    message = f"three/{'abc'[successes]} could not be written .*No space left.*nothing was changed there"
    with pytest.raises(OSError, match=message):
        files.write_all(writes, overwrite=True)
    assert contents(folder) == dict.fromkeys("abc", "old")


@pytest.mark.parametrize("successes", [0, 1, 2])
def test_killed_while_several_files_appear(three, monkeypatch, successes):
    """Old and new are never mixed."""
    folder, writes = three
    real, calls = os.replace, []

    def replace(*args):
        calls.append(args)
        if len(calls) > successes:
            raise KeyboardInterrupt
        real(*args)

    monkeypatch.setattr(os, "replace", replace)
    with pytest.raises(KeyboardInterrupt):
        files.write_all(writes, overwrite=True)
    assert contents(folder) == [{"a": "old"}, {"a": "new"}, {"a": "new", "b": "new"}][successes]


def test_several_writers_of_one_number(tmp_path):
    """The first processes of containers are all number 1; here all writers have the number of the test."""
    contents = [{"written": [i] * 1000} for i in range(4)]
    with ThreadPoolExecutor(4) as pool:
        for _ in range(20):
            list(pool.map(lambda content: files.write_json(tmp_path / "a.json", content, overwrite=True), contents))
            assert files.read_json(tmp_path / "a.json") in contents
    assert os.listdir(tmp_path) == ["a.json"]


def test_a_folder_in_the_way(three):
    folder, writes = three
    (folder / "c").unlink()
    (folder / "c").mkdir()
    with pytest.raises(OSError, match="three/c could not be written .it is a folder"):
        files.write_all(writes, overwrite=True)
    assert (folder / "a").read_text() == (folder / "b").read_text() == "old"


def test_a_folder_that_does_not_exist(tmp_path):
    with pytest.raises(OSError, match=f"There is no folder {tmp_path / 'no'}: make it first"):
        files.write_json(tmp_path / "no" / "a.json", {})


def test_a_file_that_is_to_be_new(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    assert files.check_new("--out", "~/a.json") == tmp_path / "a.json"
    with pytest.raises(ValueError, match="^--out=~/no/a.json: there is no folder .*/no; make it first$"):
        files.check_new("--out", "~/no/a.json")
    (tmp_path / "a.json").touch()
    with pytest.raises(ValueError, match="^--out=~/a.json exists: choose another name, or move it away$"):
        files.check_new("--out", "~/a.json")


def test_tuples_are_written_as_lists(tmp_path):
    files.write_json(tmp_path / "a.json", {"a": ({"b": (1,)},)})
    assert files.read_json(tmp_path / "a.json") == {"a": [{"b": [1]}]}


def test_files_are_as_readable_as_the_umask_says(tmp_path, arrays):
    before = os.umask(0o022)
    try:
        weights.write_safetensors(tmp_path / "w.safetensors", arrays)
    finally:
        os.umask(before)
    assert (tmp_path / "w.safetensors").stat().st_mode & 0o777 == 0o644


def test_torch_round_trip(tmp_path, arrays):
    torch = pytest.importorskip("torch")
    arrays["transposed"] = arrays["a.weight"].T
    arrays["brain"] = arrays["a.weight"].astype(ml_dtypes.bfloat16)
    content = {"model": arrays, "args": argparse.Namespace(seed=0, names=["a", "b"]), "steps": 7, "betas": (0.9, 0.999)}
    write_torch(tmp_path / "w.pt", content)
    assert_same(weights.read_state_dict(tmp_path / "w.pt", entry="model"), arrays)
    read = weights.read_torch(tmp_path / "w.pt")
    assert read["args"] == {"seed": 0, "names": ["a", "b"]} and read["steps"] == 7 and read["betas"] == (0.9, 0.999)
    loaded = torch.load(tmp_path / "w.pt", weights_only=False)
    assert loaded["model"]["brain"].dtype == torch.bfloat16 and loaded["model"]["counter"].shape == ()


def test_remote_storage(bucket, arrays, tmp_path):
    weights.write_safetensors("gs://bucket/w.safetensors", arrays)
    assert_same(weights.read_state_dict("gs://bucket/w.safetensors"), arrays)
    copies = list((tmp_path / "cache" / "repae_jax").iterdir())
    weights.read_state_dict("gs://bucket/w.safetensors")
    assert list((tmp_path / "cache" / "repae_jax").iterdir()) == copies  # not fetched again
    with pytest.raises(FileExistsError, match="gs://bucket/w.safetensors|w.safetensors exists"):
        weights.write_safetensors("gs://bucket/w.safetensors", arrays)
    arrays["counter"] = np.asarray(9, np.int64)
    arrays["more"] = np.zeros(3, np.float32)
    weights.write_safetensors("gs://bucket/w.safetensors", arrays, overwrite=True)
    assert_same(weights.read_state_dict("gs://bucket/w.safetensors"), arrays)  # not the old copy
    with pytest.raises(FileNotFoundError, match="gs://bucket/nothing.pt does not exist"):
        weights.read_state_dict("gs://bucket/nothing.pt")


def test_several_remote_files(bucket, arrays, three, monkeypatch):
    folder, writes = three
    remote = {f"gs://bucket/{path.name}": write for path, write in writes.items()}
    files.write_all(remote)
    assert contents(bucket) == dict.fromkeys("abc", "new")
    for name in "abc":
        (bucket / name).write_text("old")
    with monkeypatch.context() as patch:
        full_disk(patch, 2)
        with pytest.raises(OSError, match="gs://bucket/c could not be written .*nothing was changed there"):
            files.write_all(remote, overwrite=True)
    assert contents(bucket) == dict.fromkeys("abc", "old")
    real = shutil.copy

    def unreachable(source, target):
        if target.name == "b":
            raise OSError("connection lost")
        real(source, target)

    monkeypatch.setattr(shutil, "copy", unreachable)
    message = "gs://bucket/c, .* could not be put in place .connection lost.; some .* missing .*write them"
    with pytest.raises(OSError, match=message):
        files.write_all(remote | writes, overwrite=True)
    assert contents(bucket) == {"a": "new"} and list(contents(folder)) == []


def test_remote_folder(bucket, arrays):
    (bucket / "model").mkdir()
    with pytest.raises(FileNotFoundError, match="holds no weights"):
        locate.resolve("gs://bucket/model")
    (bucket / "model" / "config.json").write_text("{}")
    safetensors.numpy.save_file(arrays, bucket / "model" / "model.safetensors")
    assert_same(weights.read_state_dict("gs://bucket/model"), arrays)
    assert files.read_json(locate.resolve("gs://bucket/model") / "config.json") == {}


@pytest.mark.parametrize("name", ["pytorch_model.bin", "diffusion_pytorch_model.safetensors"])
def test_other_names_in_folders(tmp_path, arrays, name):
    torch = pytest.importorskip("torch")
    if name.endswith(".bin"):
        torch.save({key: torch.tensor(array) for key, array in arrays.items()}, tmp_path / name)
    else:
        safetensors.numpy.save_file(arrays, tmp_path / name)
    assert_same(weights.read_state_dict(tmp_path), arrays)


def test_hub_files_and_folders(tmp_path, monkeypatch):
    import huggingface_hub

    calls = []

    def download(repository, inside):
        calls.append((repository, inside))
        return str(tmp_path / inside)

    def snapshot(repository, allow_patterns):
        calls.append((repository, allow_patterns[0]))
        (tmp_path / "vae").mkdir(exist_ok=True)
        (tmp_path / "vae" / allow_patterns[-1].rpartition("/")[2].replace("*", "1")).touch()
        return str(tmp_path)

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot)
    assert locate.resolve("REPA-E/sdvae/sdvae-f8d4.pt") == tmp_path / "sdvae-f8d4.pt"
    assert locate.resolve("some/pipeline/vae") == tmp_path / "vae"
    assert calls == [("REPA-E/sdvae", "sdvae-f8d4.pt"), ("some/pipeline", "vae/config.json")]
    with pytest.raises(FileNotFoundError, match="weights/vae.pt does not exist"):
        locate.resolve("weights/vae.pt")


def test_a_published_run_on_the_hub(tmp_path, monkeypatch):
    import huggingface_hub

    asked = []

    def snapshot(repository, allow_patterns):
        asked.append(list(allow_patterns))
        return str(tmp_path)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot)
    assert locate.resolve("REPA-E/sit-repae-sdvae") == tmp_path
    assert len(asked) == 3 and asked[-1] == ["args.json", "checkpoints/*.pt"]


def test_npz(tmp_path, arrays):
    np.savez(tmp_path / "w.npz", **arrays)
    assert_same(weights.read_state_dict(tmp_path / "w.npz"), arrays)


@pytest.fixture
def sharded(tmp_path, arrays):
    weight_map = {name: f"model-{i}.safetensors" for i, name in enumerate(arrays)}
    for name, shard in weight_map.items():
        weights.write_safetensors(tmp_path / shard, {name: arrays[name]})
    files.write_json(tmp_path / "model.safetensors.index.json", {"weight_map": weight_map})
    return tmp_path


def test_hugging_face_folders(sharded, arrays):
    assert_same(weights.read_state_dict(sharded), arrays)
    weights.write_safetensors(sharded / "model.safetensors", {"one": np.zeros(1)})
    assert_same(weights.read_state_dict(sharded), {"one": np.zeros(1)})


def test_shards_of_pytorch(tmp_path, arrays, torch):
    for i, (name, array) in enumerate(arrays.items()):
        torch.save({name: torch.tensor(array)}, tmp_path / f"pytorch_model-{i}.bin")
    weight_map = {name: f"pytorch_model-{i}.bin" for i, name in enumerate(arrays)}
    files.write_json(tmp_path / "pytorch_model.bin.index.json", {"weight_map": weight_map})
    for path in (tmp_path, tmp_path / "pytorch_model.bin.index.json"):
        assert_same(weights.read_state_dict(path), arrays)


def test_missing_shards_are_all_named(sharded):
    for i in (0, 2):
        (sharded / f"model-{i}.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match="lacks model-0.safetensors, model-2.safetensors, named by"):
        weights.read_state_dict(sharded)


def test_shards_without_what_the_index_promises(sharded):
    weights.write_safetensors(sharded / "model-0.safetensors", {"other": np.zeros(1)}, overwrite=True)
    with pytest.raises(ValueError, match="lack a.weight; download"):
        weights.read_state_dict(sharded)


@pytest.mark.parametrize(
    "content, message",
    [
        ('{"weight_map": {"a": "../secret.safetensors"}}', "outside its folder"),
        ("[]", "damaged"),
        ("{", "damaged"),
        ('{"weight_map": {"a": 1, "b": "x", "c": null}}', "model.safetensors.index.json is damaged: .* 1 for a, None for c"),
        ('{"weight_map": {}}', "holds no arrays"),
        ('{"weight_map": {"a": "model.safetensors.index.json"}}', "names model.safetensors.index.json; allowed endings"),
    ],
)
def test_bad_index(tmp_path, content, message):
    (tmp_path / "model.safetensors.index.json").write_text(content)
    with pytest.raises(ValueError, match=message):
        weights.read_state_dict(tmp_path)


def test_folder_without_weights(tmp_path):
    (tmp_path / "flax_model.msgpack").touch()
    with pytest.raises(FileNotFoundError, match="has none of model.safetensors, .*, but flax_model.msgpack"):
        weights.read_state_dict(tmp_path)


@pytest.mark.parametrize("suffix", [".safetensors", ".npz", ".pt"])
def test_missing_truncated_and_pointer_files(tmp_path, arrays, suffix):
    path = tmp_path / f"w{suffix}"
    with pytest.raises(FileNotFoundError, match="w.* does not exist"):
        weights.read_state_dict(path)
    path.write_text(POINTER)
    with pytest.raises(ValueError, match="w.* Git LFS pointer.*git lfs pull"):
        weights.read_state_dict(path)
    if suffix == ".safetensors":
        safetensors.numpy.save_file(arrays, path)
    elif suffix == ".npz":
        np.savez(path, **arrays)
    else:
        torch = pytest.importorskip("torch")
        torch.save({name: torch.tensor(array) for name, array in arrays.items()}, path)
    content = path.read_bytes()
    for length in (0, 10, len(content) // 2, len(content) - 1):
        path.write_bytes(content[:length])
        with pytest.raises(ValueError, match="w.* damaged"):
            weights.read_state_dict(path)


def test_unknown_extension(tmp_path):
    (tmp_path / "w.h5").touch()
    with pytest.raises(ValueError, match="'.h5'; allowed: .safetensors, .npz, .pt"):
        weights.read_state_dict(tmp_path / "w.h5")


def test_entry_is_for_pytorch_files(tmp_path, arrays):
    np.savez(tmp_path / "w.npz", **arrays)
    with pytest.raises(ValueError, match="entry='ema' is for .pt"):
        weights.read_state_dict(tmp_path / "w.npz", entry="ema")


class Payload:
    """Creates a file when unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


def test_malicious_files_are_refused_and_not_run(tmp_path):
    trace = tmp_path / "payload_ran"
    np.savez(tmp_path / "w.npz", a=np.array([Payload(trace)], dtype=object))
    with pytest.raises(ValueError, match="w.npz holds Python objects"):
        weights.read_state_dict(tmp_path / "w.npz")
    torch = pytest.importorskip("torch")
    for zipped in (True, False):
        torch.save({"a": Payload(trace)}, tmp_path / "w.pt", _use_new_zipfile_serialization=zipped)
        with pytest.raises(ValueError, match="w.pt .* more than arrays.*nothing was run"):
            weights.read_state_dict(tmp_path / "w.pt")
    assert not trace.exists()
    np.load(tmp_path / "w.npz", allow_pickle=True)["a"]
    assert trace.exists(), "the payload itself does not work"


def test_a_refusal_names_what_was_asked_for_and_gives_no_bad_advice(tmp_path, torch):
    for zipped in (True, False):
        torch.save({"a": Payload(tmp_path / "trace")}, tmp_path / "w.pt", _use_new_zipfile_serialization=zipped)
        with pytest.raises(ValueError, match=r"w.pt holds more than arrays: it asks for \w+.mkdir, which could run") as error:
            weights.read_state_dict(tmp_path / "w.pt")
        assert "weights_only" not in str(error.value) and "\n" not in str(error.value)


def test_torchscript(tmp_path, torch):
    with zipfile.ZipFile(tmp_path / "w.pt", "w") as archive:
        for name in ("w/data.pkl", "w/data/0", "w/code/__torch__.py", "w/constants.pkl", "w/version"):
            archive.writestr(name, b"")
    with pytest.raises(ValueError, match="w.pt is a TorchScript archive.* get the state dict, or a .safetensors") as error:
        weights.read_state_dict(tmp_path / "w.pt")
    assert "damaged" not in str(error.value) and "weights_only" not in str(error.value)


@pytest.mark.parametrize("content", [b"hello world\n", b"<html>\n", b"Entry not found", b"\x80\x02.", b"\x80\x02h\x00."])
def test_other_files_that_are_called_pt(tmp_path, torch, content):
    (tmp_path / "x.pt").write_bytes(content)
    with pytest.raises(ValueError, match=r"x.pt .*damaged"):
        weights.read_state_dict(tmp_path / "x.pt")


def test_files_without_arrays(tmp_path):
    np.savez(tmp_path / "w.npz")
    (tmp_path / "w.safetensors").write_bytes((8).to_bytes(8, "little") + b"{}      ")
    for name in ("w.npz", "w.safetensors"):
        with pytest.raises(ValueError, match=f"{name} holds no arrays"):
            weights.read_state_dict(tmp_path / name)


def test_tensors_that_numpy_lacks(tmp_path, torch):
    eight_bits = torch.ones(2).to(torch.float8_e4m3fn)
    for tensor, kind in (
        (eight_bits, "float8_e4m3fn"), (torch.eye(2).to_sparse(), "sparse_coo"), (torch.ones(1, device="meta"), "meta")
    ):  # fmt: skip
        torch.save({"model": {"a.weight": tensor}}, tmp_path / "w.pt")
        with pytest.raises(ValueError, match=f"w.pt: model.a.weight is a tensor that numpy lacks .*{kind}.*float32"):
            weights.read_state_dict(tmp_path / "w.pt")
    header = b'{"a":{"dtype":"F8_E4M3","shape":[2],"data_offsets":[0,2]}}'
    (tmp_path / "w.safetensors").write_bytes(len(header).to_bytes(8, "little") + header + b"00")
    with pytest.raises(ValueError, match=r"w.safetensors: numpy has no such type: a \(F8_E4M3\); allowed: .*Save as F32"):
        weights.read_state_dict(tmp_path / "w.safetensors")


def test_arrays_within_the_command_line(tmp_path, torch):
    content = {"args": argparse.Namespace(scale=np.ones(2), nested=[torch.ones(1)], steps=np.int64(3))}
    write_torch(tmp_path / "w.pt", content)
    args = weights.read_torch(tmp_path / "w.pt")["args"]
    np.testing.assert_array_equal(args["scale"], np.ones(2))
    np.testing.assert_array_equal(args["nested"][0], np.ones(1))
    assert args["steps"] == 3


def test_what_cannot_be_written(tmp_path, torch):
    path = tmp_path / "w"
    for write, content, message in (
        (write_torch, {"args": argparse.Namespace(out=[Path("x")])}, r"w: args.out\[0\] is PosixPath, which could not"),
        (write_torch, {"a": np.ones(1, ml_dtypes.float8_e4m3fn)}, "w: a is ndarray of float8_e4m3fn; allowed: "),
        (weights.write_safetensors, {"args": argparse.Namespace(a=1)}, "w: args is Namespace of object; allowed: "),
        (weights.write_safetensors, {"a": torch.ones(1).bfloat16()}, "w: a is Tensor, no numpy array"),
        (files.write_json, {"args": {"a": np.ones(1)}}, "w: JSON cannot express the content .*ndarray"),
    ):
        with pytest.raises(ValueError, match=message):
            write(path, content)
    with pytest.raises(ValueError, match="w: the header keeps text only; steps is none"):
        weights.write_safetensors(path, {}, {"steps": 3})
    assert not list(tmp_path.iterdir())


def test_npz_of_a_dtype_that_numpy_forgets(tmp_path):
    np.savez(tmp_path / "w.npz", a=np.zeros(3, ml_dtypes.bfloat16))
    with pytest.raises(ValueError, match="dtype of a .* float32"):
        weights.read_state_dict(tmp_path / "w.npz")


@pytest.fixture
def torch():
    return pytest.importorskip("torch")


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize("suffix", [".pt", ".pth", ".pth.tar", ".bin"])
def test_torch_files(tmp_path, arrays, torch, suffix, zipped):
    tensors = {name: torch.tensor(array) for name, array in arrays.items()}
    tensors["transposed"] = tensors["a.weight"].T
    tensors["parameter"] = torch.nn.Parameter(tensors["a.weight"])
    tensors["brain"] = tensors["a.weight"].bfloat16()
    torch.save(tensors, tmp_path / f"w{suffix}", _use_new_zipfile_serialization=zipped)
    a = arrays["a.weight"]
    expected = {**arrays, "transposed": a.T, "parameter": a, "brain": a.astype(ml_dtypes.bfloat16)}
    assert_same(weights.read_state_dict(tmp_path / f"w{suffix}"), expected)


def rewrite(path, target, change=None, **options):
    """The zip archive again, record by record, changed and compressed as asked; checksums fit."""
    with zipfile.ZipFile(path) as archive, zipfile.ZipFile(target, "w", **options) as other:
        for name in archive.namelist():
            content = archive.read(name)
            other.writestr(name, content if change is None else change(name, content))
    return target


@pytest.mark.parametrize("compression", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED])
def test_archives_that_were_packed_again(tmp_path, arrays, torch, compression):
    """torch would map the compressed bytes."""
    torch.save({name: torch.tensor(array) for name, array in arrays.items()}, tmp_path / "w.pt")
    again = rewrite(tmp_path / "w.pt", tmp_path / "again.pt", compression=compression)
    assert_same(weights.read_state_dict(again), arrays)


def test_arrays_of_a_machine_with_the_other_byte_order(tmp_path, torch):
    a = np.arange(5, dtype=np.float32)
    torch.save({"a": torch.tensor(a)}, tmp_path / "w.pt")

    def swapped(name, content):
        if name.endswith("/byteorder"):
            return b"big"
        return np.frombuffer(content, np.float32).byteswap().tobytes() if "/data/" in name else content

    assert_same(weights.read_state_dict(rewrite(tmp_path / "w.pt", tmp_path / "big.pt", swapped)), {"a": a})


def test_every_changed_byte_is_found(tmp_path, torch, warnings):
    """It is one of the arrays, of the pickle, or of a compressed record, where it may also keep zlib from unpacking."""
    path, damaged = tmp_path / "w.pt", tmp_path / "damaged.pt"
    torch.save({"a": torch.arange(1000.0)}, path)
    packed = rewrite(path, tmp_path / "packed.pt", compression=zipfile.ZIP_DEFLATED)
    for file in (path, packed):
        for record in ("data/0", "data.pkl"):
            with zipfile.ZipFile(file) as archive:
                entry = archive.getinfo(next(name for name in archive.namelist() if name.endswith(record)))
            content = bytearray(file.read_bytes())
            length = int.from_bytes(content[entry.header_offset + 26 :][:2], "little")
            extra = int.from_bytes(content[entry.header_offset + 28 :][:2], "little")
            content[entry.header_offset + 30 + length + extra + entry.compress_size // 2] ^= 1
            damaged.write_bytes(content)
            with pytest.raises(ValueError, match=rf"damaged.pt .*record w/{record} .*copy or download it again"):
                weights.read_state_dict(damaged)
    assert not warnings
    torch.serialization.set_crc32_options(False)
    try:
        torch.save({"a": torch.arange(1000.0)}, path)
    finally:
        torch.serialization.set_crc32_options(True)
    assert_same(weights.read_state_dict(path), {"a": np.arange(1000, dtype=np.float32)})
    assert warnings == [f"{path} was written without checksums: whether it is damaged cannot be told"]


@pytest.mark.parametrize("suffix", [".pt", ".npz"])
def test_a_disk_that_fails_is_no_damage(tmp_path, torch, monkeypatch, suffix):
    """Downloading the file again would not help."""
    path = tmp_path / f"a{suffix}"
    if suffix == ".pt":
        torch.save({"a": torch.ones(3)}, path)
    else:
        np.savez(path, a=np.ones(3))

    def fail(*arguments):
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(zipfile.ZipExtFile, "read", fail)
    with pytest.raises(OSError, match=rf"{path} cannot be read .*Input/output error.*run the same command again") as raised:
        weights.read_state_dict(path)
    assert raised.value.errno == errno.EIO


def test_numbers_of_numpy_beside_the_weights(tmp_path, torch):
    """nerfstudio #3702, open_clip #1078: training code that keeps a score so cannot be read by torch.load alone."""
    scores = {"fid": np.float64(2.5), "step": np.int32(7), "best": np.bool_(True), "half": np.float16(0.5)}
    for zipped in (True, False):
        torch.save({"model": {"a": torch.ones(2)}, **scores}, tmp_path / "w.pt", _use_new_zipfile_serialization=zipped)
        read = weights.read_torch(tmp_path / "w.pt")
        assert {name: read[name] for name in scores} == {name: value.item() for name, value in scores.items()}
    for value in (np.str_("x"), np.datetime64("2020-01-01"), np.zeros(1, "i4,f8")[0], np.zeros(1, "i4,O")[0]):
        torch.save({"a": value}, tmp_path / "w.pt")
        with pytest.raises(ValueError, match="w.pt .*more than arrays.*nothing was run"):
            weights.read_torch(tmp_path / "w.pt")


@pytest.mark.parametrize("wrapper", ["state_dict", "model", "ema_model", "module"])
def test_one_wrapper_is_unwrapped(tmp_path, torch, wrapper, warnings):
    content = {wrapper: {"a": torch.ones(2)}, "epoch": 3, "args": argparse.Namespace(lr=1e-4)}
    torch.save(content, tmp_path / "w.pt")
    assert_same(weights.read_state_dict(tmp_path / "w.pt"), {"a": np.ones(2, np.float32)})
    warning = f"{tmp_path / 'w.pt'}: taking its entry 'ema_model', averaged weights"
    assert warnings == ([warning] if wrapper == "ema_model" else [])


@pytest.mark.parametrize(
    "names",
    [
        ("module.a.w", "module.b.w"),
        ("_orig_mod.a.w", "_orig_mod.b.w"),
        ("_orig_mod.module.a.w", "_orig_mod.module.b.w"),
        ("module._orig_mod.a.w", "module._orig_mod.b.w", "n_averaged"),
        ("a._orig_mod.w", "b.w"),
    ],
)
def test_what_wrapped_a_network_leaves_its_names(tmp_path, torch, names, warnings):
    tensors = {name: torch.full((2,), float(i)) for i, name in enumerate(names)}
    torch.save({"state_dict": tensors}, tmp_path / "w.ckpt")
    weights.write_safetensors(tmp_path / "w.safetensors", {name: tensor.numpy() for name, tensor in tensors.items()})
    for file in ("w.ckpt", "w.safetensors"):
        expected = {"a.w": np.zeros(2, np.float32), "b.w": np.ones(2, np.float32)}
        assert_same(weights.read_state_dict(tmp_path / file), expected)
        assert f"{file}: " in warnings[-1] and "in its names is DistributedDataParallel's or torch.compile's" in warnings[-1]


WRAPPED = """
import sys, torch

network = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.BatchNorm1d(2))
compiled, averaged = torch.compile(network), torch.optim.swa_utils.AveragedModel(network)
partly = torch.nn.Sequential(torch.compile(network[0]), network[1])
for i, net in enumerate((network, compiled, averaged, torch.compile(averaged), torch.nn.DataParallel(compiled), partly)):
    torch.save(net.state_dict(), f"{sys.argv[1]}/{i}.pt")
"""


@pytest.mark.slow  # importing torch's compiler takes long
def test_the_names_that_pytorchs_own_wrappers_give(tmp_path):
    # in a process of its own: Triton and TensorFlow have libraries that crash each other
    subprocess.run([sys.executable, "-c", WRAPPED, tmp_path], check=True)
    expected = weights.read_state_dict(tmp_path / "0.pt")
    for i in range(1, 6):
        assert_same(weights.read_state_dict(tmp_path / f"{i}.pt"), expected)


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (("module.a", "b"), r"w.npz: 1 names begin with module., 1 do not \(b\): it mixes"),
        (("_orig_mod.a", "a"), r"1 names begin with _orig_mod., 1 do not \(a\)"),
        (("module.a", "module._orig_mod.b"), r"1 names begin with module._orig_mod., 1 do not \(module.a\)"),
        (("a._orig_mod.w", "a.w"), "with and without torch.compile's _orig_mod"),
    ],
)
def test_names_with_and_without_wrapper(tmp_path, names, message):
    np.savez(tmp_path / "w.npz", **dict.fromkeys(names, np.ones(1)))
    with pytest.raises(ValueError, match=message):
        weights.read_state_dict(tmp_path / "w.npz")


def test_several_state_dicts_need_an_entry(tmp_path, torch):
    path = tmp_path / "w.pt"
    torch.save({"model": {"a": torch.ones(2)}, "ema": {"a": torch.zeros(2)}, "steps": 3}, path)
    with pytest.raises(ValueError, match=r"no single state dict in it; choose an entry of \['ema', 'model'\]; torch.save\("):
        weights.read_state_dict(path)
    with pytest.raises(ValueError, match=r"no state dict 'vae' in it; choose an entry of \['ema', 'model'\]"):
        weights.read_state_dict(path, entry="vae")
    assert_same(weights.read_state_dict(path, entry="ema"), {"a": np.zeros(2, np.float32)})


@pytest.mark.parametrize("content", [[1, 2], {"steps": 3}, {}])
def test_torch_file_without_state_dict(tmp_path, torch, content):
    torch.save(content, tmp_path / "w.pt")
    with pytest.raises(ValueError, match="holds no state dict"):
        weights.read_state_dict(tmp_path / "w.pt")


def test_torch_missing(tmp_path, monkeypatch):
    (tmp_path / "w.pt").touch()
    monkeypatch.setitem(sys.modules, "torch", None)
    with pytest.raises(ImportError, match=r"pip install repae_jax\[torch\]"):
        weights.read_state_dict(tmp_path / "w.pt")


def test_resolve_prefers_local_paths(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "org" / "name").mkdir(parents=True)
    assert locate.resolve("org/name").samefile(tmp_path / "org" / "name")
    with pytest.raises(FileNotFoundError, match="no hub name"):
        locate.resolve("./missing/folder")


def test_resolve_uses_the_cache_when_offline(tmp_path, monkeypatch):
    constants = pytest.importorskip("huggingface_hub.constants")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(FileNotFoundError, match="organisation/nothing is no local path .*HF_HUB_OFFLINE.*hf download"):
        locate.resolve("organisation/nothing")
    commit = "0" * 40
    model = tmp_path / "models--organisation--name"
    snapshot = model / "snapshots" / commit
    snapshot.mkdir(parents=True)
    (model / "refs").mkdir()
    (model / "refs" / "main").write_text(commit)
    (snapshot / "config.json").write_text('{"model_type": "dinov2"}')
    assert locate.resolve("organisation/name").samefile(snapshot)
    assert files.read_json(locate.resolve("organisation/name") / "config.json") == {"model_type": "dinov2"}


@pytest.mark.parametrize("content, message", [(POINTER, "Git LFS"), ("{", "damaged"), (json.dumps([1]), "no JSON object")])
def test_bad_config(tmp_path, content, message):
    with pytest.raises(FileNotFoundError, match="config.json does not exist"):
        files.read_json(tmp_path / "config.json")
    (tmp_path / "config.json").write_text(content)
    with pytest.raises(ValueError, match=message):
        files.read_json(tmp_path / "config.json")
