"""No tool greets its user with warnings of torch or detectron2 about their own code."""

import os
import re
import subprocess
import sys
import warnings

import pytest
import torch
import torchvision
from test_train_net import ROOT, files, write_config  # noqa: F401  a fixture

from crosskd_ifc import ConfigError
from crosskd_ifc.common.config_files import find_config

TOOLS = os.path.join(ROOT, "tools")


def told(tool, *words, folder, python=()):
    """All that a tool prints in an environment without settings, which must not fail."""
    environment = {
        **{key: os.environ[key] for key in ("PATH", "LD_LIBRARY_PATH") if key in os.environ},
        **{"HOME": str(folder), "FVCORE_CACHE": str(folder), "CUDA_VISIBLE_DEVICES": ""},
        **{"PYTHONPATH": os.path.join(ROOT, "projects"), "OMP_NUM_THREADS": "1"},
    }
    command = [sys.executable, *python, os.path.join(TOOLS, tool), *map(str, words)]
    done = subprocess.run(
        command, env=environment, cwd=ROOT, capture_output=True, text=True, timeout=600
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return done.stdout + done.stderr


def noise(text):
    lines = [line for line in text.splitlines() if "Build settings" not in line]  # compiler flags
    return [line for line in lines if re.search(r"Warning\b|deprecat|fx_tracing", line)]


@pytest.fixture(scope="module")
def trained(files, tmp_path_factory):  # noqa: F811
    """(config, checkpoint, what the training has printed) of two steps and an evaluation."""
    folder = tmp_path_factory.mktemp("quiet")
    config, out = write_config(files, folder)
    text = told("train_net.py", "--config-file", config, "SOLVER.MAX_ITER", 2, folder=folder)
    return config, out / "model_final.pth", text


def test_training_and_evaluation_start_quietly(trained):
    assert "Evaluate annotation type *bbox*" in trained[2]
    assert noise(trained[2]) == []


@pytest.mark.slow
def test_several_processes_start_quietly(files, tmp_path):  # noqa: F811
    config, _ = write_config(files, tmp_path)
    words = ("--num-gpus", 2, "--config-file", config, "SOLVER.MAX_ITER", 1, "TEST.EVAL_PERIOD", 0)
    assert noise(told("train_net.py", *words, folder=tmp_path)) == []


def test_the_tools_for_a_trained_student_start_quietly(trained, tmp_path):
    config, checkpoint, _ = trained
    text = told("export_student.py", checkpoint, tmp_path / "out", folder=tmp_path)
    words = ("--config-file", config, "--num", 1, "MODEL.WEIGHTS", checkpoint)
    text += told("visualize.py", *words, folder=tmp_path)
    words = ("--config-file", config, "--device", "cpu", "--rounds", 1, "--batch", 1)
    text += told("benchmark.py", *words, "--image-size", 64, 64, "--rois", 8, folder=tmp_path)
    assert noise(text) == []


@pytest.mark.slow
def test_the_tools_without_a_model_start_quietly(files, tmp_path):  # noqa: F811
    torch.save(torchvision.models.resnet18().state_dict(), tmp_path / "resnet18.pth")
    text = told(
        "convert_weights.py", tmp_path / "resnet18.pth", tmp_path / "R-18.pth", folder=tmp_path
    )
    text += told("prepare_data.py", "check", files / "card.yaml", folder=tmp_path)
    text += told("compare.py", "--help", folder=tmp_path)
    text += told("demo.py", "--help", folder=tmp_path)
    assert noise(text) == []


def test_a_warning_of_other_code_is_shown(tmp_path):
    script = tmp_path / "script.py"
    script.write_text(
        "import warnings\nimport crosskd_ifc\n"
        "warnings.warn('`torch.jit.script` is deprecated', FutureWarning)\n"
    )
    assert noise(told(str(script), folder=tmp_path))


@pytest.mark.parametrize("place", ["/nowhere", ".."])
def test_a_path_is_not_looked_for_in_the_model_zoo(place):
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # pkg_resources warns of such names
        with pytest.raises(ConfigError, match=r"was not found. Tried:(.*\n)+.*model zoo: "):
            find_config(f"{place}/teacher.yaml", key="--config-file")
