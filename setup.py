"""Packaging of everest-ds, which includes `ds_configs/` and `slurm/` from the top of the repository."""

import re
from pathlib import Path

from setuptools import find_packages, setup

HERE = Path(__file__).parent
VERSION = re.search(r'__version__ = "(.+)"', (HERE / "everest_ds/__init__.py").read_text())[1]

# A version is exact if other versions are known to train differently or to break, and a range otherwise.
# constraints.txt pins all versions for `make` and CI.
REQUIRES = [
    "torch>=2.6",
    "deepspeed>=0.19.8,<0.20",  # parallel/lean_update.py replaces parts of its ZeRO-1 and ZeRO-2
    "fairscale==0.4.13",
    "decord==0.6.0",
    "einops>=0.8",
    "mpi4py>=4.0",
    "pyyaml>=6.0",
    "tensorboard>=2.16",
    "numpy>=1.26",
    "typer>=0.15",
    "rich>=13.7",
    "pydantic>=2.9,<3",
    "jinja2>=3.1",
    "matplotlib>=3.8",
    "safetensors>=0.4.5",
    "simplejpeg>=1.8",
    "av>=12,<19",  # version 19 changes the arguments for opening files
]
EXTRAS = {
    "torchcodec": ["torchcodec>=0.13"],  # for data.decoder=torchcodec; needs FFmpeg's libraries on the system
    "parquet": ["pyarrow>=15"],  # for everest-ds features --out TABLE.parquet
    "mpi": ["mpich"],  # an MPI library for mpi4py, if the system has none
    "dev": [
        "codespell[toml]>=2.4",
        "fvcore>=0.1.5.post20221221",  # counts MACs independently: cross-checks profiling
        "hypothesis>=6.100",
        "mypy>=1.13",
        "pre-commit>=4",
        "pyarrow>=15",
        "pytest>=8.3",
        "pytest-cov>=7",
        "pytest-timeout>=2.3",
        "pytest-xdist>=3.6",
        "ruff>=0.8",
        "setuptools>=77",
        "transformers>=5,<6",  # has VideoMAE, the independent reference of the parity tests
        "types-PyYAML",
        "mpich",
    ],
}

TRAVELLING = {"everest_ds.ds_configs": "ds_configs", "everest_ds.slurm": "slurm"}

setup(
    name="everest-ds",
    version=VERSION,
    description="Large-scale training of EVEREST, the masked video autoencoder of the moving tokens",
    long_description=(HERE / "README.md").read_text(),
    long_description_content_type="text/markdown",
    python_requires=">=3.10,<3.13",
    packages=[*find_packages(include=["everest_ds", "everest_ds.*"]), *TRAVELLING],
    package_dir=TRAVELLING,
    package_data={
        "everest_ds": [
            "py.typed",
            "efficiency/*.yaml",
            "recipes/*.yaml",
            "recipes/common/*.yaml",
            "reports/templates/*",
        ],
        "everest_ds.ds_configs": ["*.json"],
        "everest_ds.slurm": ["*.sbatch", "common.sh", "clusters/*.env"],
    },
    install_requires=REQUIRES,
    extras_require=EXTRAS,
    entry_points={"console_scripts": ["everest-ds = everest_ds.cli:main"]},
)
