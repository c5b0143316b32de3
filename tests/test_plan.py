"""Plans: topologies, advice, what is printed, mistakes; real ahead-of-time compilation where libtpu is installed."""

import dataclasses
import functools
import importlib.util
import json
import operator
import pickle
import signal
import sys
import types

import gpu_programs
import jax
import jax.numpy as jnp
import pytest
import small
from gpu_programs import needs_cuda_plugin
from hlo_programs import BRANCHES, LOOP, needs_libtpu

from configs import ldm, repae, vae
from repae_jax import cli, plan
from repae_jax.cost import chips, flops, plan_advice, plan_text, topologies
from repae_jax.cost.topologies import topology_devices
from repae_jax.distributed import multihost, sharding
from repae_jax.job import build, compilation, frozen_weights, initial_state, training_data

GIB = 2**30
WIDE = {"data__image_size": (8, 12), "encoders__target__image_size": (8, 12)}


def run_main(monkeypatch, *words, topologies=("v5e:2x2",)):
    """Exit status, or the message of an error, of the command."""
    monkeypatch.setattr(jax.config, "update", lambda *_: None)
    monkeypatch.setattr(cli, "_log_information", lambda: None)
    words = [f"--config={small.ROOT / 'configs/repae.py'}:tiny", *(f"--topology={name}" for name in topologies), *words]
    with pytest.raises(SystemExit) as caught:
        plan.main(words)
    return caught.value.code


# ---- topologies -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("v5e:1x1", "TPU v5 lite"),
        ("v5e:16x16", "TPU v5 lite"),
        ("v6e:2x4", "TPU v6 lite"),
        ("v5p:4x4x8", "TPU v5"),
        ("v4:2x2x1", "TPU v4"),
        ("h200:1", "NVIDIA H200"),
        ("a100-40g:2x8", "NVIDIA A100-SXM4-40GB"),
        ("gb200:18x4", "NVIDIA GB200"),
    ],
)
def test_topologies(name, kind):
    chip = topologies.check_topology(name)
    assert chip.kind == kind and flops.peak(chip.kind)


@pytest.mark.parametrize(
    ("name", "linked"),
    [("v5e:4x4", 16), ("h100:8", 8), ("h100:1", 1), ("h100:4x8", 8), ("a6000:2x2", 2), ("gb200:2x4", 8), ("gb200:36x4", 72)],
)
def test_how_many_chips_links_connect(name, linked):
    assert topologies.connected(name) == linked


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("v5e", r"--topology=v5e: expected CHIP:GRID, a TPU \(v4, v5e, v5p, v6e\) and its chips per side"),
        ("v9:2x2", "--topology=v9:2x2: expected CHIP:GRID.*such as v5e:4x4.*or a GPU .h200, .*such as h200:1, h100:8"),
        ("v5e:4by4", "expected CHIP:GRID"),
        ("v5e:3x3", "allowed grids of v5e are 1x1, 2x2, 2x4, 4x4, 4x8, 8x8, 8x16, 16x16"),
        ("v6e:2x2x1", "allowed grids of v6e"),
        ("v5p:4x4", "three sides, in hosts of 2x2x1 chips: 2x2x1"),
        ("v4:3x4x4", "three sides"),
        ("h100:9", "--topology=h100:9: a host has 1 to 8 of h100: h100:1 to h100:8; several hosts h100:2x8, h100:4x8, …"),
        ("gb200:8", "a host has 1 to 4 of gb200"),
        ("h100:2x2x2", "a host has 1 to 8 of h100"),
        ("h100:0", "expected CHIP:GRID"),
        ("h100:99999x8", "--topology=h100:99999x8: 799,992 GPUs; a plan may have up to 10,000"),
        ("v5p:100x100x100", "--topology=v5p:100x100x100: 1,000,000 chips; a plan may have up to 10,000"),
    ],
)
def test_unknown_topologies(name, message):
    with pytest.raises(ValueError, match=message):
        topology_devices(name)


def test_libtpu_is_not_installed(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    message = run_main(monkeypatch)
    assert message.startswith("error: compiling for TPUs needs libtpu") and "pip install -e '.[tpu]'" in message
    assert "\n" not in message


@pytest.mark.parametrize(
    ("versions", "installed"),
    [
        ({}, "jax-cuda13-plugin missing, jax-cuda13-pjrt missing"),
        ({"jax-cuda13-plugin": "0.9.0", "jax-cuda13-pjrt": "0.9.0"}, "jax-cuda13-plugin 0.9.0, jax-cuda13-pjrt 0.9.0"),
        ({"jax-cuda13-plugin": jax.lib.__version__}, f"jax-cuda13-plugin {jax.lib.__version__}, jax-cuda13-pjrt missing"),
    ],
)
def test_the_cuda_plugin_is_not_installed_or_of_another_version(versions, installed, monkeypatch):
    monkeypatch.setattr(multihost, "versions", lambda: dict.fromkeys(multihost.PACKAGES) | versions)
    message = run_main(monkeypatch, topologies=["h200:1"])
    wanted = f"error: compiling for GPUs needs JAX's CUDA plugin of jaxlib's version {jax.lib.__version__} (no GPU is needed)"
    assert message.startswith(f"{wanted}: {installed}; ")
    assert "pip install -e '.[gpu-plan]'" in message and "\n" not in message


def test_cudnn_is_not_installed(monkeypatch):
    monkeypatch.setattr(multihost, "versions", lambda: dict.fromkeys(multihost.PACKAGES))
    message = "^config.attention='cudnn' .* nvidia-cudnn-cu13 is not installed: pip install --no-deps"
    with pytest.raises(ValueError, match=message):
        plan.prepare({**build.plain_config(small.config()), "attention": "cudnn"}, "h200:1")


def test_hosts_of_gpus_are_no_slices(monkeypatch):
    monkeypatch.setattr(topologies, "check_cuda_plugin", lambda: None)
    message = run_main(monkeypatch, "--config.mesh.slices=2", topologies=["h100:8"])
    reason = "is planned for TPUs only, allowed here: 1; hosts of GPUs are part of the topology, as in h100:2x8"
    assert message == f"error: --topology=h100:8: mesh.slices=2 {reason}"


@pytest.mark.parametrize(("fsdp", "message"), [(3, r"mesh.fsdp=3 does not divide the 4 devices; allowed: \[1, 2, 4\]")])
def test_a_mesh_that_gpus_cannot_make(fsdp, message, monkeypatch):
    monkeypatch.setattr(plan, "topology_devices", lambda *_: jax.devices()[:4])
    with pytest.raises(ValueError, match=message):
        plan.prepare(small.config(mesh__fsdp=fsdp), "h100:2x2")


def test_a_card_too_small_for_one_image(monkeypatch):
    tiny = dataclasses.replace(chips.GPUS["rtx4090"], memory=2**20)
    monkeypatch.setattr(plan, "topology_devices", lambda *_: jax.devices()[:2])
    monkeypatch.setattr(plan, "check_topology", lambda _: tiny)
    with pytest.raises(ValueError) as caught:
        plan.prepare(small.config(), "rtx4090:2")
    message = str(caught.value)
    assert message.startswith("--topology=rtx4090:2: too small for one image: state and frozen weights take 0.0 GiB")
    assert "allowed: --config.mesh.fsdp up to 2, which splits the state, h200, h100," in message and "\n" not in message


def test_gradients_need_not_be_there_at_once():
    """They may take the place of temporaries, so a card is refused only where the arguments alone are too large."""
    card = chips.GPUS["rtx4090"]
    numbers = {
        "topology": "rtx4090:1", "chips": 1, "mesh": {"fsdp": 1}, "job": "repae",
        "state_bytes": 20 * GIB, "gradient_bytes": 10 * GIB, "frozen_bytes": GIB,
    }  # fmt: skip
    plan_advice.check_state(card, numbers)
    with pytest.raises(ValueError, match="state and frozen weights take 22.0 GiB, and a program may fill 21.6; allowed: h200"):
        plan_advice.check_state(card, numbers | {"frozen_bytes": 2 * GIB})
    sampling = {"job": "sample", "chips": 2, "state_bytes": 22 * GIB, "frozen_bytes": 0}
    with pytest.raises(ValueError, match="one image: weights take 22.0 GiB, .* allowed: h200,"):  # each GPU holds them all
        plan_advice.check_state(card, numbers | sampling)


def test_most_images_where_gradients_are_larger_than_temporaries():
    """Half of the temporaries then counts as growing with the images."""
    card = dataclasses.replace(chips.GPUS["h100"], memory=30 * GIB, usable=0.9)
    memory = {"temporaries": 4 * GIB, "total": 15 * GIB}
    numbers = {"memory_bytes": memory, "gradient_bytes": 6 * GIB, "images_per_chip": 4}
    assert plan_advice.most_images(card, numbers) == 28, "(27 - 11 - 2) / (2 / 4)"


def test_all_topologies_are_checked_before_the_first_is_compiled(monkeypatch):
    monkeypatch.setattr(plan, "topology_devices", lambda *_: jax.devices()[:4])
    monkeypatch.setattr(plan, "plan_apart", lambda *_: pytest.fail("not reached"))
    assert "v5e:3x3" in run_main(monkeypatch, topologies=["v5e:2x2", "v5e:3x3"])


def test_an_existing_file_is_kept(monkeypatch, tmp_path):
    (tmp_path / "x.json").write_text("mine")
    message = run_main(monkeypatch, f"--json={tmp_path}/x.json")
    assert "exists: choose another name" in message and (tmp_path / "x.json").read_text() == "mine"


def test_a_file_without_a_folder_is_found_first(monkeypatch, tmp_path):
    monkeypatch.setattr(plan, "prepare", lambda *_: pytest.fail("not reached"))
    message = run_main(monkeypatch, f"--json={tmp_path}/none/x.json")
    assert message == f"error: --json={tmp_path}/none/x.json: there is no folder {tmp_path}/none; make it first"


def test_images_per_chip_of_a_training_step(monkeypatch):
    message = run_main(monkeypatch, "--images_per_chip=2")
    assert message == "error: --images_per_chip=2 is for sampling: add --sample, or change config.data.batch_size"


# ---- what does not fit ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("message", "expected"),
    [
        (
            "RESOURCE_EXHAUSTED: XLA:TPU compile permanent error. Ran out of memory in memory space hbm. Used 17.33G of 15.75G "
            "hbm. Exceeded hbm capacity by 1.58G.",
            (17.33 * GIB, 15.75 * GIB),
        ),
        (
            "RESOURCE_EXHAUSTED: Ran out of memory on HBM, the total memory required for HLO temporaries (512.00G) exceeds "
            "available HBM (15.75G).",
            (512 * GIB, 15.75 * GIB),
        ),
        (
            "RESOURCE_EXHAUSTED: Allocation (size=68719476736) would exceed memory (size=17179869184) :: "
            "%s0 = inlined_call_operand.hbm [shape: f32[131072,131072]]",
            (64 * GIB, None),
        ),
        ("RESOURCE_EXHAUSTED: Ran out of memory in memory space hbm.", (None, None)),
    ],
)
def test_messages_of_the_compiler(message, expected):
    assert plan.memory_of_message(message) == pytest.approx(expected)

    def fail(options):
        raise jax.errors.JaxRuntimeError(message)

    with pytest.raises(plan.DoesNotFit) as caught:
        plan.compile_program(types.SimpleNamespace(compile=fail), chips.CHIPS["v5e"])
    assert (caught.value.needed, caught.value.available) == pytest.approx(expected)


@pytest.mark.parametrize("message", ["INTERNAL: broken", "RESOURCE_EXHAUSTED: Ran out of memory in memory space vmem."])
def test_other_errors_of_the_compiler_stay_what_they_are(message):
    def fail(options):
        raise jax.errors.JaxRuntimeError(message)

    with pytest.raises(jax.errors.JaxRuntimeError, match=message) as caught:
        plan.compile_program(types.SimpleNamespace(compile=fail), chips.CHIPS["v5e"])
    copy = pickle.loads(pickle.dumps(caught.value))
    assert type(copy) is type(caught.value) and str(copy) == message, "comes back from another process"


def setting_of(sampling=False, topology="v5e:2x4", **changes):
    """(Job on eight fake devices, plan.setting of it as if they were those of a topology)."""
    config = small.config(**changes)
    if sampling:
        config = plan.sampling_config(config, 16)
    job = build.build(config, encoders=() if sampling else None)
    return job, plan.setting(job, topologies.check_topology(topology), topology, sampling)


@functools.cache
def too_large():
    """A Job with everything that can be advised against, and the numbers of its plan before it is compiled."""
    job, numbers = setting_of(data__batch_size=64, sit__remat="dots", sit__hidden_size=128)
    return job, numbers | {"flop_per_image": flops.of_step(job)}


def test_advice():
    lines = plan.advice(*too_large())
    assert [line.partition(":")[0] for line in lines[:-1]] == [
        "--config.mesh.fsdp=8", "--config.accumulation=2", "--config.sit.remat=full", "--config.vae.remat=True",
    ]  # fmt: skip
    assert "4 instead of 8 images of a chip at a time" in lines[1]
    job, numbers = setting_of(data__batch_size=24, accumulation=3, mesh__fsdp=8, sit__remat="full", vae__remat=True)
    assert plan.advice(job, numbers) == lines[-1:], "nothing is left but other chips, or another batch"
    assert plan.advice(*setting_of(sampling=True))[0].startswith("--images_per_chip=1:")
    job, numbers = setting_of(sampling=True)
    assert plan.advice(job, numbers | {"images_per_chip": 1}) == ["chips with more memory"]


@pytest.mark.parametrize(
    ("width", "fsdp", "expected"),
    [
        (512, 1, 8),
        (512, 4, 8),
        (516, 1, 4),  # 8 does not divide it: all would be whole again
        (516, 4, None),
        (516, 8, 4),
        (4, 1, None),  # too small to be split
    ],
)
def test_the_least_fsdp_with_the_smallest_state(width, fsdp, expected, monkeypatch):
    def state_on(mesh):
        shapes = {"kernel": jax.ShapeDtypeStruct((width, width), jnp.float32), "step": jax.ShapeDtypeStruct((), jnp.int32)}
        put = lambda x, placed: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=placed)  # noqa: E731
        return jax.tree.map(put, shapes, sharding.tree_sharding(mesh, shapes))

    job = types.SimpleNamespace(mesh=sharding.make_mesh(fsdp), config={"mesh": {"slices": 1}})
    monkeypatch.setattr(initial_state, "abstract_state", lambda job: state_on(job.mesh))
    proposal = plan_advice.better_fsdp(job, plan.chip_bytes(state_on(job.mesh)))
    nothing = (None, None)
    assert proposal == (nothing if expected is None else (expected, plan.chip_bytes(state_on(sharding.make_mesh(expected)))))


@pytest.mark.integration
@pytest.mark.parametrize(
    "changes",
    [
        {"sit__remat": "dots", "sit__hidden_size": 128},
        {"loss__vae__diffusion": 0.5},  # not of parts of a batch
        {"loss__vae__diffusion": 0.5, "diffusion__norm_momentum": 0.0},
        {"file": vae},
    ],
)
def test_advice_can_be_followed(changes):
    """Names and values are those of the config; all at once are a step that can be built."""
    changes = {**changes, "data__batch_size": 64}
    config, lines = small.config(**changes), plan.advice(*setting_of(**changes))
    for line in lines[:-1]:
        *sections, field = line.partition("=")[0].removeprefix("--config.").split(".")
        section = functools.reduce(operator.getitem, sections, config)
        section[field] = type(section[field])(line.partition("=")[2].partition(":")[0])
    refused = config.loss.vae.get("diffusion") and config.diffusion.norm_momentum
    assert config.vae.remat is True and config.accumulation == (1 if refused else 2)
    build.build(config)


def test_only_what_has_a_backward_pass_is_computed_again():
    config = small.config({"vae.remat": False}, vae, "discriminator,tiny")
    job = build.build(config)
    lines = plan.advice(job, plan.setting(job, chips.CHIPS["v5e"], "v5e:2x4", False))
    assert not any("remat" in line for line in lines), lines


def test_what_does_not_fit_is_said_with_advice():
    job, numbers = too_large()
    failed = {"fits": False, "message": "RESOURCE_EXHAUSTED: Ran out.", "needed_bytes": 20 * GIB}
    numbers = numbers | failed | {"advice": plan.advice(job, numbers)}
    text = "\n".join(plan_text.lines_of(numbers))
    assert "DOES NOT FIT: needs 20.00 GiB or more of the 15.75 GiB of a chip" in text
    assert "says: Ran out." in text and "  --config.mesh.fsdp=8" in text
    assert "needs more than the 15.75 GiB" in "\n".join(plan_text.lines_of(numbers | {"needed_bytes": None}))


def test_a_compiler_that_fails_leaves_the_other_topologies_their_plans(monkeypatch, tmp_path, capsys):
    numbers = too_large()[1]
    fitting = numbers | {"fits": True, "runs": 3600, "advice": []} | plan.outcome(numbers | {"runs": 3600}, STATS, HLO)
    monkeypatch.setattr(plan, "prepare", lambda config, name, images: (None, numbers | {"topology": name}))

    def crash_once(function, config, topology, images_per_chip):
        assert function is plan.prepare_and_plan and images_per_chip is None and isinstance(config, dict)
        if topology == "v5e:2x2":
            raise plan.Crashed("Check failed: shape.rank() == 2", -signal.SIGABRT)
        return fitting | {"topology": topology}

    monkeypatch.setattr(plan, "run_in_subprocess", crash_once)
    code = run_main(monkeypatch, f"--json={tmp_path}/x.json", topologies=["v5e:2x2", "v5e:2x4"])
    assert code is True, "exit status 1"
    first, second = json.loads((tmp_path / "x.json").read_text())
    assert first["fits"] is None and first["message"] == "Check failed: shape.rank() == 2"
    assert second == json.loads(json.dumps(fitting | {"topology": "v5e:2x4"}))
    printed = capsys.readouterr().out
    assert "NOT KNOWN whether it fits: the compiler failed, by a mistake of its own" in printed
    assert "The message: Check failed: shape.rank() == 2" in printed
    assert "14.50 GiB of 15.75: fits" in " ".join(printed.split())


@pytest.mark.parametrize(
    ("error", "exitcode", "text"),
    [
        (
            plan.Crashed("killed by SIGKILL", -signal.SIGKILL), -signal.SIGKILL,
            "the process that compiled it was killed The message: killed by SIGKILL What may help: a machine with more memory",
        ),
        (
            jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: vmem"), None,
            "it could not be compiled The message: RESOURCE_EXHAUSTED: vmem What may help: another topology",
        ),
    ],
)  # fmt: skip
def test_why_it_is_not_known(error, exitcode, text, monkeypatch):
    def fail(*_):
        raise error

    monkeypatch.setattr(plan, "run_in_subprocess", fail)
    result = plan.plan_apart(small.config(), too_large()[1])
    assert result["fits"] is None and result["exitcode"] == exitcode and result["message"] == str(error)
    assert f"NOT KNOWN whether it fits: {text}" in " ".join(" ".join(plan_text.lines_of(result)).split())


def test_our_own_mistakes_are_not_the_compilers(monkeypatch):
    monkeypatch.setattr(plan, "run_in_subprocess", lambda *_: {}["topology"])
    with pytest.raises(KeyError):
        plan.plan_apart(small.config(), too_large()[1])


# ---- what fits ------------------------------------------------------------------------------------------------------

STATS = types.SimpleNamespace(
    argument_size_in_bytes=6 * GIB, output_size_in_bytes=5 * GIB, alias_size_in_bytes=4 * GIB, temp_size_in_bytes=7 * GIB,
    generated_code_size_in_bytes=GIB // 2, peak_memory_in_bytes=13 * GIB,
)  # fmt: skip
HLO = LOOP.replace("LIMIT", "10").replace("START", "0").replace("STEP", "1").replace("KNOWN", "")


def test_numbers_and_their_tables():
    numbers = too_large()[1] | {"fits": True, "runs": 3600, "advice": ["--config.sit.remat=none: faster"]}
    numbers |= plan.outcome(numbers, STATS, HLO)
    cycles = 5 + 10 * 109
    assert numbers["seconds"] == cycles / 1.5e9 and numbers["hours"] == pytest.approx(numbers["seconds"])
    assert numbers["chip_hours"] == 8 * numbers["hours"] and numbers["images_per_second"] == 64 / numbers["seconds"]
    per_chip = sum(numbers["flop_per_image"].values()) * 8
    assert numbers["share_of_peak"] == pytest.approx(per_chip / numbers["seconds"] / 197e12)
    assert numbers["memory_bytes"]["total"] == 14.5 * GIB and json.loads(json.dumps(numbers)).keys() == numbers.keys()
    text = " ".join(" ".join(plan_text.lines_of(numbers)).split())
    assert "14.50 GiB of 15.75: fits, 8% free, which is tight" in text
    for part in (*numbers["flop_per_image"], "all-reduce", "images per second", "3,600 steps", "clock of 1.5 GHz", "88%"):
        assert part in text
    assert "worth a try: --config.sit.remat=none: faster time of a step" in text
    assert "a chip; its time is not in the compiler's estimate" in text
    opinion = "In the roofline, a second opinion with collectives, each kernel of the compiled program takes as long as"
    assert f"{opinion} products do at 85% of the peak, convolutions at 85% (float32 as bfloat16), its bytes at 85% of" in text
    assert "collectives at 80% of 90 GB/s of the torus or 3.12 of the network. No chip was measured" in text
    assert "1 loops whose length is unknown" in " ".join(plan_text.lines_of(numbers | {"unknown_loops": 1}))
    assert numbers["config"]["data"]["batch_size"] == 64 and numbers["arguments"] == sys.argv[1:]
    assert f"jax {jax.__version__}, jaxlib {jax.lib.__version__}, libtpu " in text and "scales" not in text


def test_a_drawn_scale_counts_as_often_as_it_is_drawn():
    """Time and FLOP alike, or their ratio is no share of anything."""
    job, numbers = setting_of(file=vae, arg="eqvae,tiny", data__image_size=16)
    assert numbers["branch_shares"] == flops.branch_shares(job.config) == [0.5, 0.5]
    numbers |= {"flop_per_image": {"vae": 1e9}, "runs": 1}
    outcome = plan.outcome(numbers, STATS, BRANCHES)
    assert outcome["estimated_cycles"] == 0.5 * 10 + 0.5 * 30 + 10
    text = " ".join(" ".join(plan_text.lines_of(numbers | outcome | {"fits": True, "runs": 1, "advice": []})).split())
    assert "Of the 2 scales of which a step draws one, FLOP, cycles and collectives are the mean." in text


def test_steps_of_two_kinds():
    """Times are means over the kinds; the tables are of the joint step."""
    job, numbers = setting_of(data__batch_size=64, vae_every=4, steps=8)
    numbers |= {"flop_per_image": {"vae": 1e9}, "runs": 8}
    joint, between = (plan.outcome(numbers, STATS, text) for text in (HLO, BRANCHES))
    both = plan.outcome(numbers, STATS, HLO, [(BRANCHES, 0.75)])
    assert joint["seconds"] != between["seconds"] > 0
    assert both["seconds"] == pytest.approx(0.25 * joint["seconds"] + 0.75 * between["seconds"])
    assert both["images_per_second"] == 64 / both["seconds"] and both["hours"] == 8 * both["seconds"] / 3600
    assert both["roofline"] == joint["roofline"] and both["estimated_cycles"] == joint["estimated_cycles"]
    assert both["kinds_of_steps"] == [
        {"seconds": joint["seconds"], "share": 0.25}, {"seconds": between["seconds"], "share": 0.75},
    ]  # fmt: skip
    shown = {"fits": True, "advice": []}
    text = " ".join(" ".join(plan_text.lines_of(numbers | both | shown)).split())
    assert "; as all below, of a joint step" in text and "75% of the steps" in text and "of a step of the SiT alone" in text
    alone = " ".join(plan_text.lines_of(numbers | joint | shown))
    assert "of a joint step" not in alone and "of a step of the SiT alone" not in alone


class Compiled:
    """A program for GPUs that takes STATS."""

    def memory_analysis(self):
        return STATS

    def as_text(self):
        return gpu_programs.stored("gradient_sum")


def gpu_plan(monkeypatch, memory=80 * GIB, **changes):
    """The plan of a small step on two hosts of four GPUs, each of `memory` bytes, that takes 14.5 GiB."""
    card = dataclasses.replace(chips.GPUS["h100"], memory=memory)
    job, numbers = setting_of(topology="h100:2x4", data__batch_size=64, **changes)
    numbers |= {"memory_of_chip_bytes": memory}
    monkeypatch.setattr(plan, "check_topology", lambda _: card)
    monkeypatch.setattr(plan, "compile_program", lambda *_: Compiled())
    monkeypatch.setattr(plan, "lower_step", lambda _: None)
    monkeypatch.setattr(plan.roofline.Groups, "of_mesh", lambda *_: plan.roofline.Groups((0,) * 8 + (1,) * 8, {}))
    return plan.plan(job, numbers)


def test_a_plan_of_gpus(monkeypatch):
    numbers = gpu_plan(monkeypatch, sit__remat="full", sit__unroll=1, vae__remat=True)
    assert numbers["fits"] and numbers["seconds"] == numbers["roofline"]["seconds"] > 0
    assert numbers["images_per_second"] == 64 / numbers["seconds"] and numbers["estimated_cycles"] == 0
    temporaries, fixed = 7 * GIB - numbers["gradient_bytes"], 7.5 * GIB + numbers["gradient_bytes"]
    assert numbers["most_images"] == int((0.9 * 80 * GIB - fixed) / (temporaries / 8))
    assert [line.partition(":")[0] for line in numbers["advice"]] == [
        "--config.sit.remat=none", "--config.sit.unroll=2", "--config.vae.remat=False",
    ]  # fmt: skip
    assert json.loads(json.dumps(numbers)).keys() == numbers.keys()
    text = " ".join(" ".join(plan_text.lines_of(numbers)).split())
    for part in (
        "h100:2x4: 8 GPUs, NVIDIA H100 80GB HBM3, with 989 TFLOP/s", "64 images a step, 8 a GPU", "of 80.00: fits, 82% free",
        f"images that a GPU has room for {numbers['most_images']}", "--config.sit.remat=none", "by a roofline's estimate",
        "0 GPU-hours", "all-reduce over other groups", "by NVLink by network", "products do at 60% of the peak",
        "memory is a lower bound", "jax-cuda13-plugin", "450 GB/s of NVLink or 50 of the network, and 2 us or more",
        "the one step that was measured, on one H200, comes out right; the step has changed since",
    ):  # fmt: skip
        assert part in text, part
    assert "XLA_CLIENT_MEM_FRACTION" not in text
    alone = " ".join(" ".join(plan_text.lines_of(numbers | {"chips": 1, "start_seconds": 3e-6})).split())
    assert "of 3.35 TB/s, and 3 us or more; nothing overlaps" in alone and "of the network" not in alone


@pytest.mark.slow
def test_more_of_a_card_than_jax_takes_by_itself(monkeypatch):
    """14.5 GiB are more than 75 % of 19, and not of 20."""
    line = "set XLA_CLIENT_MEM_FRACTION=.9, as launch/multi_gpu.sh does: by itself JAX takes 75% of a card"
    assert line in plan_text.lines_of(gpu_plan(monkeypatch, memory=19 * GIB))
    assert line not in plan_text.lines_of(gpu_plan(monkeypatch, memory=20 * GIB))
    assert line not in plan_text.lines_of(gpu_plan(monkeypatch, memory=16 * GIB)), "it does not fit"


def test_a_step_that_gpus_have_no_memory_for(monkeypatch):
    numbers = gpu_plan(monkeypatch, memory=16 * GIB)
    assert numbers["fits"] is False and numbers["needed_bytes"] == 14.5 * GIB
    assert numbers["advice"][0].startswith("--config.accumulation=2: 4 instead of 8 images of a GPU at a time")
    text = " ".join(" ".join(plan_text.lines_of(numbers)).split())
    assert "DOES NOT FIT: needs 14.50 GiB or more of the 16.00 GiB of a GPU" in text
    assert "Why: a program may fill 90% of it" in text and "of 16.00: does not fit" in text and "images per second" in text


def test_attention_by_cudnn_is_advised_in_half_precision(monkeypatch):
    numbers = gpu_plan(monkeypatch)

    def advised(precision, **changes):
        config = {**numbers["config"], "attention": "xla", "precision": {"compute": precision}}
        nothing = types.SimpleNamespace(sit=None, vae=None)
        job = types.SimpleNamespace(config=config, tx=nothing, nets=nothing)
        return [line.partition(":")[0] for line in plan_advice.spend(job, {**numbers, **changes})]

    assert advised("bfloat16") == ["--config.attention=cudnn"]
    assert advised("float32") == advised("bfloat16", device_kind="TPU v4") == []


@pytest.mark.slow
def test_little_is_spent_where_little_is_free(monkeypatch):
    (line,) = gpu_plan(monkeypatch, memory=20 * GIB, sit__remat="full", sit__unroll=1)["advice"]
    assert line.startswith("--config.sit.unroll=2"), "it takes no memory"
    assert gpu_plan(monkeypatch, sit__remat="none", sit__unroll=2, vae__remat=False)["advice"] == []


def test_the_state_is_counted_as_it_is_sharded():
    whole, part = (setting_of(mesh__fsdp=fsdp, sit__hidden_size=256)[1]["state_bytes"] for fsdp in (1, 8))
    assert whole / 8 < part < whole / 2


def test_further_averages_are_counted():
    """Each is another SiT with its statistics."""
    (job, several), (_, one) = setting_of(ema_decays=(0.999,), ema_sigmas=(0.05, 0.1)), setting_of()
    state = initial_state.abstract_state(job)
    assert several["state_bytes"] - one["state_bytes"] == 3 * sum(4 * leaf.size for leaf in jax.tree.leaves(state.ema))


@pytest.mark.parametrize(("precision", "said"), [("float32", True), ("bfloat16", False)])
def test_sampling_in_float32_is_said_where_it_is(precision, said):
    numbers = too_large()[1] | {"fits": True, "runs": 1, "advice": [], "job": "sample"}
    numbers["config"] = numbers["config"] | {"sampling": {"precision": precision}}
    text = "\n".join(plan_text.lines_of(numbers | plan.outcome(numbers, STATS, HLO)))
    assert ("sampling is in float32: three products in bfloat16, or more, for one" in text) is said


# ---- sampling -------------------------------------------------------------------------------------------------------


@pytest.mark.integration
def test_images_that_are_no_squares_are_planned_as_such():
    """Half as many pixels more are half as many FLOP more, and a little for attention among all tokens, and for edges."""
    (job, _), (square, _) = setting_of(**WIDE), setting_of()
    wide, before = (flops.of_step(each) for each in (job, square))
    assert all(1.5 < wide[part] / before[part] < 1.6 for part in before) and wide.keys() == before.keys()
    sampled = setting_of(sampling=True, **WIDE)[0]
    assert plan.lower_sampling(sampled).out_info[0].shape == (16, 8, 12, 3)


@pytest.mark.integration
def test_sampling_is_planned_as_it_runs():
    job, numbers = setting_of(sampling=True, sampling__guidance_scale=2.0, accumulation=2)
    assert numbers["job"] == "sample" and numbers["images"] == 16 and job.encoders == ()
    lowered = plan.lower_sampling(job)
    assert lowered.out_info[0].shape == (16, 8, 8, 3)
    with pytest.raises(ValueError, match="trains a tokenizer, which has no SiT"):
        plan.sampling_config(vae.get_config("tiny"), 8)


# ---- programs -------------------------------------------------------------------------------------------------------


@pytest.mark.integration
@pytest.mark.parametrize("changes", [{}, {"data__flip_probability": 0.5, "loss__sit__align": 0.0, "encoders": {}}, WIDE])
def test_a_step_is_lowered_without_weights_or_data(changes):
    """The step reads latents from a cache; tests of configs trace the others."""
    job = build.build(small.config(file=ldm, data__cache="latents", **changes))
    before = jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype), initial_state.abstract_state(job))
    state, metrics = plan.lower_step(job).out_info
    assert jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype), state) == before and "skipped" in metrics


@pytest.mark.integration
def test_the_plan_and_training_take_the_same():
    """Shapes, dtypes and shardings of what `train` passes to the step, against those that the plan compiles."""
    job = build.build(small.config())
    batch, frozen, key = compilation.abstract_inputs(job)
    loaded = frozen_weights.load_frozen(job)
    kinds = [jax.tree.map(lambda x: (x.shape, x.dtype, x.sharding), tree) for tree in (loaded, frozen)]
    assert kinds[0] == kinds[1]
    with training_data.make_loader(job, training_data.make_images(job.config), workers=0) as loader:
        put = sharding.put_batch(job.mesh, next(loader))
    assert {n: (x.shape, x.dtype, x.sharding) for n, x in put.items()} == {
        n: (x.shape, x.dtype, x.sharding) for n, x in batch.items()
    }
    assert key.dtype == jax.random.key(0).dtype


@pytest.mark.slow
@needs_libtpu
@pytest.mark.parametrize(
    ("file", "changes"), [(repae, {"mesh__fsdp": 4}), (repae, WIDE), (ldm, {}), (vae, {"accumulation": 2})]
)
def test_plans_of_all_jobs(file, changes):
    numbers = plan.plan(*plan.prepare(small.config(file=file, **changes), "v5e:2x2"))
    assert numbers["fits"] and numbers["unknown_loops"] == 0 and numbers["chips"] == 4
    assert numbers["memory_bytes"]["arguments"] >= numbers["state_bytes"]
    assert 0 < numbers["share_of_peak"] < 0.01, "toy sizes"
    assert numbers["collective_bytes"]["all-reduce"] > 0
    assert plan_text.lines_of(numbers)


@pytest.mark.slow
@needs_cuda_plugin
def test_a_plan_of_gpus_that_are_not_there():
    numbers = plan.plan(*plan.prepare(small.config(mesh__fsdp=2), "h100:2x2"))
    assert numbers["fits"] and numbers["unknown_loops"] == 0 and numbers["chips"] == 4
    assert numbers["memory_bytes"]["arguments"] >= numbers["state_bytes"]
    traced = sum(numbers["flop_per_image"].values()) * numbers["images_per_chip"]
    compiled = sum(numbers["roofline"]["flop"].values())
    assert 0.8 < compiled / traced < 1.5, "the smallest products become sums; some are computed twice"
    assert {moved["axes"] for moved in numbers["roofline"]["moved"]} <= {"data", "fsdp", "data and fsdp"}
    assert plan_text.lines_of(numbers)


@pytest.mark.slow
@needs_cuda_plugin
def test_a_plan_of_sampling_on_a_gpu():
    numbers = plan.plan(*plan.prepare(small.config(sampling__steps=4), "rtx4090:1", 2))
    assert numbers["images"] == 2 and numbers["fits"] and numbers["seconds"] > 0 and numbers["roofline"]["moved"] == []


@pytest.mark.slow
@needs_libtpu
def test_a_plan_of_sampling():
    numbers = [plan.plan(*plan.prepare(small.config(sampling__steps=steps), "v6e:2x2", 2)) for steps in (4, 16)]
    assert numbers[0]["images"] == 8 and numbers[0]["runs"] == 6250
    cycles = [entry["estimated_cycles"] for entry in numbers]
    assert 2 < cycles[1] / cycles[0] < 4, "a loop over the steps"


@pytest.mark.slow
@needs_libtpu
def test_a_plan_in_a_process_of_its_own(capsys):
    config = small.config(file=ldm)
    _, numbers = plan.prepare(config, "v5e:2x2")
    result = plan.plan_apart(config, numbers)
    assert result["fits"] and {name: result[name] for name in numbers} == numbers
    assert "compiling for 4 chips" in capsys.readouterr().err


@pytest.mark.integration
@needs_libtpu
def test_a_program_that_does_not_fit():
    mesh = sharding.make_mesh(1, topology_devices("v5e:2x2"))
    array = jax.ShapeDtypeStruct((2**17, 2**17), jnp.float32, sharding=sharding.replicated(mesh))
    with pytest.raises(plan.DoesNotFit) as caught:
        plan.compile_program(jax.jit(lambda x: x + 1).lower(array), chips.CHIPS["v5e"])
    assert caught.value.needed >= 64 * GIB and caught.value.available in (chips.CHIPS["v5e"].memory, None)


@pytest.mark.integration
@needs_libtpu
@pytest.mark.parametrize(("topology", "fsdp"), [("v6e:8x8", 16), ("v5p:4x4x4", 2), ("v4:2x2x4", 8), ("v5e:8x8", 4)])
def test_every_number_of_chips_that_divides_them_can_share_the_state(topology, fsdp):
    devices = topology_devices(topology)
    assert dict(sharding.make_mesh(fsdp, devices).shape) == {"data": len(devices) // fsdp, "fsdp": fsdp}


@pytest.mark.integration
@needs_libtpu
def test_a_mesh_and_a_batch_that_do_not_divide():
    with pytest.raises(ValueError, match=r"mesh.fsdp=3 does not divide the 4 devices; allowed: \[1, 2, 4\]"):
        plan.prepare(small.config(mesh__fsdp=3), "v5e:2x2")
    with pytest.raises(ValueError, match="data.batch_size=8 is not divisible by 16 devices"):
        plan.prepare(small.config(), "v5e:4x4")
