"""Tiny detectors and batches. Everything is real detectron2, only narrow."""

import importlib.util
import os
from types import ModuleType
from typing import Callable, List, Optional, Sequence

import torch
import torch.distributed as dist
from detectron2.config import CfgNode, get_cfg
from detectron2.modeling import build_model
from detectron2.structures import BitMasks, Boxes, Instances, Keypoints
from detectron2.utils.events import EventStorage
from torch.multiprocessing import start_processes

from crosskd_ifc import add_crosskd_ifc_config, attach_teacher

IMAGE_SIZE = 64
_TOOLS = os.path.join(os.path.dirname(__file__), "..", "tools")


def load_tool(name: str) -> ModuleType:
    """A script of tools/ as a new module; its name without ``.py``."""
    spec = importlib.util.spec_from_file_location(name, os.path.join(_TOOLS, f"{name}.py"))
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def tiny_cfg(*opts, architecture: str = "CrossKDRCNN") -> CfgNode:
    """A Faster R-CNN of some 100,000 parameters, without layers that use batch statistics.

    Args:
        opts: KEY, VALUE, ... on top.
        architecture: "GeneralizedRCNN" comes with StandardROIHeads.
    """
    cfg = get_cfg()
    add_crosskd_ifc_config(cfg)
    plain = architecture == "GeneralizedRCNN"
    settings = {
        "MODEL.DEVICE": "cpu",
        "MODEL.META_ARCHITECTURE": architecture,
        "MODEL.BACKBONE.NAME": "build_resnet_fpn_backbone",
        "MODEL.RESNETS.OUT_FEATURES": ["res2", "res3", "res4", "res5"],
        "MODEL.RESNETS.STEM_OUT_CHANNELS": 8,
        "MODEL.RESNETS.RES2_OUT_CHANNELS": 16,
        "MODEL.RESNETS.WIDTH_PER_GROUP": 4,
        "MODEL.FPN.IN_FEATURES": ["res2", "res3", "res4", "res5"],
        "MODEL.FPN.OUT_CHANNELS": 8,
        "MODEL.ANCHOR_GENERATOR.SIZES": [[8], [16], [32], [48], [64]],
        "MODEL.ANCHOR_GENERATOR.ASPECT_RATIOS": [[0.5, 1.0, 2.0]],
        "MODEL.RPN.IN_FEATURES": ["p2", "p3", "p4", "p5", "p6"],
        "MODEL.RPN.PRE_NMS_TOPK_TRAIN": 50,
        "MODEL.RPN.PRE_NMS_TOPK_TEST": 50,
        "MODEL.RPN.POST_NMS_TOPK_TRAIN": 50,
        "MODEL.RPN.POST_NMS_TOPK_TEST": 50,
        "MODEL.ROI_HEADS.NAME": "StandardROIHeads" if plain else "CrossKDROIHeads",
        "MODEL.ROI_HEADS.IN_FEATURES": ["p2", "p3", "p4", "p5"],
        "MODEL.ROI_HEADS.NUM_CLASSES": 3,
        "MODEL.ROI_HEADS.BATCH_SIZE_PER_IMAGE": 16,
        # Random weights score low; keep enough detections to compare.
        "MODEL.ROI_HEADS.SCORE_THRESH_TEST": 0.01,
        "MODEL.ROI_BOX_HEAD.NAME": "FastRCNNConvFCHead",
        "MODEL.ROI_BOX_HEAD.NUM_FC": 2,
        "MODEL.ROI_BOX_HEAD.FC_DIM": 16,
        "MODEL.ROI_BOX_HEAD.CONV_DIM": 8,
        "MODEL.ROI_BOX_HEAD.POOLER_RESOLUTION": 7,
        "INPUT.MIN_SIZE_TRAIN": (IMAGE_SIZE,),
        "INPUT.MIN_SIZE_TEST": IMAGE_SIZE,
        "DATALOADER.NUM_WORKERS": 0,
        "SOLVER.IMS_PER_BATCH": 2,
        "SOLVER.BASE_LR": 0.001,
    }
    cfg.merge_from_list([x for pair in settings.items() for x in pair])
    cfg.merge_from_list(list(opts))
    return cfg


def _in_both(rank, store, work, answers):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
    answers.put((rank, work(rank)))
    dist.destroy_process_group()


def answers_of_two(folder, work: Callable) -> list:
    """What ``work`` returns for its rank in each of two processes."""
    answers = torch.multiprocessing.get_context("fork").SimpleQueue()
    arguments = (str(folder / "store"), work, answers)
    start_processes(_in_both, arguments, nprocs=2, start_method="fork")
    return [x for _, x in sorted(answers.get() for _ in range(2))]


def tiny_model(cfg: Optional[CfgNode] = None, *, seed: int = 0):
    """A detector with weights from a seed, its predictors far from their near-zero start.

    The pyramid's levels are scaled to unit deviation: frozen BatchNorm without trained statistics
    would let activations grow with depth.
    """
    torch.manual_seed(seed)
    model = build_model(tiny_cfg() if cfg is None else cfg)
    with torch.no_grad():
        levels = model.backbone(model.preprocess_image(tiny_batch()).tensor)
        for i in range(2, 6):
            output = model.backbone.get_submodule(f"fpn_output{i}")
            output.weight /= levels[f"p{i}"].std()
    predictors = model.roi_heads.box_predictor
    for predictor in predictors if isinstance(predictors, torch.nn.ModuleList) else [predictors]:
        torch.nn.init.normal_(predictor.cls_score.weight, std=0.5)
        torch.nn.init.normal_(predictor.bbox_pred.weight, std=0.1)
    return model


def tiny_batch(
    *,
    seed: int = 0,
    images: int = 2,
    boxes_per_image: Sequence[int] = (2, 3),
    masks: bool = False,
    keypoints: int = 0,
) -> List[dict]:
    """Raw images (uint8, C x H x W) with random boxes, as detectron2's mapper gives them, and so
    many visible keypoints on the diagonal of each box."""
    g = torch.Generator().manual_seed(seed)
    batch = []
    for i in range(images):
        count = boxes_per_image[i % len(boxes_per_image)]
        corner = torch.rand(count, 2, generator=g) * 30
        size = 12 + torch.rand(count, 2, generator=g) * 20
        instances = Instances((IMAGE_SIZE, IMAGE_SIZE))
        instances.gt_boxes = Boxes(torch.cat([corner, corner + size], dim=1))
        instances.gt_classes = torch.randint(0, 3, (count,), generator=g)
        if masks:
            instances.gt_masks = BitMasks(torch.ones(count, IMAGE_SIZE, IMAGE_SIZE))
        if keypoints:
            place = (torch.arange(keypoints).view(1, -1, 1) + 0.5) / keypoints
            points = corner.unsqueeze(1) + place * size.unsqueeze(1)
            visible = torch.full((count, keypoints, 1), 2.0)
            instances.gt_keypoints = Keypoints(torch.cat([points, visible], dim=2))
        image = torch.randint(0, 256, (3, IMAGE_SIZE, IMAGE_SIZE), generator=g, dtype=torch.uint8)
        batch.append(
            {"image": image, "instances": instances, "height": IMAGE_SIZE, "width": IMAGE_SIZE}
        )
    return batch


def distilling(
    *opts, teacher_opts: Sequence = (), student_seed: int = 1, teacher_seed: int = 2, teacher=None
):
    """(student, teacher) of tiny configs, attached, the student in training mode."""
    cfg = tiny_cfg(*opts)
    student = tiny_model(cfg, seed=student_seed)
    if teacher is None:
        teacher = tiny_model(tiny_cfg(*teacher_opts), seed=teacher_seed)
    attach_teacher(student, cfg, teacher=teacher)
    return student.train(), teacher


def train_losses(model, batch, *, seed: int = 0, iteration: int = 0):
    """One training forward at a fixed random state; returns (losses, storage)."""
    torch.manual_seed(seed)
    with EventStorage(iteration) as storage:
        return model(batch), storage


def check_mimic_both(pair, inputs, key):
    """``MIMIC both`` adds a loss of cross-head and own predictions; ``pair`` makes a student."""
    cross, own, both = (
        train_losses(pair("MODEL.CROSSKD.MIMIC", mimic)[0], inputs)[0][key]
        for mimic in ("cross_head", "student_head", "both")
    )
    assert own > 0
    torch.testing.assert_close(both, cross + own)
