"""The frozen teacher: built from its own config, loaded strictly, fed from the student's raw
images.

Shape shorthand: N images, R RoIs over all images, K the teacher's foreground classes.
"""

import contextlib
import logging
from typing import Dict, Iterator, List, Mapping, Optional, Sequence, Tuple

import torch
from detectron2 import model_zoo
from detectron2.config import CfgNode, get_cfg
from detectron2.modeling import build_model
from detectron2.structures import ImageList
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from ..common.config_files import find_config, merge_from_file, merge_from_list
from ..common.random_state import same_random_state
from ..config import ConfigError, add_crosskd_ifc_config, check_crosskd_config
from ..weights.reading import MisfitError, StrictReader
from ..weights.state_dicts import is_missing

logger = logging.getLogger(__name__)


class Teacher:
    """A complete, frozen detector that answers for the student's images.

    A plain object, not a module: the detector stays out of the student's parameters, state dict,
    optimizer, DDP and checkpoints, and out of reach of its ``train()``.

    Attributes:
        model: the detector, in eval mode, no parameter requiring gradient.
        cfg: the config it was built from, None if it was given as a model.
        description: where it came from, for messages.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        student_format: str,
        precision: str = "float32",
        cfg: Optional[CfgNode] = None,
        description: str = "the given detector",
    ):
        """
        Args:
            model: a detectron2 detector with weights.
            student_format: channel order of the student's images, such as "BGR" (its INPUT.FORMAT).
            precision: of :meth:`autocast`'s context, "float32", "bfloat16" or "float16".
            cfg: the teacher's config.
            description: where the weights are from.

        Raises:
            ConfigError: if the student's images can't be turned into the teacher's channel order.
        """
        self.model = model.eval().requires_grad_(False)
        self.cfg = cfg
        self.description = description
        self.dtype: torch.dtype = getattr(torch, precision)
        # A detector without a format of its own is refused later, by what the student needs.
        formats = (student_format, getattr(model, "input_format", student_format))
        if formats[0] != formats[1] and set(formats) != {"RGB", "BGR"}:
            raise ConfigError(
                f"INPUT.FORMAT: the student reads {formats[0]!r} images and the teacher "
                f"({description}) {formats[1]!r}; only RGB and BGR can be turned into each other"
            )
        self._swap_channels = formats[0] != formats[1]

    @property
    def device(self) -> torch.device:
        return self.model.device

    def to(self, device: torch.device) -> "Teacher":
        """Move to a device; the precision stays."""
        self.model.to(device)
        return self

    def swap_channels(self, batched_inputs: Sequence[Mapping]) -> List[dict]:
        """The student's raw images in the teacher's channel order, other fields unchanged."""
        if not self._swap_channels:
            return list(batched_inputs)
        return [{**x, "image": x["image"].flip(0)} for x in batched_inputs]

    def preprocess(self, batched_inputs: Sequence[Mapping]) -> ImageList:
        """The student's raw images as the teacher's input: channel order first, then mean, std."""
        return self.model.preprocess_image(self.swap_channels(batched_inputs))

    @contextlib.contextmanager
    def autocast(self) -> Iterator[None]:
        """No gradient, and the teacher's precision, also where the student trains under
        autocast."""
        low = self.dtype != torch.float32
        dtype = self.dtype if low else None
        with torch.no_grad(), torch.autocast(self.device.type, dtype=dtype, enabled=low):
            yield

    def features(
        self, batched_inputs: Sequence[Mapping[str, torch.Tensor]]
    ) -> Dict[str, torch.Tensor]:
        """Backbone features of the student's raw images, feature name -> (N, C, H, W); no
        gradient."""
        with self.autocast():
            return self.model.backbone(self.preprocess(batched_inputs).tensor)


def attach_teacher(
    model: nn.Module, cfg: CfgNode, *, teacher: Optional[nn.Module] = None
) -> Teacher:
    """Build, load, check and freeze the teacher and let ``model`` distil from it.

    From then on ``model(batched_inputs)`` in training mode returns the distillation losses too,
    which is all that a training loop needs. Call it before the optimizer and DDP are made: learned
    adapters, if the two heads need any, become parameters of ``model`` (``fusion.*``). The global
    random state is left as it was.

    Args:
        model: a student of a CrossKD meta-architecture, such as :class:`CrossKDRCNN`.
        cfg: the student's config, with ``MODEL.CROSSKD``.
        teacher: an already built detector with weights, instead of
            ``MODEL.CROSSKD.TEACHER.CONFIG_FILE``; it is put into eval mode and frozen in place.

    Returns:
        The attached teacher.

    Raises:
        ConfigError: if a setting can't work or student and teacher don't fit each other.
    """
    check_crosskd_config(cfg)
    if isinstance(model, DistributedDataParallel):
        raise ConfigError("attach the teacher to the model before it is wrapped in DDP")
    if not hasattr(model, "set_teacher"):
        raise ConfigError(
            f"MODEL.META_ARCHITECTURE: {type(model).__name__} can't distil; use CrossKDRCNN, "
            "CrossKDRetinaNet or CrossKDFCOS"
        )
    kd = cfg.MODEL.CROSSKD
    with same_random_state(model.device):
        options = {"student_format": cfg.INPUT.FORMAT, "precision": kd.TEACHER.PRECISION}
        if teacher is None:
            built = _build_teacher(cfg, model.device, options)
        else:
            built = Teacher(teacher.to(model.device), **options)
        model.set_teacher(built, cfg)
    logger.info(f"Teacher: {built.description}")
    return built


def _build_teacher(cfg: CfgNode, device: torch.device, options: Dict[str, str]) -> Teacher:
    kd = cfg.MODEL.CROSSKD.TEACHER
    if not kd.CONFIG_FILE:
        raise ConfigError(
            "MODEL.CROSSKD.TEACHER.CONFIG_FILE is empty; give a config file or a model-zoo name"
        )
    teacher_cfg, weights = load_teacher_config(cfg)
    teacher_cfg.MODEL.DEVICE = str(device)
    try:
        model = build_model(teacher_cfg)
    except (AssertionError, KeyError, TypeError, ValueError) as error:
        raise ConfigError(
            f"MODEL.CROSSKD.TEACHER.CONFIG_FILE {kd.CONFIG_FILE!r} with TEACHER.OPTS "
            f"{tuple(kd.OPTS)} builds no model: {type(error).__name__} {error}"
        ) from error
    _load_strictly(model, weights)
    description = f"{type(model).__name__} from {kd.CONFIG_FILE} with weights {weights}"
    return Teacher(model, cfg=teacher_cfg, description=description, **options)


def load_teacher_config(cfg: CfgNode) -> Tuple[CfgNode, str]:
    """The teacher's full config, and the file or URL of its weights.

    Args:
        cfg: the student's config.

    Raises:
        ConfigError: if the config can't be found or read, or no weights are named.
    """
    kd = cfg.MODEL.CROSSKD.TEACHER
    path, zoo_name = find_config(kd.CONFIG_FILE, key="MODEL.CROSSKD.TEACHER.CONFIG_FILE")
    teacher_cfg = get_cfg()
    add_crosskd_ifc_config(teacher_cfg)
    merge_from_file(teacher_cfg, path, key="MODEL.CROSSKD.TEACHER.CONFIG_FILE")
    merge_from_list(teacher_cfg, kd.OPTS, key=f"MODEL.CROSSKD.TEACHER.OPTS {tuple(kd.OPTS)}")
    if kd.WEIGHTS:
        return teacher_cfg, kd.WEIGHTS
    try:
        return teacher_cfg, model_zoo.get_checkpoint_url(zoo_name)
    except (RuntimeError, ValueError):
        raise ConfigError(
            f"MODEL.CROSSKD.TEACHER.WEIGHTS is empty, and {kd.CONFIG_FILE!r} is no model-zoo name "
            "with a trained checkpoint; give the file or URL of the teacher's trained weights "
            "(the MODEL.WEIGHTS in its config is only where its own training started)"
        ) from None


def check_teacher_weights(weights: str) -> None:
    """Refuse a local path without a file.

    Raises:
        ConfigError: naming the key.
    """
    if is_missing(weights):
        raise ConfigError(
            f"MODEL.CROSSKD.TEACHER.WEIGHTS: there is no file {weights!r}; train the teacher "
            "first, or give the file of its trained weights"
        )


def _load_strictly(model: nn.Module, weights: str) -> None:
    """Load a file or URL into ``model``; whatever is wrong with it is a :class:`ConfigError`."""
    check_teacher_weights(weights)
    try:
        StrictReader(model).load(weights)
    except MisfitError as error:
        raise ConfigError(
            f"MODEL.CROSSKD.TEACHER.WEIGHTS {weights!r} does not fit the model of "
            f"TEACHER.CONFIG_FILE (with TEACHER.OPTS). Weights {error}"
        ) from None
    except (
        Exception
    ) as error:  # on foreign bytes and failed downloads, readers raise what they like
        reason = str(error).strip().split("\n")[0]
        raise ConfigError(
            f"MODEL.CROSSKD.TEACHER.WEIGHTS {weights!r} can't be read as weights: "
            f"{type(error).__name__} {reason}"
        ) from error
