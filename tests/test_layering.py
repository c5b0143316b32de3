"""Who may import whom: only what stands above. So there are no cycles, and every piece can be read alone."""

import ast
import functools
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
# Top to bottom. A package stands for all of its files.
GROUND = [
    "repae_jax.faults",
    "repae_jax.ranges",
    "repae_jax.waiting",
    "repae_jax.files",
    "repae_jax.buckets",
    "repae_jax.images",
]
ORDER = GROUND + [
    "repae_jax.distributed",
    "repae_jax.cli",
    # pure pieces
    "repae_jax.models",
    "repae_jax.diffusion",
    "repae_jax.losses",
    "repae_jax.metrics",
    "repae_jax.analysis",
    # plumbing
    "repae_jax.training",
    "repae_jax.data",
    "checkpoints_tools",
    # the story
    "repae_jax.train_step",
    "repae_jax.sit_step",
    "repae_jax.tokenizer_step",
    "repae_jax.job",
    "repae_jax.sampling",
    "repae_jax.cost",
    "repae_jax.evaluation",
    # the Python interface, which `repae_jax` itself offers
    "repae_jax.api",
    # commands
    "repae_jax.cache_latents",
    "repae_jax.train",
    "repae_jax.prepare_images",
    "repae_jax.check_images",
    "repae_jax.sample",
    "repae_jax.evaluate",
    "repae_jax.evaluate_tokenizer",
    "repae_jax.analyze_latents",
    "repae_jax.plan",
    "repae_jax.benchmark",
    "repae_jax.report",
    "repae_jax.demo",
]
TOP = [*GROUND, "repae_jax.distributed.sharding"]  # modules that the pure pieces may import
SEPARATE = ("repae_jax.models", "repae_jax.diffusion", "repae_jax.metrics", "repae_jax.analysis")  # never import each other
# conversion tables: what they convert for may import them, and they describe networks, so they know those
TOOLS_MAY_IMPORT = (
    "repae_jax.models.", "repae_jax.faults", "repae_jax.files", "repae_jax.ranges", "repae_jax.cli", "checkpoints_tools"
)  # fmt: skip
OPEN_RUNS = ("checkpoints_tools.describe", "checkpoints_tools.runs")  # read checkpoints of runs, too, by:
READ_RUNS = ("repae_jax.training.checkpoint", "repae_jax.training.averages")
HEAVY = {
    "torch": "checkpoints_tools", "transformers": "checkpoints_tools", "diffusers": "checkpoints_tools",
    **dict.fromkeys(("tensorflow", "clu", "wandb", "trackio", "mlflow"), "repae_jax.training.trackers"),
}  # fmt: skip


def module_of(path):
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


FOLDERS = ("repae_jax", "checkpoints_tools")
SHIPPED = ROOT / "checkpoints_tools" / "shipped"  # copied into exported folders, imported by diffusers alone
FILES = [path for folder in FOLDERS for path in sorted((ROOT / folder).rglob("*.py")) if path.parent != SHIPPED]
MODULES = {module_of(path): path for path in FILES}


@functools.cache
def imports(name):
    """[(imported module, whether at module level)] of a module; a name imported from one of our packages is resolved."""
    tree = ast.parse(MODULES[name].read_text())
    parents = {child: node for node in ast.walk(tree) for child in ast.iter_child_nodes(node)}

    def is_inside(node, kinds):
        while node in parents:
            node = parents[node]
            if isinstance(node, kinds):
                return True
        return False

    entries = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f"{name} imports relatively; write the module's full name"
            inside = [f"{node.module}.{alias.name}" for alias in node.names]
            names = [name if name in MODULES else node.module for name in inside]
        else:
            continue
        entries += [(imported, not is_inside(node, (ast.FunctionDef, ast.AsyncFunctionDef))) for imported in names]
    return entries


def ours(name):
    packages = ("repae_jax", "checkpoints_tools", "configs", "tests")
    return {imported for imported, _ in imports(name) if imported.partition(".")[0] in packages}


def place(name):
    """Index in ORDER of the entry that a module is, or is in."""
    for index, entry in enumerate(ORDER):
        if name == entry or name.startswith(entry + "."):
            return index
    raise AssertionError(f"{name} has no place in ORDER: decide what it may import, and add it")


@pytest.mark.parametrize("name", [name for name in MODULES if name != "repae_jax"])
def test_imports_only_what_stands_above(name):
    for imported in ours(name):
        assert imported.partition(".")[0] not in ("configs", "tests"), f"{name} imports {imported}"
        if place(imported) != place(name):
            assert place(imported) < place(name), f"{name} imports {imported}, which stands below it"


def test_the_ground_floor_imports_itself_alone():
    assert not {name: ours(name) - {*GROUND} for name in TOP if not ours(name) <= {*GROUND}}


@pytest.mark.parametrize("package", SEPARATE)
def test_these_packages_know_only_the_top_and_themselves(package):
    for name in MODULES:
        if name.startswith(package + "."):
            strangers = {imported for imported in ours(name) if imported not in TOP and not imported.startswith(package + ".")}
            assert not strangers, f"{name} imports {strangers}"


def test_networks_import_of_each_other_only_their_building_blocks():
    blocks = {"repae_jax.models.layers", "repae_jax.models.fused_ops", "repae_jax.models.channel_stats"}
    above = ("encoders", "feature_spaces", "point_tokenizer", "rae", "vae_families", "vtp")
    made_of_others = [f"repae_jax.models.{name}" for name in above]
    for name in MODULES:
        if name.startswith("repae_jax.models.") and name not in made_of_others:
            assert ours(name) <= {*TOP, *blocks}, name


def test_conversion_tables_know_networks_alone():
    for name in MODULES:
        if name.startswith("checkpoints_tools"):
            may = TOOLS_MAY_IMPORT + (READ_RUNS if name in OPEN_RUNS else ())
            strangers = {imported for imported in ours(name) if not imported.startswith(may)}
            assert not strangers, f"{name} imports {strangers}"


def test_only_build_reads_weight_files():
    """Beside the entry points, which come after it."""
    for name in MODULES:
        if name.startswith("repae_jax.") and any(imported.startswith("checkpoints_tools") for imported in ours(name)):
            assert place(name) >= place("repae_jax.job"), name


def test_evaluation_needs_no_job():
    """Images, features and statistics are measured without a config; only hooks of training know the job."""
    for name in MODULES:
        if name.startswith("repae_jax.evaluation.") and name != "repae_jax.evaluation.hooks":
            assert not any(imported.startswith(("repae_jax.job", "repae_jax.sampling")) for imported in ours(name)), name


@pytest.mark.parametrize("library", HEAVY)
def test_heavy_libraries_are_imported_by_one_owner_inside_functions(library):
    for name in MODULES:
        for imported, at_module_level in imports(name):
            if imported.partition(".")[0] == library:
                assert name == HEAVY[library] or name.startswith(HEAVY[library] + "."), f"{name} imports {imported}"
                assert not at_module_level, f"{name} imports {imported} at module level"


def test_no_drawer_for_everything():
    names = {path.stem for path in MODULES.values()}
    assert not names & {"utils", "util", "helpers", "common", "misc", "tools"}


def test_no_cycles():
    done, open_ = set(), []

    def visit(name):
        assert name not in open_, " -> ".join([*open_, name])
        if name in done or name not in MODULES:
            return
        open_.append(name)
        for imported, at_module_level in imports(name):
            if at_module_level and imported in MODULES and imported != name:
                visit(imported)
        open_.pop()
        done.add(name)

    for name in MODULES:
        visit(name)
