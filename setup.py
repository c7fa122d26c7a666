"""Packaging of crosskd_ifc. Imports neither torch nor detectron2: it runs before they are there."""

import re
from pathlib import Path

from setuptools import find_packages, setup

ROOT = Path(__file__).resolve().parent

# What only some users need.
EXTRAS = {
    "cluster": ["submitit>=1.5"],  # comparisons as SLURM jobs
    "data": ["imagehash>=4.3"],  # near-duplicates in a data set
    "deploy": ["onnx>=1.16", "onnxruntime>=1.18"],  # students outside of detectron2
    "docs": ["mkdocstrings[python]>=1.0", "zensical>=0.0.73"],  # make docs
    "timm": ["timm>=1.0"],  # timm backbones, and detectron2's own ViT, MViT and Swin
    "tune": ["optuna>=4.0"],  # search of settings
}
# Command -> function of a tool.
COMMANDS = {
    "crosskd-benchmark": "benchmark:invoke_main",
    "crosskd-check-data": "prepare_data:check_data",
    "crosskd-compare": "compare:invoke_main",
    "crosskd-convert": "convert_weights:main",
    "crosskd-demo": "demo:invoke_main",
    "crosskd-evaluate-export": "evaluate_export:main",
    "crosskd-export": "export_student:main",
    "crosskd-predict": "predict:invoke_main",
    "crosskd-prepare-data": "prepare_data:main",
    "crosskd-report": "report:invoke_main",
    "crosskd-timm-weights": "timm_weights:main",
    "crosskd-train": "train_net:invoke_main",
    "crosskd-train-lazyconfig": "lazyconfig_train_net:invoke_main",
    "crosskd-tune": "tune:invoke_main",
    "crosskd-visualize": "visualize:invoke_main",
}


def read_version():
    """Return `__version__` of the package without importing it."""
    text = (ROOT / "projects" / "crosskd_ifc" / "version.py").read_text(encoding="utf-8")
    return re.search(r"^__version__ = [\"']([^\"']+)[\"']", text, re.MULTILINE).group(1)


def read_readme():
    """Return the long description."""
    readme = ROOT / "README.md"
    return readme.read_text(encoding="utf-8") if readme.exists() else ""


setup(
    name="crosskd-ifc",
    version=read_version(),
    description="Cross-head knowledge distillation with intermediate features for Detectron2",
    long_description=read_readme(),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    python_requires=">=3.10",
    package_dir={"": "projects"},
    packages=find_packages("projects", include=["crosskd_ifc", "crosskd_ifc.*"]),
    # what lies in the package as links to folders of this repository: configs, protocols, tools
    package_data={
        "crosskd_ifc": ["configs/*", "configs/*/*", "configs/*/*/*", "protocols/*"],
        "crosskd_ifc.tools": ["*.manifest"],
    },
    entry_points={
        "console_scripts": [f"{name} = crosskd_ifc.tools.{main}" for name, main in COMMANDS.items()]
    },
    # detectron2 is not on the package index: tools/install_detectron2.py installs it, without what
    # it requires, so that stands here
    install_requires=[
        "cloudpickle",
        "fvcore>=0.1.5",
        "hydra-core>=1.1",
        "iopath>=0.1.7",
        "matplotlib>=3.6",
        "numpy>=1.23",
        "omegaconf>=2.1",
        "opencv-python>=4.6",
        "packaging",
        "Pillow>=9.1",
        "pycocotools>=2.0.6",
        "pydantic>=2.5",
        "PyYAML>=5.4",
        "safetensors>=0.4",
        "scipy>=1.10",
        "setuptools<82",  # detectron2.model_zoo imports pkg_resources
        "tabulate",
        "tensorboard>=2.9",
        "termcolor>=1.1",
        "torch>=2.0",
        "torchvision>=0.15",
        "tqdm>4.29.0",
        "yacs>=0.1.8",
    ],
    extras_require={
        **EXTRAS,
        # what the tests need: the tools, and the extras that they try
        "dev": [
            *("black", "flake8", "hypothesis", "import-linter", "isort", "pytest", "pytest-xdist"),
            *(
                package
                for name in ("cluster", "data", "deploy", "timm", "tune")
                for package in EXTRAS[name]
            ),
        ],
    },
)
