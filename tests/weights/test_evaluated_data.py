"""Data sets that exported files are evaluated on, usable and not."""

import pytest
from detectron2.data import MetadataCatalog
from test_cards import Voc
from test_deployed import images, make  # noqa: F401  a fixture

from crosskd_ifc.data.cards import register_card
from crosskd_ifc.weights.evaluating import evaluate_checkpoint, evaluate_deployed
from crosskd_ifc.weights.export import export_student

TWO = ("MODEL.ROI_HEADS.NUM_CLASSES", 2)


@pytest.fixture(scope="module")
def exported(tmp_path_factory, images):  # noqa: F811
    """(checkpoint, folder of the exported file) of a student of two classes without names."""
    folder = tmp_path_factory.mktemp("student")
    run, _ = make("Faster R-CNN", folder / "run", *TWO)
    export_student(run, str(folder / "out"), format="torchscript", images=images)
    return run, str(folder / "out")


def test_a_voc_folder_is_evaluated_as_often_as_asked(exported, tmp_path):
    run, out = exported
    name = register_card(str(Voc(tmp_path).card))[0]
    found = evaluate_deployed(out, name), evaluate_checkpoint(run, name)
    assert found[0]["bbox"].keys() == found[1]["bbox"].keys()
    assert "json_file" not in MetadataCatalog.get(name).as_dict()
