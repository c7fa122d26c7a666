"""docs/tutorial.md, word by word: its commands run, and print what the page shows."""

import os
import re
import shlex
from pathlib import Path

import pytest
from PIL import Image
from test_own_photos import TINY

REPO = Path(__file__).resolve().parents[2]
PAGE = (REPO / "docs" / "tutorial.md").read_text()
BUILT_IN, OWN = PAGE.split("\n## Your own photos\n")
BCCD = Path(os.environ.get("CROSSKD_IFC_BCCD") or REPO / "../shared/data/bccd").resolve()
STEP = re.compile(
    r"^    python tools/(\S+) ((?:[^\n]*\\\n)*[^\n]*)\n(?:\n```text\n(.*?)\n```)?", re.M | re.S
)
# What makes a training short. The rest of the line is the page's.
SHORT = (
    "SOLVER.MAX_ITER 2 SOLVER.STEPS () SOLVER.WARMUP_ITERS 1 SOLVER.IMS_PER_BATCH 2 "
    "SOLVER.BASE_LR 0.001 MODEL.ROI_HEADS.SCORE_THRESH_TEST 0.001"
).split()
NUMBER = r"(?:nan|-?\d[\d,.]*)"


def steps(part):
    """(tool, its words, the lines that the page shows) of each command."""
    for tool, words, shown in STEP.findall(part):
        lines = [line for line in shown.splitlines() if line.strip(" .")]
        yield tool, shlex.split(words.replace("\\\n", "")), lines


def is_printed(line, output, *, exact):
    """Whether a line of the page is in the output; "..." is anything, and so are numbers unless
    ``exact``, and spaces."""
    words = re.escape(" ".join(line.split())).replace(r"\.\.\.", ".*").replace(r"\ ", r"\s*")
    words = re.sub(r"(\\?-){2,}", "-+", words)
    if not exact:
        words = re.sub(r"nan|(\\-)?\d([\d,]|\\\.(?=\d))*", lambda _: NUMBER, words)
    return re.search(words, output) is not None


def follow(part, run_tool, *, training=(), exact=False):
    """Run the commands of a part of the page, trainings with more KEY VALUE pairs."""
    seen = []
    for tool, words, lines in steps(part):
        output = run_tool(tool, *words, *(training if tool == "train_net.py" else ()))
        output = re.sub(r"\x1b\[\d+m", "", output)  # colours
        output = output.replace(f"{REPO}/tools/", "tools/")  # as in the repository
        missing = [line for line in lines if not is_printed(line, output, exact=exact)]
        assert not missing, f"{tool} {words}\nnot printed: {missing}\nbut:\n{output[-9000:]}"
        seen.append(tool)
    return seen


@pytest.fixture
def clean_folder(tmp_path, monkeypatch):
    (tmp_path / "configs").symlink_to(REPO / "configs")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_the_built_in_data(clean_folder, run_tool, built_in_at):
    root = re.search(r"root  (\S+)", BUILT_IN).group(1)
    built_in_at(root, {"train": 4, "val": 2, "test": 2})
    seen = follow(BUILT_IN, run_tool, training=SHORT)
    assert len(seen) == 8 and seen[-1] == "predict.py"
    program = re.search(r"```python\n(.*?)```", BUILT_IN, re.S).group(1)
    exec(compile(program, "tutorial.md", "exec"), {})


@pytest.fixture
def own_photos(clean_folder, run_tool):
    """What the page says of photos until the configs are there, followed; the rest of it."""
    if not BCCD.is_dir():
        pytest.skip(f"no blood-cell photos in {BCCD}")
    (clean_folder / "PHOTOS").symlink_to(BCCD)
    prepare, train = OWN.split("### Train, export, use")
    assert follow(prepare, run_tool, exact=True) == ["prepare_data.py"] * 3
    return [words for _, words, _ in steps(prepare)][-1], train


def test_photos_of_ones_own_until_the_training(own_photos):
    assert Image.open("own/boxes.png").width > 1000


@pytest.mark.slow
def test_photos_of_ones_own(own_photos, run_tool):
    words, train = own_photos
    # Without a download and a GPU.
    run_tool("prepare_data.py", *words, "--from-scratch", "--gpus", 0, "--force")
    tiny = [*TINY, "MODEL.CROSSKD.TEACHER.OPTS", repr(tuple(TINY))]
    assert follow(train, run_tool, training=tiny) == [
        *("train_net.py", "train_net.py", "train_net.py", "export_student.py"),
        *("predict.py", "train_net.py", "report.py"),
    ]
