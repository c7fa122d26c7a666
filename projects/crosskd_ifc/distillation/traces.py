"""One training step, as the parts of a distillation see it.

Shape shorthand: N images.
"""

import contextlib
import dataclasses
import functools
import time
from typing import Any, Dict, Iterator, List

import torch
from detectron2.utils.events import get_event_storage

from .teacher import Teacher

# Statistics are read from the device only this often, in the steps that detectron2's writers log.
LOG_PERIOD = 20


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

    @functools.cached_property
    def features(self) -> Dict[str, torch.Tensor]:
        """Backbone features by name, each (N, C, Hi, Wi), no gradient."""
        with self.running():
            return self.teacher.features(self._inputs)

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
                f"({str(error).strip().splitlines()[0]})"
            ) from error
        self.seconds += self._clock() - start

    def _clock(self) -> float:
        if self._timed and self.teacher.device.type == "cuda":
            torch.cuda.synchronize(self.teacher.device)
        return time.perf_counter() if self._timed else 0.0


@dataclasses.dataclass
class Step:
    """What is known of one step; the student's parts fill in while its forward runs.

    Attributes:
        teacher: the teacher on this batch.
        factor: of the schedule; 0 must not run the teacher.
        log: whether statistics are wanted.
        features: the student's backbone features by name, each (N, C, Hi, Wi).
        heads: what the student's heads computed, a :class:`HeadTrace` or :class:`DenseTrace`.
    """

    teacher: TeacherPass
    factor: float
    log: bool
    features: Dict[str, torch.Tensor] = dataclasses.field(default_factory=dict)
    heads: Any = None


def put_scalars(scalars: Dict[str, float]) -> None:
    """Statistics to the EventStorage, under ``crosskd/``."""
    for name, value in scalars.items():
        get_event_storage().put_scalar(f"crosskd/{name}", value, smoothing_hint=False)


def is_logging_step() -> bool:
    return (get_event_storage().iter + 1) % LOG_PERIOD == 0
