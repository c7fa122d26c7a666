"""Names that other people's code and configs rely on."""

import importlib

import pytest
from detectron2.data import DatasetCatalog
from detectron2.modeling import META_ARCH_REGISTRY, ROI_HEADS_REGISTRY
from detectron2.modeling.proposal_generator import PROPOSAL_GENERATOR_REGISTRY

import crosskd_ifc

PUBLIC = (
    *("FCOS", "FEATURE_FUSION_REGISTRY", "ConfigError", "CrossKDFCOS", "CrossKDRCNN", "CrossKDRPN"),
    *("CrossKDROIHeads", "CrossKDCascadeROIHeads", "CrossKDRetinaNet", "CrossKDTrainer", "Teacher"),
    *("add_crosskd_ifc_config", "attach_teacher"),
    *("confident_giou", "confident_iou", "confident_l1", "kl_divergence", "pkd", "quality_focal"),
    *("standardize_like", "channel_wise", "dist", "decoupled_kl", "gap_giou", "score_gap"),
    "BOX_LOSS_REGISTRY",
)
# Module -> what docs promise of it, wherever the code itself lies.
PATHS = {
    "crosskd_ifc.losses": (
        *("confident_giou", "confident_iou", "confident_l1", "kl_divergence", "pkd"),
        "quality_focal",
    ),
    "crosskd_ifc.fusion": (
        *("FEATURE_FUSION_REGISTRY", "FeatureFusion", "SumFusion", "standardize_like"),
    ),
    "crosskd_ifc.trainer": ("CrossKDTrainer", "set_fusion_weight_decay"),
    "crosskd_ifc.stream": ("TrainingStream", "usable_records"),
    "crosskd_ifc.data": ("register_card", "register_cards"),
}
REGISTERED = {
    "CrossKDRCNN": META_ARCH_REGISTRY,
    "CrossKDRetinaNet": META_ARCH_REGISTRY,
    "CrossKDFCOS": META_ARCH_REGISTRY,
    "FCOS": META_ARCH_REGISTRY,
    "CrossKDROIHeads": ROI_HEADS_REGISTRY,
    "CrossKDCascadeROIHeads": ROI_HEADS_REGISTRY,
    "CrossKDRPN": PROPOSAL_GENERATOR_REGISTRY,
}


@pytest.mark.parametrize("name", PUBLIC)
def test_a_public_name_is_there(name):
    assert name in crosskd_ifc.__all__ and getattr(crosskd_ifc, name) is not None


@pytest.mark.parametrize("module", PATHS)
def test_a_promised_path_can_be_imported(module):
    found = importlib.import_module(module)
    assert [name for name in PATHS[module] if not hasattr(found, name)] == []


@pytest.mark.parametrize("name", REGISTERED)
def test_a_class_is_registered_under_the_name_that_configs_use(name):
    assert REGISTERED[name].get(name).__name__ == name


def test_fusions_keep_their_names():
    wanted = {"none", "sum", "mean", "weighted", "attention", "concat", "dropout", "residual"}
    assert wanted <= set(crosskd_ifc.FEATURE_FUSION_REGISTRY.names())


@pytest.mark.parametrize("split", ["train", "val", "test"])
def test_the_built_in_data_sets_are_registered(split):
    assert f"crosskd_shapes_{split}" in DatasetCatalog
