"""What is checked of a run's config before models and data are built."""

import importlib.util
from typing import List, Sequence

import torch
from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.utils import comm

from ..common.config_files import default_values, flat
from ..common.environment import device_fault
from ..config import (
    META_ARCHITECTURES,
    ConfigError,
    class_count,
    distillation_requested,
    error_prefix,
    teacher_configs,
)
from ..data.cards import register_cards
from ..distillation.compatibility.settings import check_crosskd_config
from ..modeling.attach import check_teacher_weights
from ..weights.state_dicts import is_missing


def check_training_config(cfg: CfgNode) -> None:
    """Check what can be checked before models and data are built, and register the dataset cards.

    Raises:
        ConfigError: naming the key.
    """
    check_training_settings(cfg)
    if not cfg.DATASETS.TRAIN:
        raise ConfigError("DATASETS.TRAIN is empty: there is nothing to train on")


def check_training_settings(cfg: CfgNode, *, teachers_are_there: bool = True) -> None:
    """:func:`check_training_config` of a run whose training data may have no name.

    Args:
        teachers_are_there: False if the files of their weights come later.

    Raises:
        ConfigError: naming the key.
    """
    _check_stock_values(cfg)
    distils = distillation_requested(cfg)
    check_crosskd_config(cfg)
    for key in ("IMS_PER_BATCH", "MAX_ITER", "CHECKPOINT_PERIOD"):
        if cfg.SOLVER[key] < 1:
            raise ConfigError(f"SOLVER.{key} is {cfg.SOLVER[key]}; it must be at least 1")
    if not cfg.INPUT.MIN_SIZE_TRAIN:
        raise ConfigError("INPUT.MIN_SIZE_TRAIN is empty; give the lengths of images' shorter side")
    start = cfg.MODEL.CROSSKD.SCHEDULE.START_ITER
    if distils and start >= cfg.SOLVER.MAX_ITER:
        raise ConfigError(
            f"MODEL.CROSSKD.SCHEDULE.START_ITER is {start}, but training ends at SOLVER.MAX_ITER, "
            f"{cfg.SOLVER.MAX_ITER}: nothing would be distilled"
        )
    kd = cfg.MODEL.CROSSKD
    teachers = [(x, one.MODEL.CROSSKD.TEACHER) for x, one in teacher_configs(cfg) if distils]
    for name, teacher in teachers:
        with error_prefix(name):
            if teacher.WEIGHTS and teachers_are_there:
                check_teacher_weights(teacher.WEIGHTS)
    unused = ("FUSED_WEIGHT",) if cfg.MODEL.MASK_ON else ("FUSED_WEIGHT", "MASK_WEIGHT")
    weights = [v for k, v in kd.LOSS.items() if k.endswith("_WEIGHT") and k not in unused]
    if distils and not any(weights) and not kd.INHERIT:
        raise ConfigError(
            "MODEL.CROSSKD.LOSS: all weights are 0, so nothing would be distilled; set one, or "
            "MODEL.CROSSKD.ENABLED False"
        )
    if any(teacher.EVAL_AT_START for _, teacher in teachers) and not cfg.DATASETS.TEST:
        raise ConfigError(
            "MODEL.CROSSKD.TEACHER.EVAL_AT_START True needs a data set in DATASETS.TEST"
        )
    _check_comforts(cfg)
    if cfg.MODEL.DEVICE == "cpu" and cfg.SOLVER.AMP.ENABLED:
        raise ConfigError("SOLVER.AMP.ENABLED True needs a GPU, but MODEL.DEVICE is 'cpu'")
    _check_device_and_data(cfg, ("TRAIN", "TEST"))


def _check_comforts(cfg: CfgNode) -> None:
    """Check the average of the weights, the accumulation, the best weights and the writer.

    Raises:
        ConfigError: naming the key.
    """
    solver, metric = cfg.SOLVER, cfg.TEST.BEST_METRIC
    if not 0 <= solver.EMA_DECAY < 1:
        raise ConfigError(
            f"SOLVER.EMA_DECAY is {solver.EMA_DECAY}; it must be at least 0 (no average) and below "
            "1, such as 0.999"
        )
    images = solver.IMS_PER_BATCH // (solver.REFERENCE_WORLD_SIZE or comm.get_world_size())
    if solver.ACCUMULATE < 1 or images % solver.ACCUMULATE:
        raise ConfigError(
            f"SOLVER.ACCUMULATE is {solver.ACCUMULATE}; it must be at least 1 and divide the "
            f"{images} images that a process has in a step (of SOLVER.IMS_PER_BATCH "
            f"{solver.IMS_PER_BATCH})"
        )
    if metric and (cfg.TEST.EVAL_PERIOD < 1 or not cfg.DATASETS.TEST):
        raise ConfigError(
            f"TEST.BEST_METRIC is {metric!r}: it needs evaluations; set TEST.EVAL_PERIOD and "
            "DATASETS.TEST"
        )
    if metric.startswith("ema/") and not solver.EMA_DECAY:
        raise ConfigError(f"TEST.BEST_METRIC is {metric!r}, which needs SOLVER.EMA_DECAY")
    if cfg.WANDB.PROJECT and importlib.util.find_spec("wandb") is None:
        raise ConfigError(
            f"WANDB.PROJECT is {cfg.WANDB.PROJECT!r}, but the package wandb isn't installed; "
            "`pip install wandb`, or leave it empty"
        )


def check_evaluation_config(cfg: CfgNode) -> None:
    """As :func:`check_training_config` for an evaluation, which has no teacher and no training
    data.

    Raises:
        ConfigError: naming the key.
    """
    _check_stock_values(cfg)
    _check_device_and_data(cfg, ("TEST",))


def check_weights(cfg: CfgNode) -> None:
    """Refuse a MODEL.WEIGHTS that is a local path without a file.

    Raises:
        ConfigError: naming the key.
    """
    if cfg.MODEL.WEIGHTS and is_missing(cfg.MODEL.WEIGHTS):
        raise ConfigError(f"MODEL.WEIGHTS: there is no file {cfg.MODEL.WEIGHTS!r}")


def _check_stock_values(cfg: CfgNode) -> None:
    """Refuse what would show after the training, or as something else.

    Raises:
        ConfigError: naming the key.
    """
    before = default_values()
    for key, value in flat(cfg):
        if value is None and before.get(key) is not None:
            raise ConfigError(f"{key} is null; its default is {before[key]!r}")
    for expected in cfg.TEST.EXPECTED_RESULTS:
        kinds = (str, str, (int, float), (int, float))
        if (
            not isinstance(expected, (list, tuple))
            or len(expected) != 4
            or not all(map(isinstance, expected, kinds))
        ):
            raise ConfigError(
                f"TEST.EXPECTED_RESULTS: {expected!r} is not a list such as ['bbox', 'AP', 38.5, "
                "0.2]: task, metric, expected value, tolerance"
            )


def _check_device_and_data(cfg: CfgNode, splits: Sequence[str]) -> None:
    _check_device(cfg)
    register_cards(cfg.DATASETS.CARDS)
    for key in splits:
        for name in cfg.DATASETS[key]:
            if name not in DatasetCatalog.list():
                raise ConfigError(
                    f"DATASETS.{key}: no data set is called {name!r}; use a name of detectron2's, "
                    "crosskd_shapes_train, _val or _test, or describe your data in a dataset card "
                    "and name its file in DATASETS.CARDS"
                )
            check_class_count(cfg, name)


def evaluator_type(name: str) -> str:
    """The ``evaluator_type`` of a data set.

    Raises:
        ConfigError: if there is no evaluator for it.
    """
    kind = MetadataCatalog.get(name).get("evaluator_type", None)
    if kind not in ("coco", "pascal_voc"):
        raise ConfigError(
            f"DATASETS.TEST: data set {name!r} has evaluator_type {kind!r}; possible: 'coco', "
            "'pascal_voc' (for another one subclass CrossKDTrainer.build_evaluator)"
        )
    return kind


def check_best_metric(cfg: CfgNode) -> None:
    """Refuse a TEST.BEST_METRIC that our evaluators don't give.

    Raises:
        ConfigError: naming the key.
    """
    metric, sets = cfg.TEST.BEST_METRIC.removeprefix("ema/"), cfg.DATASETS.TEST
    # With several sets detectron2 writes each one's name before its metrics.
    given = [(f"{x}/" if len(sets) > 1 else "") + y for x in sets for y in _metrics(cfg, x)]
    if metric and not any(metric == x or x.endswith("-") and metric.startswith(x) for x in given):
        wholes = " or ".join(x for x in given if x.endswith("/AP"))
        parts = ("AP-CLASS" if "/AP-" in x else x.rpartition("/")[2] for x in given)
        raise ConfigError(
            f"TEST.BEST_METRIC is {cfg.TEST.BEST_METRIC!r}; expected {wholes} (the last "
            f"part may be {', '.join(dict.fromkeys(parts))}), with ema/ before it for the average "
            "of the weights"
        )


def _metrics(cfg: CfgNode, name: str) -> List[str]:
    """What our evaluators give of a data set; ``-`` at the end stands for any class."""
    metadata = MetadataCatalog.get(name)
    if metadata.get("evaluator_type", None) == "pascal_voc":
        return ["bbox/AP", "bbox/AP50", "bbox/AP75"]
    tasks = {"bbox": True, "segm": cfg.MODEL.MASK_ON, "keypoints": cfg.MODEL.KEYPOINT_ON}
    classes = metadata.get("thing_classes", None)
    if classes is None:  # it will know them when it is loaded
        classes = [""]
    elif len(classes) == 1:  # detectron2 leaves it out
        classes = []
    parts = ["AP", "AP50", "AP75", "APs", "APm", "APl", *(f"AP-{x}" for x in classes)]
    found = [f"{task}/{part}" for task, is_on in tasks.items() if is_on for part in parts]
    return [x for x in found if x != "keypoints/APs"]


def check_keypoint_sigmas(cfg: CfgNode) -> None:
    """Refuse keypoints that COCO's evaluation would stumble over after the training.

    Raises:
        ConfigError: naming the key.
    """
    count = cfg.MODEL.ROI_KEYPOINT_HEAD.NUM_KEYPOINTS
    sigmas = len(cfg.TEST.KEYPOINT_OKS_SIGMAS) or 17  # COCO's person
    if cfg.MODEL.KEYPOINT_ON and count != sigmas:
        raise ConfigError(
            f"TEST.KEYPOINT_OKS_SIGMAS has {len(cfg.TEST.KEYPOINT_OKS_SIGMAS)} values, but "
            f"MODEL.ROI_KEYPOINT_HEAD.NUM_KEYPOINTS is {count}; give one for each keypoint (() "
            "stands for COCO's 17)"
        )


def check_class_count(cfg: CfgNode, name: str, classes: Sequence[str] = ()) -> None:
    """Refuse a model of other classes: fewer fail deep inside the loss, more in the evaluator.

    Args:
        name: of the data set.
        classes: its class names, where its metadata don't know them.

    Raises:
        ConfigError: naming the key.
    """
    classes = classes or MetadataCatalog.get(name).get("thing_classes", ())
    stock = ("GeneralizedRCNN", "RetinaNet", "FCOS")
    if cfg.MODEL.META_ARCHITECTURE in (*stock, *META_ARCHITECTURES):
        key, ours = class_count(cfg)
        if classes and ours != len(classes):
            raise ConfigError(
                f"{key} is {ours}, but data set {name!r} has {len(classes)} classes; set it to "
                f"{len(classes)}"
            )


def _check_device(cfg: CfgNode) -> None:
    """Refuse a MODEL.DEVICE that this machine or process group can't run.

    Raises:
        ConfigError: naming the key.
    """
    fault = device_fault(cfg.MODEL.DEVICE)
    if fault:
        raise ConfigError(f"MODEL.DEVICE is {cfg.MODEL.DEVICE!r}, {fault}; add MODEL.DEVICE cpu")
    if cfg.MODEL.DEVICE == "cpu" and comm.get_world_size() > 1 and torch.cuda.is_available():
        raise ConfigError(
            "MODEL.DEVICE is 'cpu', but detectron2 starts its processes for the GPUs that it "
            "sees; run with CUDA_VISIBLE_DEVICES= (empty) to train with several CPU processes"
        )
