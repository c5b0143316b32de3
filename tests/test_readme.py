"""The documents: their links and files exist, their commands can be parsed, and their configs can be built."""

import ast
import functools
import importlib
import re
import shlex
import sys
from pathlib import Path

import pytest
from absl import flags
from ml_collections import config_flags

import repae_jax
from repae_jax import data
from repae_jax.job import build

ROOT = Path(__file__).parents[1]
FOLDERS = ("configs", "launch", "checkpoints_tools", "repae_jax", "docs", "tests", "measurements")
DOCUMENTS = [*sorted(ROOT.glob("*.md")), *(path for folder in FOLDERS for path in sorted((ROOT / folder).rglob("*.md")))]
TEXTS = {str(path.relative_to(ROOT)): path.read_text() for path in DOCUMENTS}
LAUNCHERS = r"repae_jax\.(train|plan|cache_latents|benchmark)|tpu_pod\.sh run|gke_jobset\.sh submit|(multi_gpu|slurm)\.sh"


def blocks(language):
    """(document, content) of every code block in a language."""
    return [
        (name, block)
        for name, text in TEXTS.items()
        for block in re.findall(rf"^```{language}\n(.*?)^```", text, flags=re.DOTALL | re.MULTILINE)
    ]


def commands():
    """Words of every command in a bash block, with its document."""
    for name, block in blocks("bash"):
        quoted = re.sub(r'"\n.*?"\n', "\n", block, flags=re.DOTALL)  # python -c with a script over several lines
        for line in quoted.replace("\\\n", " ").splitlines():
            words = shlex.split(line, comments=True)
            if words:
                yield name, words


def parameters(chosen):
    return [pytest.param(words, id=f"{name}-{index}") for index, (name, words) in enumerate(chosen)]


def training_commands():
    """Commands that take a config, those with … for flags that are left out, too."""
    return [(name, words) for name, words in commands() if re.search(rf"({LAUNCHERS}).* --config \w", " ".join(words))]


def python_commands():
    """(document, [module, its arguments …]) of every `python -m` of ours."""
    for name, words in commands():
        if words[0] == "python" and "-m" in words and words[words.index("-m") + 1].split(".")[0] in FOLDERS:
            yield name, words[words.index("-m") + 1 :]


def config_of(words, monkeypatch):
    """Returns the config that a command line makes of its config file."""
    words = words[words.index("--config") :]
    given = words[:2] + [word for word in words if word.startswith("--config.")]
    monkeypatch.setattr(sys, "argv", ["train", *given])  # config_flags looks for fields there
    values = flags.FlagValues()
    config_flags.DEFINE_config_file("config", flag_values=values)
    values(sys.argv)
    return values.config


@functools.cache
def command_module(name):
    """The module that `python -m NAME` runs."""
    module = importlib.import_module(name)
    return importlib.import_module(f"{name}.__main__") if hasattr(module, "__path__") else module


def test_the_readme_is_a_page():
    assert TEXTS["README.md"].count("\n") <= 150


@pytest.mark.parametrize("name", TEXTS)
def test_links_lead_somewhere(name):
    for target in re.findall(r"\]\(([^)\s]+)\)", TEXTS[name]):
        if "://" not in target:
            path, _, anchor = target.partition("#")
            linked = (ROOT / name).parent / path if path else ROOT / name
            assert linked.exists(), f"{name}: {target}"
            if anchor:
                titles = re.findall(r"^#+ (.*)$", linked.read_text(), re.MULTILINE)
                anchors = [re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-") for title in titles]
                assert anchor in anchors, f"{name}: {target}"


@pytest.mark.parametrize("name", TEXTS)
def test_files_that_are_named_exist(name):
    for path in re.findall(rf"(?<![\w/.])((?:{'|'.join(FOLDERS)})/[\w./-]*\.(?:py|sh|md|ipynb|toml|json|npz))\b", TEXTS[name]):
        assert (ROOT / path).exists(), f"{name}: {path}"


@pytest.mark.parametrize("name, block", blocks("python"))
def test_python_uses_what_there_is(name, block):
    for node in ast.walk(ast.parse(block)):
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "repae_jax":
            assert node.attr in repae_jax.__all__, f"{name}: repae_jax.{node.attr}"


def test_all_kinds_of_commands_are_found():
    text = "\n".join(" ".join(words) for _, words in commands())
    for command in ("repae_jax.train", "tpu_pod.sh run", "gke_jobset.sh submit", "multi_gpu.sh", "slurm.sh", "repae_jax.plan"):
        assert command in text and command in "\n".join(" ".join(words) for _, words in training_commands())
    assert len({words[0] for _, words in python_commands()}) >= 10


@pytest.mark.parametrize("words", parameters(python_commands()))
def test_options_exist(words, capsys):
    module, *arguments = words
    module = command_module(module)
    if "…" in arguments:
        return
    if not hasattr(module, "parse_args"):
        pytest.skip("its flags are read by absl")
    try:
        module.parse_args(arguments)
    except SystemExit as ended:
        assert ended.code == 0, capsys.readouterr().err  # after --help


@pytest.mark.parametrize("words", parameters(training_commands()))
def test_configs_can_be_built(words, monkeypatch):
    """The weights and data are given, as far as the job needs them."""
    config = config_of(words, monkeypatch)
    if {"…", "repae_jax.plan", "repae_jax.benchmark"} & set(words):  # these need no files
        return
    config.mesh = {"fsdp": 1, "slices": 1}  # the test's devices
    config.data.workers = 0
    job = build.build(config)
    assert config.init.vae or not job.frozen_vae, "config.init.vae"
    if job.recipe.vae_weights.get("lpips") and "repae_jax.cache_latents" not in words:
        assert config.lpips.vgg16 and config.lpips.linear, "config.lpips"
    options = {name: value for name, value in build.plain_config(config)["data"]["options"].items() if value}
    if not config.data.cache:
        assert "://" not in options["path"]
        with pytest.raises((OSError, ValueError), match=re.escape(options["path"])):  # the path does not exist here
            data.make_source(config.data.source, config.data.image_size, **options)
