"""Package, extras and the `ccella-fast` command. Tool settings are in pyproject.toml."""

from setuptools import find_namespace_packages, setup

# The base is what kernels, models, `sample`, `speed_up` and `FastSampler` need. The commands, train.py too, need these as well.
COMMANDS = [
    "deepspeed>=0.19.8,<0.20",  # before, its bf16 optimizer does not say whether a step overflowed
    "monai>=1.6.1,<1.7",
    "transformers>=5.17,<6",
    "huggingface_hub>=1.31,<3",  # as transformers requires it; to share models
    "hjson>=3.1",  # DeepSpeed files may have comments
    "nibabel>=5.4,<6",
    "SimpleITK>=2.5.4,<3",  # compressed DICOM pixels, resampling
    "matplotlib>=3.9,<4",
    "jinja2>=3.1.6,<4",
    "tensorboard>=2.20,<3",
    "nvidia-ml-py>=12",  # the module is called pynvml; pure Python, harmless without a driver
]
GPU = ["triton>=3.6", "xformers>=0.0.35", "nvidia-dali-cuda130>=2.4,<3"]
DICOM = ["pydicom>=3.0.1,<4", "highdicom>=0.27,<0.29"]  # DICOM series, read and written
VIEWER = ["ipyniivue>=2.4.4,<2.5"]  # volumes slice by slice in a page; its file is embedded, not imported
T5 = ["sentencepiece>=0.2", "protobuf>=5"]  # tokenizer of FLAN-T5
INT8 = [
    "bitsandbytes>=0.49,<0.51",
    "accelerate>=1.1",
]  # text encoders in 8 bits; transformers requires the second for it

setup(
    name="ccella-fast",
    version="0.1.0",
    description="Fast, dependable training of report-conditioned latent diffusion for 3D prostate MRI (CCELLA)",
    license="Apache-2.0",
    license_files=["LICENSE"],
    python_requires=">=3.11,<3.14",
    # kernels/ at the top level is ccella_fast.kernels through the symlink ccella_fast/kernels. It has no __init__.py:
    # transformers and diffusers import any regular package called `kernels` that they find on the path.
    packages=find_namespace_packages(include=["ccella_fast", "ccella_fast.*"]),
    package_data={"ccella_fast.kernels": ["tuned/*.json"]},
    install_requires=[
        "torch>=2.11,<2.16",  # 2.10 closes CVE-2026-24747; 2.16 is untested. What was run: docs/reference/versions.md
        "numpy>=1.26",
        "pydantic>=2.12,<3",
        "safetensors>=0.8.0,<0.9",
        "tqdm>=4.66,<5",
    ],
    extras_require={
        "commands": COMMANDS,
        "all": [*COMMANDS, *GPU, *DICOM, *VIEWER, *T5, *INT8],
        # Pinned so that a machine without a GPU takes the small CPU build and not several GB of CUDA packages.
        "cpu": ["torch==2.13.0"],
        "gpu": GPU,
        "dicom": DICOM,
        "viewer": VIEWER,
        "t5": T5,
        "int8": INT8,
        "test": [
            *COMMANDS,
            *DICOM,
            *VIEWER,
            *T5,
            *INT8,
            "pytest>=8",
            "pytest-timeout>=2.3",
            "pytest-xdist>=3.8",
            "nvidia-dali-cuda130>=2.4,<3",  # both data engines are compared, on a CPU too
            "diffusers>=0.40,<0.43",  # independent truth for solvers
            # As torch 2.11 to 2.15 require it. For kernels in its interpreter and ahead-of-time compilation; no GPU needed.
            "triton>=3.6,<3.10",
            "xformers>=0.0.35",
            "jsonschema>=4.21",  # MONAI verifies the metadata of a bundle with it
            "dcm2niix>=1.0.20240202",  # independent truth for DICOM series
            "setuptools>=77",  # a test builds the wheel
            "ruff==0.17.6",
            "mypy==2.4.1",
        ],
        "docs": [
            *COMMANDS,
            "sphinx>=9.0.4,<10",
            "myst-parser>=5.2,<6",  # pages in Markdown
            "sphinx-argparse>=0.6.1,<0.7",  # the command line's page
            "furo>=2025.12.19",
            "latex2mathml>=3.81,<4",  # formulas without a script
        ],
    },
    entry_points={"console_scripts": ["ccella-fast=ccella_fast.cli:main"]},
)
