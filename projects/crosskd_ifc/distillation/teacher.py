"""The frozen teacher: built from its own config, loaded strictly, fed from the student's raw
images.

Shape shorthand: N images, R RoIs over all images, C channels, (P, P) pooler resolution.
"""

import contextlib
import functools
import logging
import time
from typing import Any, Callable, Dict, Iterator, List, Mapping, Optional, Sequence

import torch
from detectron2.config import CfgNode
from detectron2.structures import Boxes, ImageList
from torch import nn

from ..common.errors import said
from ..config import ConfigError
from .losses import at_least_float32

logger = logging.getLogger(__name__)


class Teacher:
    """A complete, frozen detector that answers for the student's images.

    A plain object, not a module: the detector stays out of the student's parameters, state dict,
    optimizer, DDP and checkpoints, and out of reach of its ``train()``.

    Attributes:
        model: the detector, in eval mode, no parameter requiring gradient.
        cfg: the config it was built from, or what that would say of one without; None if it was
            given as a model.
        input_format: channel order of its images, such as "BGR".
        description: where it came from, for messages.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        student_format: str,
        precision: str = "float32",
        cfg: Optional[CfgNode] = None,
        input_format: Optional[str] = None,
        description: str = "the given detector",
    ):
        """
        Args:
            model: a detectron2 detector with weights.
            student_format: channel order of the student's images, such as "BGR" (its INPUT.FORMAT).
            precision: of ``autocast``'s context, "float32", "bfloat16" or "float16".
            cfg: the teacher's config.
            input_format: channel order of the teacher's images; by default what the model says, the
                student's where it says nothing.
            description: where the weights are from.

        Raises:
            ConfigError: if the student's images can't be turned into the teacher's channel order.
        """
        self.model = model.eval().requires_grad_(False)
        self.cfg = cfg
        self.description = description
        self.dtype: torch.dtype = getattr(torch, precision)
        input_format = input_format or getattr(model, "input_format", None)
        if input_format is None:
            logger.warning(
                f"The teacher ({description}) doesn't say the channel order of its images: it gets "
                f"the student's, {student_format}. Set its input_format if that is wrong"
            )
        self.input_format = input_format or student_format
        formats = (student_format, self.input_format)
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

    def inputs(self, batched_inputs: Sequence[Mapping]) -> List[dict]:
        """The student's raw images in the teacher's channel order, other fields unchanged.

        Raises:
            ConfigError: for an image that a teacher which pads to a square would crop.
        """
        square = padded_square(self.model)
        for x in batched_inputs if square else ():
            if max(x["image"].shape[-2:]) > square:
                raise ConfigError(
                    "INPUT.MAX_SIZE_TRAIN (of a test image INPUT.MAX_SIZE_TEST): an image of "
                    f"{tuple(x['image'].shape[-2:])} pixels is larger than the {square} x {square} "
                    f"that the teacher ({self.description}) pads images to"
                )
        if not self._swap_channels:
            return list(batched_inputs)
        return [{**x, "image": x["image"].flip(0)} for x in batched_inputs]

    def detect(self, batched_inputs: Sequence[Mapping]) -> List[dict]:
        """What the teacher finds in the student's raw images; errors as of :meth:`inputs`."""
        return self.model(self.inputs(batched_inputs))

    def preprocess(self, batched_inputs: Sequence[Mapping]) -> ImageList:
        """The student's raw images as the teacher's input: channel order first, then mean, std."""
        return self.model.preprocess_image(self.inputs(batched_inputs))

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


def padded_square(model: nn.Module) -> int:
    """The side of the square that a detector pads all images to, 0 for none (as ViTDet)."""
    backbone = getattr(model, "backbone", None)
    return getattr(backbone, "padding_constraints", {}).get("square_size", 0)


class TeacherOutOfMemory(RuntimeError):
    """Memory ran out while the teacher was running."""


class TeacherPass:
    """The teacher on one batch; what several losses need is computed once, when it is first asked
    for.

    Attributes:
        seconds: wall time spent in it so far; 0 unless ``timed``.
    """

    def __init__(
        self, teacher: Teacher, batched_inputs: List[Dict[str, torch.Tensor]], *, timed=False
    ):
        """
        Args:
            teacher: the frozen detector.
            batched_inputs: N raw images of the student.
            timed: whether to measure, which makes a GPU wait.
        """
        self.teacher, self.seconds = teacher, 0.0
        self._inputs, self._timed = batched_inputs, timed
        self._found: Dict[str, Any] = {}

    @functools.cached_property
    def features(self) -> Dict[str, torch.Tensor]:
        """Backbone features by name, each (N, C, Hi, Wi), no gradient."""
        with self.running():
            return self.teacher.features(self._inputs)

    def once(self, name: str, compute: Callable[[], Any]) -> Any:
        """What ``compute`` gives; a second call of this ``name`` gives the same."""
        if name not in self._found:
            self._found[name] = compute()
        return self._found[name]

    def pooled(self, pooler: nn.Module, levels: Sequence[str], boxes: List[Boxes]) -> torch.Tensor:
        """What one of the teacher's poolers gives for the boxes, (R, C, P, P), no gradient.

        In at least float32: a pooler rounds the coordinates of the boxes to its features' type,
        and those of bfloat16 are 8 pixels apart in a large image.

        Args:
            pooler: of its ROI heads.
            levels: the features that it reads.
            boxes: per image, absolute pixels of the student's input.
        """
        features = self.features
        with self.running():
            return pooler([at_least_float32(features[name]) for name in levels], boxes)

    @contextlib.contextmanager
    def running(self) -> Iterator[None]:
        """The context of everything that the teacher computes for itself: no gradient, its
        precision.

        Raises:
            TeacherOutOfMemory: with advice.
        """
        start = self._clock()
        try:
            with self.teacher.autocast():
                yield
        except RuntimeError as error:
            # A GPU has its own type; a CPU's allocator only says so.
            if not isinstance(error, torch.cuda.OutOfMemoryError) and (
                "can't allocate memory" not in str(error)
            ):
                raise
            raise TeacherOutOfMemory(
                "out of memory in the teacher's forward: lower SOLVER.IMS_PER_BATCH (per process), "
                "INPUT.MIN_SIZE_TRAIN or MODEL.ROI_HEADS.BATCH_SIZE_PER_IMAGE, take a smaller "
                "teacher, or on a GPU set MODEL.CROSSKD.TEACHER.PRECISION to 'bfloat16' "
                f"({said(error)})"
            ) from error
        self.seconds += self._clock() - start

    def _clock(self) -> float:
        if self._timed and self.teacher.device.type == "cuda":
            torch.cuda.synchronize(self.teacher.device)
        return time.perf_counter() if self._timed else 0.0
