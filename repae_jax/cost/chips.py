"""Chips to plan for, TPUs and GPUs: memory, speeds, and what the compilers for them have to know."""

import dataclasses
from collections.abc import Mapping

from repae_jax.cost import flops

GIB = 2**30
JAX_SHARE = 0.75  # of a GPU's memory that JAX takes unless XLA_CLIENT_MEM_FRACTION says otherwise


@dataclasses.dataclass(frozen=True, kw_only=True)
class Chip:
    """A kind of accelerator: one device to JAX."""

    kind: str  # JAX's name of its devices, for `flops.peak`
    memory: float  # bytes
    bandwidth: float  # bytes/s of the memory
    link: float  # bytes/s that a chip sends to those that links connect it with
    network: float  # bytes/s that it sends to others
    link_name: str
    noun: str  # what one is called
    start: float  # seconds that a kernel takes, however little it does
    usable: float  # share of the memory that a program may fill
    refuses: bool  # its compiler refuses a program that does not fit
    reached: Mapping[str, float]  # shares of the peaks that a roofline assumes: product, convolution, memory, link
    compiler_options: Mapping[str, bool | int]  # without which it does not compile where there is none

    def peak(self, precision: str = "bfloat16") -> float:
        """Returns the dense FLOP/s of products in 'bfloat16', or in float32 of a precision of JAX.

        'float32' is the default one, 'high' that of this name, and 'exact' its 'highest'.
        """
        raise NotImplementedError


_TPU_REACHES = {"product": 0.85, "convolution": 0.85, "memory": 0.85, "link": 0.8}
# with these, the step of configs/repae.py and its VAE alone take what was measured on an H200 (docs/performance.md), within 2 %
_GPU_REACHES = {"product": 0.6, "convolution": 0.55, "memory": 0.85, "link": 0.8}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Tpu(Chip):
    """A kind of TPU."""

    clock: float  # Hz of the cycles that the compiler counts
    # share of the peak that the compiler expects, at this clock, of a product of bfloat16 matrices of side 8192 (libtpu
    # 0.0.42); real chips come close to the peak there: it shows how far estimates of large products can be trusted
    matmul: float
    grids: tuple[str, ...]  # allowed numbers of chips per side; examples where there are three sides
    network: float = 100e9 / 8 / 4  # 100 Gb/s of a host of four chips
    link_name: str = "the torus"
    noun: str = "chip"
    start: float = 0.0
    usable: float = 1.0  # `memory` is without what is reserved
    refuses: bool = True
    reached: Mapping[str, float] = dataclasses.field(default_factory=lambda: _TPU_REACHES)
    compiler_options: Mapping[str, bool | int] = dataclasses.field(default_factory=dict)

    @property
    def sides(self) -> int:
        """Returns the number of dimensions of its torus."""
        return self.grids[0].count("x") + 1

    def peak(self, precision: str = "bfloat16") -> float:
        """Returns the FLOP/s; a product of float32 is one in bfloat16, three where its precision is high, six if exact."""
        return (flops.peak(self.kind) or 0.0) / {"high": 3, "exact": 6}.get(precision, 1)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Gpu(Chip):
    """A kind of GPU card."""

    capability: tuple[int, int]  # CUDA's
    cores: int
    units: int  # float32 units of a core
    clock: float  # Hz
    l2: int  # bytes of the second-level cache
    shared: tuple[int, int]  # bytes of shared memory: of a core, and of a block that asks for it
    threads: int  # of a core
    link_name: str = "NVLink"
    noun: str = "GPU"
    start: float = 2e-6
    usable: float = 0.9  # as XLA_CLIENT_MEM_FRACTION, see JAX_SHARE; the rest is for driver, libraries and fragmentation
    refuses: bool = False
    reached: Mapping[str, float] = dataclasses.field(default_factory=lambda: _GPU_REACHES)
    # nothing can be timed, and Triton's products find no tiles untimed: cuBLAS does them all
    compiler_options: Mapping[str, bool | int] = dataclasses.field(
        default_factory=lambda: {"xla_gpu_autotune_level": 0, "xla_gpu_enable_triton_gemm": False}
    )
    per_host: int = 8  # the most in a host
    connected: int = 0  # GPUs that links connect where these are more than those of a host

    def peak(self, precision: str = "bfloat16") -> float:
        """Returns the FLOP/s; products of float32 are TF32, high ones, too; exact ones run on the ordinary units."""
        if precision == "exact":
            return 2 * self.cores * self.units * self.clock
        return flops.peak(self.kind, "float32" if precision == "high" else precision) or 0.0

    def target_config(self) -> str:
        """Returns the text of the GpuTargetConfigProto with which XLA compiles for this card; fields that all versions know."""
        major, minor = self.capability
        per_core, per_block = self.shared
        return f"""
            gpu_device_info {{
              threads_per_block_limit: 1024 threads_per_warp: 32 threads_per_core_limit: {self.threads}
              shared_memory_per_block: 49152 shared_memory_per_block_optin: {per_block} shared_memory_per_core: {per_core}
              registers_per_block_limit: 65536 registers_per_core_limit: 65536
              block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535
              core_count: {self.cores} fpus_per_core: {self.units} clock_rate_ghz: {self.clock / 1e9:g}
              memory_bandwidth: {self.bandwidth:.0f} device_memory_size: {self.memory:.0f} l2_cache_size: {self.l2}
              cuda_compute_capability {{ major: {major} minor: {minor} }}
            }}
            platform_name: "CUDA" dnn_version_info {{ major: 9 minor: 10 }} device_description_str: "{self.kind}"
        """


_FLAT = ("1x1", "2x2", "2x4", "4x4", "4x8", "8x8", "8x16", "16x16")
_CUBES = ("2x2x1", "2x2x2", "2x2x4", "2x4x4", "4x4x4", "4x4x8", "4x8x8", "8x8x8", "8x8x16", "8x16x16")
# Memory is as reported by the compiler. With their matrix units, the clocks of v4, v5e and v5p give their peaks; v6e's clock is
# not published, and follows from its peak with four of them. Bandwidth of memory: the pages of each version in Google's
# documentation of Cloud TPU. Links: "How to Scale Your Model" (jax-ml.github.io/scaling-book), both directions of one axis.
TPUS = {
    "v4": Tpu(
        kind="TPU v4", memory=30.75 * GIB, bandwidth=1228e9, link=90e9, clock=1.05e9, matmul=0.93, grids=_CUBES
    ),
    "v5e": Tpu(
        kind="TPU v5 lite", memory=15.75 * GIB, bandwidth=819e9, link=90e9, clock=1.5e9, matmul=0.88, grids=_FLAT
    ),
    "v5p": Tpu(
        kind="TPU v5", memory=95.74 * GIB, bandwidth=2765e9, link=180e9, clock=1.75e9, matmul=0.90, grids=_CUBES
    ),
    "v6e": Tpu(
        kind="TPU v6 lite", memory=31.25 * GIB, bandwidth=1640e9, link=180e9, clock=1.75e9, matmul=0.70, grids=_FLAT
    ),
}  # fmt: skip

_HOPPER = {"capability": (9, 0), "units": 128, "l2": 52428800, "shared": (233472, 232448), "threads": 2048}
_BLACKWELL = {"capability": (10, 0), "units": 128, "shared": (233472, 232448), "threads": 2048, "link": 900e9, "network": 50e9}
_AMPERE = {
    "capability": (8, 0), "cores": 108, "units": 64, "clock": 1.41e9, "l2": 41943040, "shared": (167936, 166912),
    "threads": 2048, "link": 300e9, "network": 25e9,
}  # fmt: skip
_GRAPHICS = {
    "units": 128, "shared": (102400, 101376), "threads": 1536, "link": 32e9, "link_name": "PCIe", "network": 12.5e9,
}  # fmt: skip
# Cores, clocks, caches, memory and its bandwidth: the target configs of openxla/xla (xla/backends/gpu/target_config/specs); of
# L40S, RTX 4090 and RTX 6000 Ada NVIDIA's data sheets and the memory that nvidia-smi shows. Links, in one direction: NVLink 3,
# 4 and 5 have 300, 450 and 900 GB/s, PCIe 4 and 5 with 16 lanes 32 and 64. Network: 400 Gb/s a GPU as in DGX H100, H200 and
# B200, 200 as in DGX A100; 100 is assumed of cards without NVLink.
GPUS = {
    "h200": Gpu(
        kind="NVIDIA H200", memory=151397597184, bandwidth=4800e9, cores=132, clock=1.98e9, link=450e9, network=50e9, **_HOPPER
    ),
    "h100": Gpu(
        kind="NVIDIA H100 80GB HBM3", memory=84942979072, bandwidth=3352.32e9, cores=132, clock=1.98e9, link=450e9,
        network=50e9, **_HOPPER,
    ),
    "h100-pcie": Gpu(
        kind="NVIDIA H100 PCIe", memory=84942979072, bandwidth=2039.04e9, cores=114, clock=1.755e9, link=64e9,
        link_name="PCIe", network=12.5e9, **_HOPPER,
    ),
    "a100-40g": Gpu(kind="NVIDIA A100-SXM4-40GB", memory=42331013120, bandwidth=1555.2e9, **_AMPERE),
    "a100-80g": Gpu(kind="NVIDIA A100-SXM4-80GB", memory=85100068864, bandwidth=2039.04e9, **_AMPERE),
    "b200": Gpu(
        kind="NVIDIA B200", memory=191514411008, bandwidth=7672.32e9, cores=148, clock=1.965e9, l2=132644864, **_BLACKWELL
    ),
    "gb200": Gpu(
        kind="NVIDIA GB200", memory=197897748480, bandwidth=7928.064e9, cores=152, clock=2.062e9, l2=135528448, per_host=4,
        connected=72, **_BLACKWELL,
    ),
    "l40s": Gpu(
        kind="NVIDIA L40S", memory=46068 * 2**20, bandwidth=864e9, capability=(8, 9), cores=142, clock=2.52e9, l2=100663296,
        **_GRAPHICS,
    ),
    "rtx4090": Gpu(
        kind="NVIDIA GeForce RTX 4090", memory=24564 * 2**20, bandwidth=1008e9, capability=(8, 9), cores=128, clock=2.52e9,
        l2=75497472, **_GRAPHICS,
    ),
    "a6000": Gpu(
        kind="NVIDIA RTX A6000", memory=51041271808, bandwidth=768.096e9, capability=(8, 6), cores=84, clock=1.8e9, l2=6291456,
        **_GRAPHICS,
    ),
    "rtx6000-ada": Gpu(
        kind="NVIDIA RTX 6000 Ada Generation", memory=49140 * 2**20, bandwidth=960e9, capability=(8, 9), cores=142,
        clock=2.505e9, l2=100663296, **_GRAPHICS,
    ),
}  # fmt: skip
CHIPS: dict[str, Tpu | Gpu] = {**TPUS, **GPUS}
