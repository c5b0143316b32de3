"""The beginning and end of commands: unknown words are refused, and errors from outside the program are one line."""

import contextlib
import importlib
import json
import os
import subprocess
import sys
import zipfile
from pathlib import Path
from types import SimpleNamespace

import jax
import pytest
from absl import flags

from repae_jax import cli, ranges, train
from repae_jax.distributed import multihost
from repae_jax.distributed.child_process import Crashed
from repae_jax.job import build

ROOT = Path(__file__).parents[1]
WITH_CONFIG = ["repae_jax.train", "repae_jax.cache_latents", "repae_jax.plan", "repae_jax.benchmark.__main__"]
COMMANDS = [
    *WITH_CONFIG, "repae_jax.sample", "repae_jax.evaluate.__main__", "repae_jax.evaluate_tokenizer",
    "repae_jax.prepare_images", "repae_jax.check_images", "repae_jax.analyze_latents.__main__", "repae_jax.report.__main__",
    "checkpoints_tools.__main__",
]  # fmt: skip
HEAVY = {"torch", "tensorflow", "transformers", "diffusers", "tensorflow_datasets", "sklearn", "matplotlib.pyplot"}


def run(*words, **options):
    """Runs Python on such words, from the root of the repository."""
    return subprocess.run([sys.executable, *map(str, words)], cwd=ROOT, text=True, capture_output=True, timeout=300, **options)


# ---- errors ---------------------------------------------------------------------------------------------------------


def raised(error):
    """Raises an error, and returns it as a main function catches it."""
    try:
        raise error
    except type(error) as caught:
        return caught


def chained(error, cause):
    error.__cause__ = cause
    return error


class ResourceExhaustedError(Exception):
    """Stands for TensorFlow's, which takes seconds to import."""

    __module__ = "tensorflow.python.framework.errors_impl"


class DefaultCredentialsError(Exception):
    """Stands for google.auth's."""

    __module__ = "google.auth.exceptions"


class ClientError(Exception):
    """Stands for botocore's."""

    __module__ = "botocore.exceptions"


OUT_OF_MEMORY = "RESOURCE_EXHAUSTED: Out of memory while trying to allocate 99 bytes.\npages of buffers"


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (ValueError("config.steps=0"), "config.steps=0"),
        (json.JSONDecodeError("Expecting value", "", 0), "Expecting value"),
        (UnicodeDecodeError("utf-8", b"\xff", 0, 1, "invalid start byte"), "invalid start byte"),
        (OSError(28, "No space left on device", "a"), "No space left on device: 'a'"),
        (PermissionError(13, "Permission denied", "a"), "Permission denied: 'a'"),
        (ModuleNotFoundError("No module named 'torch'", name="torch"), "No module named 'torch'"),
        (MemoryError("Unable to allocate 9. GiB"), "the memory of this machine ran out (Unable to allocate 9. GiB)"),
        (jax.errors.JaxRuntimeError(OUT_OF_MEMORY), "99 bytes.): take fewer images at a time"),
        (jax.errors.JaxRuntimeError("UNAVAILABLE: heartbeat\nmore"), "UNAVAILABLE: heartbeat"),
        (RuntimeError("3 of 9 records cannot be decoded"), "3 of 9 records"),
        (train.TrainingStopped("stopped at step 3"), "stopped at step 3"),
        (Crashed("killed by SIGKILL", -9), "killed by SIGKILL"),
        (zipfile.BadZipFile("File is not a zip file"), "BadZipFile: File is not a zip file"),
        (EOFError("arr_0 ends"), "EOFError: arr_0 ends"),
        (ResourceExhaustedError("{{node Flush}} events; No space left on device\n\tFailed"), "error: events; No space left"),
        (DefaultCredentialsError("no credentials"), "DefaultCredentialsError: no credentials"),
        (ClientError("AccessDenied"), "ClientError: AccessDenied"),
        (ExceptionGroup("both", [OSError(28, "No space left on device")]), "No space left on device"),
        (chained(Exception("save failed"), OSError(28, "No space left on device")), "No space left on device"),
        (flags.IllegalFlagValueError("flag --steps=x"), "flag --steps=x"),
        (ValueError(), "ValueError"),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, Exception) else "",
)
def test_errors_from_outside_the_program_end_in_one_line(error, line):
    """Wherever they were raised, in a library or here."""
    with pytest.raises(SystemExit) as caught, cli.ending():
        raise error
    message = caught.value.code
    assert message.startswith("error: ") and line in message and "\n" not in message, message
    assert caught.value.__context__ is error  # other processes get its text, see `multihost.abort_all_on_error`


@pytest.mark.parametrize(
    "error",
    [
        TypeError("unsupported operand"), KeyError("step"), ZeroDivisionError("division by zero"), AttributeError("x"),
        NotImplementedError("later"), RecursionError("too deep"), jax.errors.JaxRuntimeError("INTERNAL: cannot compile"),
        ImportError("cannot import name 'x'", name="repae_jax.job.build"),
        chained(KeyError("a"), IndexError("b")),
    ],
    ids=lambda error: type(error).__name__,
)  # fmt: skip
def test_bugs_keep_their_traceback(error):
    with pytest.raises(type(error)) as caught, cli.ending():
        raise error
    assert "please report it" in caught.value.__notes__[-1]


def test_errors_of_array_libraries_say_how_to_find_their_place():
    with pytest.raises(SystemExit, match=r"error: Incompatible .* \(said by jax; python -X dev shows where\)$"), cli.ending():
        jax.numpy.broadcast_to(jax.numpy.zeros((2, 3)), (4, 4))


def test_ending_is_a_decorator_and_passes_results_on():
    @cli.ending("interrupted: nothing was written")
    def main(error=None):
        if error:
            raise error
        return 3

    assert main() == 3
    with pytest.raises(SystemExit, match="3"):
        main(SystemExit(3))


def test_ctrl_c_ends_quietly(capsys):
    with pytest.raises(SystemExit) as caught, cli.ending("interrupted: nothing was written"):
        raise KeyboardInterrupt
    assert caught.value.code == 130 and capsys.readouterr().err == "interrupted: nothing was written\n"


PRINTING = "from repae_jax import cli\nwith cli.ending():\n    for i in range(COUNT):\n        print('x' * 99)\n"


@pytest.mark.integration
@pytest.mark.parametrize("count", [1, 9999])  # the first is written at the very end
@pytest.mark.parametrize("unbuffered", ["", "1"])
def test_a_closed_output_is_no_error(count, unbuffered):
    reading, writing = os.pipe()
    os.close(reading)
    code = PRINTING.replace("COUNT", str(count))
    environment = {**os.environ, "PYTHONUNBUFFERED": unbuffered}
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=environment, stdout=writing, stderr=subprocess.PIPE)
    os.close(writing)
    assert (done.returncode, done.stderr) == (141, b"")


@pytest.mark.integration
@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs Linux' /dev/full")
@pytest.mark.parametrize("count", [1, 9999])
def test_output_to_a_full_disk_is_an_error(count):
    with open("/dev/full", "w") as full:
        code = PRINTING.replace("COUNT", str(count))
        done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, stdout=full, stderr=subprocess.PIPE)
    assert (done.returncode, done.stderr) == (1, b"error: [Errno 28] No space left on device\n")


@pytest.fixture
def full_disk(tmp_path):
    """A folder with room for a few files, such as the metadata of a checkpoint, and no more."""
    folder = tmp_path / "full"
    folder.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", folder], capture_output=True)
    if mounted.returncode:
        pytest.skip(f"cannot mount a small disk: {mounted.stderr.decode()}")
    yield folder
    subprocess.run(["umount", "-l", folder], check=True)


SAVING = """
import sys
import jax
import numpy as np
from repae_jax import cli
from repae_jax.training.checkpoint import Checkpointer
state = {f"array_{i}": jax.numpy.asarray(np.random.default_rng(i).random(50_000, np.float32)) for i in range(20)}
with cli.ending(), Checkpointer(sys.argv[1]) as checkpointer:
    checkpointer.save(1, state, {}, {"seed": 0})
    checkpointer.wait()
"""


@pytest.mark.integration
def test_a_checkpoint_on_a_full_disk_ends_in_one_line(full_disk):
    done = run("-c", SAVING, full_disk / "run")
    assert done.returncode == 1 and "Traceback" not in done.stderr, done.stderr[-3000:]
    assert done.stderr.splitlines()[-1].startswith("error: ") and "No space left on device" in done.stderr.splitlines()[-1]


@pytest.mark.integration
def test_terminals_of_ascii_alone():
    """In containers without a locale, printing anything else would be an error."""
    code = "from repae_jax import cli\nwith cli.ending():\n    print('1 … 2')"
    done = run("-c", code, env={**os.environ, "PYTHONIOENCODING": "ascii"})
    assert (done.returncode, done.stdout, done.stderr) == (0, "1 ? 2\n", "")


def test_a_broken_pipe_to_a_worker_is_an_error():
    with pytest.raises(SystemExit, match="error: .*Broken pipe"), cli.ending():
        raise BrokenPipeError(32, "Broken pipe")


@pytest.mark.integration
def test_developers_see_every_traceback():
    code = "from repae_jax import cli\nwith cli.ending():\n    raise ValueError('wrong')\n"
    assert run("-c", code).stderr == "error: wrong\n"
    assert "Traceback" in run("-X", "dev", "-c", code).stderr


# ---- options --------------------------------------------------------------------------------------------------------


@pytest.fixture
def parser():
    parser = cli.Parser(prog="it")
    parser.add_argument("--count", type=cli.whole(1))
    parser.add_argument("--share", type=cli.number(ranges.real(0, 1)))
    parser.add_argument("--seed", type=cli.seed)
    parser.add_argument("--out", type=cli.path)
    return parser


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--count", "0"], "argument --count: 0 must be at least 1"),
        (["--count", "-1"], "argument --count: -1 must be at least 1"),
        (["--count", "1e30"], "argument --count: '1e30' is no whole number"),
        (["--count", "9" * 30], "argument --count: 999999999999999999999999999999 must be at most 2147483647"),
        (["--share", "nan"], "argument --share: nan must be finite"),
        (["--share", "inf"], "argument --share: inf must be finite"),
        (["--share", "1e39"], "argument --share: 1e39 must be finite in float32"),
        (["--share", "1.01"], "argument --share: 1.01 must lie in [0, 1]"),
        (["--share", "x"], "argument --share: 'x' is no number"),
        (["--seed", "4294967296"], "argument --seed: 4294967296 must lie in [0, 4294967295]"),
        (["--out", ""], "argument --out: it is empty"),
        (["--cou", "1"], "unrecognized arguments: --cou 1"),
        (["left", "over"], "unrecognized arguments: left over"),
    ],
)
def test_wrong_options_end_in_one_line(parser, words, message, capsys):
    with pytest.raises(SystemExit) as caught:
        parser.parse_args(words)
    assert (caught.value.code, capsys.readouterr().err) == (2, f"error: {message} (see it --help)\n")


def test_right_options(parser, monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    args = parser.parse_args(["--count=7", "--share=0.5", "--seed=4294967295", "--out=~/a"])
    assert (args.count, args.share, args.seed, args.out) == (7, 0.5, 2**32 - 1, f"{tmp_path}/a")
    assert cli.path("gs://bucket/~x") == "gs://bucket/~x"


@pytest.mark.parametrize(
    ("rule", "allowed", "refused"),
    [
        (ranges.whole(0, 4), (0, 4), (-1, 5, 1.0, True, "1", None)),
        (ranges.real(0, below=1), (0, 0.5, 0.999), (1, -1e-9, 0.99999999999, float("nan"), False)),  # 1 in float32
        (ranges.real(above=0), (1e-30, 1e30), (0, 1e-46, 1e-39, 1e39)),  # too small and too large for float32
        (ranges.Several(ranges.whole(1), least=1), ((1,), [2, 3]), ((), (0,), 1, "1")),
        (ranges.Several(ranges.real(), count=2), ((-1, 1),), ((1,), (0, float("inf")))),
        (ranges.OrNone(ranges.whole(1)), (None, 1), (0,)),
        (bool, (True, False), (0, 1, None, "True")),
        (str, ("", "a"), (1, None)),
    ],
)
def test_rules(rule, allowed, refused):
    assert [value for value in allowed if ranges.problem(rule, value)] == []
    assert [value for value in refused if not ranges.problem(rule, value)] == []


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_refuses_unknown_words(name, capsys):
    module = importlib.import_module(name)
    with pytest.raises(SystemExit) as caught:
        module.parse_args(["--help"])
    shown = capsys.readouterr().out
    assert caught.value.code == 0 and "usage: " in shown
    if name in WITH_CONFIG:
        assert "--config FILE[:ARG]" in shown and "--config.FIELD=VALUE" in shown
    words = ["inspect", "a", "--colour=red"] if name.startswith("checkpoints_tools") else ["a", "--colour=red"]
    with pytest.raises(SystemExit) as caught:
        module.parse_args(words)
    error = capsys.readouterr().err
    assert caught.value.code == 2 and error.startswith("error: ") and error.count("\n") == 1, error


IMPORTS = f"""
import importlib, sys, jax
for name in {COMMANDS}:
    importlib.import_module(name)
jax.config.update('jax_num_cpu_devices', 1)  # an error once devices are in use
print(sorted({HEAVY} & set(sys.modules)))
"""


@pytest.mark.integration
def test_nothing_heavy_is_imported_for_the_command_line():
    done = run("-c", IMPORTS)
    assert done.stdout == "[]\n", done.stderr


def test_a_command_gets_its_arguments_and_ends_in_one_line():
    @cli.command(lambda words: SimpleNamespace(words=words), "interrupted: nothing was written")
    def main(args):
        if "wrong" in args.words:
            raise ValueError("wrong word")
        return args.words

    assert main(["right"]) == ["right"]
    with pytest.raises(SystemExit, match="^error: wrong word$"):
        main(["wrong"])


def test_processes_are_started_before_the_command_and_fail_together(monkeypatch):
    calls = []

    @contextlib.contextmanager
    def together():
        calls.append("together")
        try:
            yield
        except SystemExit as error:
            calls.append(error.code)
            raise

    def parse_args(words):
        parser = cli.Parser(prog="it")
        cli.add_processes(parser)
        return parser.parse_args(words)

    @cli.command(parse_args)
    def main(args):
        raise ValueError(f"process {args.process_id}")

    monkeypatch.setattr(multihost, "abort_all_on_error", together)
    monkeypatch.setattr(multihost, "start", lambda *given: calls.append(given))
    with pytest.raises(SystemExit, match="error: process 1"):
        main(["--coordinator=a:1", "--num_processes", "2", "--process_id=1"])
    assert calls == ["together", (False, "a:1", 2, 1), "error: process 1"]


# ---- configs --------------------------------------------------------------------------------------------------------

NO_PATCH = {"patch_size": 0, "hidden_size": 16, "depth": 1, "num_heads": 2}
TINY = ["--config=configs/repae.py:tiny", "--workdir=run"]
LINES = [
    ([*TINY, "--config.sit.qk_norm", "False"], "unrecognized arguments: False; a field of"),
    ([*TINY, "--config.data.options.labelled", "False"], "unrecognized arguments: False; a field of"),
    ([*TINY, "--config.steps=3", "extra", "words", "here"], "unrecognized arguments: extra words here"),
    ([*TINY, "--config.optim.sit.learning_rate=nan"], "config.optim.sit.learning_rate=nan must be finite"),
    ([*TINY, "--config.optim.sit.learning_rate=inf"], "config.optim.sit.learning_rate=inf must be finite"),
    ([*TINY, "--config.optim.sit.eps=0"], "config.optim.sit.eps=0.0 must be positive"),
    ([*TINY, "--config.loss.vae.kl=nan"], "config.loss.vae.kl=nan must be finite"),
    ([*TINY, "--config.loss.gan_factor=nan"], "config.loss.gan_factor=nan must be finite"),
    ([*TINY, "--config.ema_decay=nan"], "config.ema_decay=nan must be finite"),
    ([*TINY, "--config.diffusion.norm_momentum=nan"], "config.diffusion.norm_momentum=nan must be finite"),
    ([*TINY, "--config.optim.sit.clip_norm=nan"], "config.optim.sit.clip_norm=nan must be finite"),
    ([*TINY, "--config.sit.patch_size=0"], "config.sit.patch_size=0 must lie in [1, 1048576]"),
    ([*TINY, "--config.vae.norm_groups=0"], "config.vae.norm_groups=0 must lie in [1, 1048576]"),
    ([*TINY, "--config.data.opt.path=x"], "--config.data.opt.path=x: config.data has no field 'opt'; it has batch_size, cache"),
    ([*TINY, "--config.sit.depth.x=1"], "config.sit.depth is a value, and has no fields"),
    ([*TINY, "--config.encoders.other.weights=x"], "config.encoders has no field 'other'; it has target"),
    ([*TINY, "--config.encoders.target.architecture=3"], "encoder architecture 3 must be a name or a mapping"),
    ([*TINY, f"--config.encoders.target.architecture={NO_PATCH}"], "encoder architecture: patch_size=0 must lie in"),
    ([*TINY, "--config.encoders.target.architecture.depth=0"], "encoder architecture: depth=0 must lie in"),
    ([*TINY, "--config.steps=1.5"], "flag --config.steps=1.5: invalid literal"),
    ([*TINY, "--config.steps=None"], "config.steps=None must be a whole number"),
    ([*TINY, "--config.ema_decay=None"], "config.ema_decay=None must be a number"),
    ([*TINY, "--config.checkpoint.keep_every=0"], "config.checkpoint.keep_every=0 must be at least 1, or None"),
    ([*TINY, "--config.sit=3"], "flag --config.sit=3: Failed to parse"),
    ([*TINY, "--config.vae.channel_multipliers=(1,2,'a')"], "has an entry that must be a whole number"),
    ([*TINY, "--config.vae.attention_levels=(7,)"], "attention_levels=(7,) must lie in 0..2"),
    ([*TINY, "--colour=red"], "unrecognized arguments: --colour=red"),
    (["--config=configs/repae.py:tiny", "--workdir="], "it is empty"),
    (["--workdir=run"], "the following arguments are required: --config"),
    (["--config=configs/repae.py:tiny"], "the following arguments are required: --workdir"),
    ([*TINY, "--flagfile=HERE/flags"], "--config.data.opt.path=x: config.data has no field 'opt'"),
    ([*TINY, "--flagfile=HERE/none"], "Unable to open flagfile"),
    (["--config=configs/none.py", *TINY[1:]], "there is no file 'configs/none.py'"),
    (["--config=configs", *TINY[1:]], "there is no file 'configs'"),
    (["--config=configs/common.py", *TINY[1:]], "the file has no function get_config"),
    (["--config=HERE/syntax.py", *TINY[1:]], "SyntaxError: '(' was never closed (syntax.py, line 2)"),
    (["--config=HERE/name.py", *TINY[1:], "--config.steps=3"], "NameError: name 'depth' is not defined (HERE/name.py, line 2)"),
    (["--config=HERE/number.py", *TINY[1:]], "get_config must return a ConfigDict, not int"),
]
FILES = {  # below HERE
    "syntax.py": "def get_config():\n    return (\n", "name.py": "def get_config():\n    return depth\n",
    "number.py": "def get_config():\n    return 3\n", "flags": "--config.data.opt.path=x\n",
}  # fmt: skip


@pytest.fixture(scope="module")
def here(tmp_path_factory):
    """Folder of FILES."""
    folder = tmp_path_factory.mktemp("configs")
    for name, text in FILES.items():
        (folder / name).write_text(text)
    return folder


@pytest.mark.parametrize(("words", "message"), LINES, ids=lambda value: value if isinstance(value, str) else "")
def test_mistakes_in_words_of_training_end_in_one_line(words, message, here, monkeypatch, capsys):
    monkeypatch.chdir(ROOT)
    with pytest.raises(SystemExit) as caught, cli.ending():
        build.build(train.parse_args([word.replace("HERE", str(here)) for word in words]).config)
    error = capsys.readouterr().err if caught.value.code == 2 else caught.value.code + "\n"
    assert error.startswith("error: ") and error.count("\n") == 1, error
    assert message in error.replace(str(here), "HERE"), error


def test_home_folders_and_none_in_flags(here, monkeypatch):
    monkeypatch.chdir(ROOT)
    monkeypatch.setenv("HOME", str(here))
    (here / "mine.py").write_text("from configs.repae import get_config\n")
    words = ["--config", "~/mine.py:tiny", "--workdir=~/run", "--config.sit.qk_norm=True"]
    args = train.parse_args([*words, "--config.checkpoint.keep_every=None", "--config.sampling.guidance_channels=None"])
    build.build(args.config)
    assert (args.config.sit.qk_norm, args.config.checkpoint.keep_every, args.workdir) == (True, None, f"{here}/run")


def test_values_in_words_of_their_own_and_in_any_order(monkeypatch):
    """Types are those of the fields; booleans take no word of their own, but have a negation."""
    monkeypatch.chdir(ROOT)
    words = ["--config.steps", "3", "--workdir", "run", "--noconfig.sit.qk_norm", "--config", "configs/repae.py:tiny"]
    config = train.parse_args([*words, "--config.vae.channel_multipliers=(1,2)", "--config.ema_decay", "0.5"]).config
    assert (config.steps, config.sit.qk_norm, config.vae.channel_multipliers, config.ema_decay) == (3, False, (1, 2), 0.5)
