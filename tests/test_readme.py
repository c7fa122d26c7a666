"""What the README says is so."""

import json
import os
import re
import statistics

import pytest

ROOT = os.path.join(os.path.dirname(__file__), "..")
TITLES = {
    "teacher": "teacher R34",
    "student": "student R18, plain",
    "crosskd": "student R18, CrossKD",
    "crosskd_ifc": "student R18, CrossKD-IFC",
}


def read(*path):
    with open(os.path.join(ROOT, *path)) as f:
        return f.read()


@pytest.mark.parametrize("arm", TITLES)
def test_the_demos_table_is_that_of_the_recorded_runs(arm):
    runs = [
        r for r in json.loads(read("benchmarks", "demo", "seeds.json"))["runs"] if r["arm"] == arm
    ]
    cells = []
    for key in ("AP", "AP50"):
        values = [r[key] for r in runs]
        cells.append(f"{statistics.mean(values):.1f} ± {statistics.stdev(values):.1f}")
    cells.append(" / ".join(f"{r['AP']:.1f}" for r in sorted(runs, key=lambda r: r["seed"])))
    assert f"| {TITLES[arm]} | {' | '.join(cells)} |" in read("README.md")


def test_the_table_of_mask_losses_is_that_of_the_recorded_runs():
    runs = json.loads(read("benchmarks", "mask_rcnn", "mask_loss.json"))["runs"]
    text, prefix = read("docs", "options.md"), "MODEL.CROSSKD.LOSS.MASK_"
    for run in runs:
        names = [run["opts"].get(prefix + key) for key in ("REDUCTION", "CHANNELS")]
        cells = f"| `{names[0]}` | `{names[1]}`" if names[0] else "| (no mask loss) |"
        weight = f"{run['opts'][prefix + 'WEIGHT']:g}"
        assert f"{cells} | {weight} | {run['mask_AP']:.1f} | {run['AP']:.1f} |" in text


@pytest.mark.parametrize("document", ["README.md", "tools/README.md", "docs/options.md"])
def test_files_that_a_document_names_exist(document):
    text = read(document)
    folder = os.path.join(ROOT, os.path.dirname(document))
    links = [link for link in re.findall(r"\]\(([^)#]+)\)", text) if "://" not in link]
    assert all(os.path.exists(os.path.join(folder, link)) for link in links), links
    named = re.findall(r"(?:tools|configs)/[\w/-]+\.(?:py|yaml)", text)
    assert all(os.path.exists(os.path.join(ROOT, name)) for name in named), named
