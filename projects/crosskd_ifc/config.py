"""``MODEL.CROSSKD`` and the other keys of this project, with their defaults.

Imports nothing of the package.
"""

import contextlib
from typing import Iterator, List, Mapping, Tuple

from detectron2.config import CfgNode as CN
from detectron2.modeling import META_ARCH_REGISTRY

META_ARCHITECTURES = ("CrossKDRCNN", "CrossKDRetinaNet", "CrossKDFCOS")


class ConfigError(ValueError):
    """A setting that can't work; the message names the config key, what was given and what is
    possible."""


def add_crosskd_ifc_config(cfg: CN) -> None:
    """Add the keys of this project to a detectron2 config."""
    # Dataset cards (YAML files) to register before training and evaluation.
    cfg.DATASETS.CARDS = ()
    _add_fcos_config(cfg)
    _add_timm_config(cfg)
    _add_training_config(cfg)

    _C = cfg.MODEL.CROSSKD = CN()
    # False trains the student alone: stock detectron2, bit for bit.
    _C.ENABLED = True
    # Whose predictions learn to mimic the teacher's: "cross_head", the teacher's head on the
    # student's features, "student_head", the student's own (prediction mimicking, the classic
    # baseline), or "both".
    _C.MIMIC = "cross_head"
    # Python modules or .py files to import before anything is built, such as one that registers a
    # fusion of your own. This runs their code; a teacher's config can't name any.
    _C.IMPORTS = ()
    # Prefixes of the student's tensors that start from the teacher's weights where names and shapes
    # agree, such as ("backbone.fpn", "proposal_generator").
    _C.INHERIT = ()

    _C.TEACHER = CN()
    # The teacher's own config: a file, or a model-zoo name such as
    # COCO-Detection/faster_rcnn_R_50_FPN_1x.yaml. One that ends in .py is a LazyConfig, which is
    # code that is run.
    _C.TEACHER.CONFIG_FILE = ""
    # The teacher's trained weights, a file or URL. Empty: the zoo's checkpoint, for a model-zoo
    # name only.
    _C.TEACHER.WEIGHTS = ""
    # KEY VALUE pairs that override the teacher's config; for a LazyConfig its own syntax, such as
    # "model.roi_heads.num_classes=3".
    _C.TEACHER.OPTS = ()
    # Precision of the teacher's gradient-free forward: "float32", "bfloat16" or "float16".
    _C.TEACHER.PRECISION = "float32"
    # Which teacher class each student class is. (): the same, in the same order. ("teacher",): the
    # teacher has other classes, and cross-head predictions are in them. ("names",): equal names in
    # both DATASETS.TRAIN. Pairs such as ("tv", "television") or ("tv", ""), no such class, add to
    # or replace the names.
    _C.TEACHER.CLASS_MAP = ()
    # Which box head of a Cascade R-CNN teaches a student that has one: 1 to 3, or "mean" (also
    # None), the mean of the losses against each. None for all others.
    _C.TEACHER.STAGE = None
    # Evaluate the teacher on DATASETS.TEST before the first step.
    _C.TEACHER.EVAL_AT_START = False

    # Several teachers: for each a {KEY: VALUE, ...} of TEACHER's keys, over those of TEACHER. One
    # with a CONFIG_FILE takes neither WEIGHTS nor OPTS over. (): the one teacher of TEACHER.
    _C.TEACHERS = ()
    # "mean": of their losses; "one": that of a teacher drawn in each step, at the cost of one.
    _C.TEACHERS_LOSS = "mean"

    _C.FUSION = CN()
    # How the tapped features are combined: "none", by their losses alone, one for each; or into one
    # feature, by a key of FEATURE_FUSION_REGISTRY such as "sum", "mean", "weighted", "attention",
    # "concat", "dropout", "residual". Empty: "none", dense detectors "mean".
    _C.FUSION.NAME = ""
    # The student's layers to tap: pool, conv1, ..., fc1, ... Empty: pool and those fc layers that
    # both box heads have, for one combined feature ("fc1", "fc2"); RetinaNet conv1 to conv3, FCOS
    # conv1 and conv2, with "none" from the deepest on.
    _C.FUSION.IN_FEATURES = ()
    # The teacher's layer whose output the combined feature replaces. Empty: the last of its box
    # head; of dense detectors the deepest tap.
    _C.FUSION.ENTRY = ""
    # "direct": each tap jumps to ENTRY; "through": it runs the teacher's layers from its own depth
    # to ENTRY. Empty: "direct"; for taps of a box head that aren't combined "through".
    _C.FUSION.ROUTE = ""
    # "none", or to the channel statistics of the teacher's feature at ENTRY: "standardize" the
    # combined feature, or "standardize_taps", each before they are combined. Empty: "none", dense
    # detectors "standardize".
    _C.FUSION.ALIGN = ""
    # Taps that enter the combined feature without gradient to the student.
    _C.FUSION.DETACH = ()
    # Weight decay of all learned adapters and fusion weights, in place of SOLVER.WEIGHT_DECAY.
    _C.FUSION.WEIGHT_DECAY = 0.0

    _C.LOSS = CN()
    # The losses of classes and boxes are FUSED_WEIGHT * L(combined feature) + the sum over the taps
    # of TAP_WEIGHTS[i] * L(tap i alone), in the order of FUSION.IN_FEATURES. (): no such terms, but
    # with FUSION.NAME "none" and several taps 1 for the first and 0.5 for the others.
    _C.LOSS.FUSED_WEIGHT = 1.0
    _C.LOSS.TAP_WEIGHTS = ()
    # Classification loss, weight and temperature: a key of CLS_LOSS_REGISTRY, such as "kl", "dkd",
    # "dist", and NAME VALUE pairs of its own settings. Dense detectors and teachers with
    # USE_SIGMOID_CE have quality focal, without type and temperature (for dense ones CrossKD sets
    # its weight to 1.0 and, for FCOS, 0.4).
    _C.LOSS.CLS_TYPE = "kl"
    _C.LOSS.CLS_OPTS = ()
    _C.LOSS.CLS_WEIGHT = 0.5
    _C.LOSS.TEMPERATURE = 3.0
    # Box loss and its weight: "l1" on raw deltas or "giou" on decoded boxes; of dense detectors a
    # key of BOX_LOSS_REGISTRY, "giou", "iou", "bckd". Empty: "l1", RetinaNet "giou", FCOS "iou".
    _C.LOSS.BOX_TYPE = ""
    _C.LOSS.BOX_WEIGHT = 1.0
    # Weight of the mask loss (Mask R-CNN); "mean" divides its sum by the number of terms,
    # "published" by the number of box RoIs, which needs a weight far below 1; all channels or only
    # the ground truth's. See docs/options.md for the measured difference.
    _C.LOSS.MASK_WEIGHT = 10.0
    _C.LOSS.MASK_REDUCTION = "mean"
    _C.LOSS.MASK_CHANNELS = "all"
    # Weight of the keypoint loss (Keypoint R-CNN).
    _C.LOSS.KEYPOINT_WEIGHT = 0.0
    # Weight of the feature loss on the pyramid's levels; its type, a key of FEATURE_LOSS_REGISTRY
    # such as "pkd", "cwd", "mgd", "fgd", and NAME VALUE pairs of its own settings. COMBINE compares
    # each teacher level with the sum of all the student's levels, resized to it, and not with the
    # same level alone.
    _C.LOSS.FEATURE_WEIGHT = 0.0
    _C.LOSS.FEATURE_TYPE = "pkd"
    _C.LOSS.FEATURE_OPTS = ()
    _C.LOSS.FEATURE_COMBINE = True
    # Names of the levels that are compared, such as ("p2", "p3"); (): all that both networks have.
    _C.LOSS.FEATURE_LEVELS = ()
    # Weight of RPN mimicking; needs MODEL.PROPOSAL_GENERATOR.NAME CrossKDRPN.
    _C.LOSS.RPN_WEIGHT = 0.0

    _C.SCHEDULE = CN()
    # Distil from this iteration on ...
    _C.SCHEDULE.START_ITER = 0
    # ... with losses that rise linearly over this many iterations ...
    _C.SCHEDULE.WARMUP_ITERS = 0
    # ... up to, not including, this iteration; -1: to the end. The teacher isn't run where the
    # factor is 0.
    _C.SCHEDULE.STOP_ITER = -1

    _C.DIAGNOSTICS = CN()
    # Log every so many iterations how the gradients of distillation and detection agree; 0: never.
    # Such a step has two partial backward passes more; see docs/options.md for the measured cost.
    _C.DIAGNOSTICS.GRAD_PERIOD = 0
    # Log the norm of the whole gradient and how much it varies; without a teacher, too.
    _C.DIAGNOSTICS.GRAD_NORM = False


def remove_crosskd_ifc_config(cfg: CN) -> None:
    """Take out what :func:`add_crosskd_ifc_config` has added, so that plain ``get_cfg()`` can merge
    the config."""
    del cfg.MODEL["CROSSKD"], cfg.MODEL["FCOS"], cfg.MODEL["TIMM"], cfg.DATASETS["CARDS"]
    del cfg.SOLVER["EMA_DECAY"], cfg.SOLVER["ACCUMULATE"], cfg.TEST["BEST_METRIC"], cfg["WANDB"]


def _add_training_config(cfg: CN) -> None:
    """What a training may have beside detectron2's."""
    # Keep an exponential moving average of the weights, updated after each step: old weights count
    # by this factor, such as 0.999; evaluated and saved beside the weights. 0: none.
    cfg.SOLVER.EMA_DECAY = 0.0
    # Run the SOLVER.IMS_PER_BATCH images of a step in so many parts, one after the other, for less
    # memory; their gradients are accumulated.
    cfg.SOLVER.ACCUMULATE = 1
    # Keep the weights that were best by this metric of the evaluations every TEST.EVAL_PERIOD, such
    # as "bbox/AP", in model_best.pth; with several DATASETS.TEST "NAME/bbox/AP"; "ema/bbox/AP": of
    # the average. Empty: don't.
    cfg.TEST.BEST_METRIC = ""
    # Log to this project of Weights & Biases, too, offline unless the environment variable
    # WANDB_MODE says otherwise. Empty: don't.
    cfg.WANDB = CN()
    cfg.WANDB.PROJECT = ""


def _add_timm_config(cfg: CN) -> None:
    """``MODEL.TIMM``, for MODEL.BACKBONE.NAME build_timm_fpn_backbone or
    build_timm_p6p7_fpn_backbone."""
    _C = cfg.MODEL.TIMM = CN()
    # A timm model, such as mobilenetv3_large_100; its features of strides 4 to 32 are res2 to res5.
    _C.NAME = ""
    # "": the norms that it comes with; "FrozenBN" or "SyncBN" in place of all its BatchNorms.
    _C.NORM = ""


def _add_fcos_config(cfg: CN) -> None:
    """``MODEL.FCOS``: detectron2 configures its FCOS without yacs, with these defaults."""
    _C = cfg.MODEL.FCOS = CN()
    _C.NUM_CLASSES = 80
    # Levels of the pyramid, from MODEL.BACKBONE.NAME build_crosskd_fcos_resnet_fpn_backbone.
    _C.IN_FEATURES = ["p3", "p4", "p5", "p6", "p7"]
    # Convolutions of each tower of the head, and their norm.
    _C.NUM_CONVS = 4
    _C.NORM = "GN"
    # Foreground probability that the classification starts from.
    _C.PRIOR_PROB = 0.01
    # Positions are positive within this distance from a box's centre, in units of the stride.
    _C.CENTER_SAMPLING_RADIUS = 1.5
    _C.FOCAL_LOSS_ALPHA = 0.25
    _C.FOCAL_LOSS_GAMMA = 2.0
    # Threshold of sqrt(class probability * centerness), candidates per level, NMS overlap.
    _C.SCORE_THRESH_TEST = 0.2
    _C.TOPK_CANDIDATES_TEST = 1000
    _C.NMS_THRESH_TEST = 0.6


def fusion_name(cfg: CN) -> str:
    """``MODEL.CROSSKD.FUSION.NAME``, also where it is left to the kind of detector."""
    usual = "none" if head_section(cfg) == "ROI_HEADS" else "mean"
    return cfg.MODEL.CROSSKD.FUSION.NAME or usual


def fusion_route(cfg: CN) -> str:
    """``MODEL.CROSSKD.FUSION.ROUTE``, also where it is left to detector and combination."""
    through = head_section(cfg) == "ROI_HEADS" and fusion_name(cfg) == "none"
    return cfg.MODEL.CROSSKD.FUSION.ROUTE or ("through" if through else "direct")


def _kinds(cfg: CN) -> List[str]:
    """The name of a config's architecture, and of the classes that it is."""
    name = cfg.MODEL.META_ARCHITECTURE
    kind = META_ARCH_REGISTRY.get(name) if name in META_ARCH_REGISTRY else None
    return [name, *(x.__name__ for x in getattr(kind, "__mro__", ()))]


def head_section(cfg: CN) -> str:
    """The section below MODEL with NUM_CLASSES and test thresholds of a config's detector."""
    dense = {"RetinaNet": "RETINANET", "FCOS": "FCOS"}
    names = (name.removeprefix("CrossKD") for name in _kinds(cfg))
    return next((dense[name] for name in names if name in dense), "ROI_HEADS")


def class_count(cfg: CN) -> Tuple[str, int]:
    """The config key that holds the number of foreground classes of a config's detector, and it."""
    section = head_section(cfg)
    return f"MODEL.{section}.NUM_CLASSES", cfg.MODEL[section].NUM_CLASSES


def teacher_configs(cfg: CN) -> List[Tuple[str, CN]]:
    """For each teacher the beginning of its errors, see :func:`error_prefix`, and the config of a
    student that has it alone: its settings in ``MODEL.CROSSKD.TEACHER``, ``TEACHERS`` ().

    Raises:
        ConfigError: if an item of TEACHERS isn't a section of TEACHER's keys.
    """
    found = []
    for i, entry in enumerate(cfg.MODEL.CROSSKD.TEACHERS):
        name, one = f"MODEL.CROSSKD.TEACHERS[{i}]: ", cfg.clone()
        one.defrost()
        kd = one.MODEL.CROSSKD
        if not isinstance(entry, Mapping):
            raise ConfigError(f"{name}{entry!r} is not a section such as {{'WEIGHTS': 'a.pth'}}")
        if "STAGE" in entry:
            kd.TEACHER.STAGE = None  # a number may follow a word
        if "CONFIG_FILE" in entry:
            kd.TEACHER.WEIGHTS, kd.TEACHER.OPTS = "", ()
        try:
            kd.TEACHER.merge_from_list([x for pair in entry.items() for x in pair])
        except (AssertionError, AttributeError, KeyError, ValueError) as error:
            raise ConfigError(f"{name}{error}") from error
        kd.TEACHERS, kd.TEACHERS_LOSS = (), "mean"
        found.append((name, one))
    return found or [("", cfg)]


@contextlib.contextmanager
def error_prefix(prefix: str) -> Iterator[None]:
    """Within this context a ConfigError begins with ``prefix``, which says whose it is."""
    try:
        yield
    except ConfigError as error:
        raise ConfigError(f"{prefix}{error}") from error


def distillation_requested(cfg: CN) -> bool:
    """Whether training this config needs a teacher.

    Raises:
        ConfigError: if architecture and teacher settings contradict each other, so that the run
            would silently be another one than its config says.
    """
    kd = cfg.MODEL.CROSSKD
    if not kd.ENABLED:
        return False
    architecture = cfg.MODEL.META_ARCHITECTURE
    missing = [x for x, one in teacher_configs(cfg) if not one.MODEL.CROSSKD.TEACHER.CONFIG_FILE]
    has_teacher, distils = not missing, not set(_kinds(cfg)).isdisjoint(META_ARCHITECTURES)
    if distils and missing:
        raise ConfigError(
            f"{missing[0]}MODEL.CROSSKD.TEACHER.CONFIG_FILE is empty, but {architecture} needs a "
            "teacher to train; set it (with TEACHER.WEIGHTS), or MODEL.CROSSKD.ENABLED False to "
            "train the student alone"
        )
    if not distils and has_teacher:
        raise ConfigError(
            f"MODEL.META_ARCHITECTURE is {architecture!r}, which can't distil, but "
            f"MODEL.CROSSKD.TEACHER.CONFIG_FILE is {kd.TEACHER.CONFIG_FILE!r}; set the "
            f"architecture to one of {', '.join(META_ARCHITECTURES)}, or MODEL.CROSSKD.ENABLED "
            "False"
        )
    return has_teacher
