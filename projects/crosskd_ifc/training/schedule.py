"""What the trainer does around its steps: the distillation schedule, the teacher's evaluation."""

import logging
import os
from typing import Any, Callable, Dict, List, Optional

from detectron2.config import CfgNode
from detectron2.engine import HookBase
from detectron2.evaluation.testing import flatten_results_dict
from torch import nn

from ..config import teacher_configs
from ..distillation.teacher import Teacher
from ..modeling.student import unwrap

logger = logging.getLogger(__name__)


class DistillationSchedule(HookBase):
    """Sets the student's ``kd_factor`` before each step.

    0 before ``start``; then a linear rise over ``warmup`` iterations, whose first step has 1 /
    warmup; then 1; 0 from ``stop`` on.
    """

    def __init__(self, *, start: int = 0, warmup: int = 0, stop: int = -1):
        """
        Args:
            start: first iteration that distils.
            warmup: iterations until the full factor.
            stop: first iteration that doesn't distil any more; -1 for none.
        """
        self.start, self.warmup, self.stop = start, warmup, stop

    def factor(self, iteration: int) -> float:
        if iteration < self.start or (self.stop >= 0 and iteration >= self.stop):
            return 0.0
        return min(1.0, (iteration - self.start + 1) / max(self.warmup, 1))

    def before_step(self) -> None:
        unwrap(self.trainer.model).kd_factor = self.factor(self.trainer.iter)


def scale_schedule(cfg: CfgNode, world_size: int) -> CfgNode:
    """Scale the distillation schedule, and how long the average of the weights remembers, as
    ``DefaultTrainer.auto_scale_workers`` scales the solver's schedule.

    Args:
        cfg: SOLVER.REFERENCE_WORLD_SIZE is the number of workers it was written for, 0 for none.
        world_size: number of workers.

    Returns:
        A new config, or ``cfg`` itself if nothing is to be scaled.
    """
    reference = cfg.SOLVER.REFERENCE_WORLD_SIZE
    if reference in (0, world_size):
        return cfg
    cfg = cfg.clone()
    frozen = cfg.is_frozen()
    cfg.defrost()
    schedule: Dict[str, int] = cfg.MODEL.CROSSKD.SCHEDULE
    for key, value in schedule.items():
        if value > 0:
            schedule[key] = int(round(value * reference / world_size))
    if schedule["STOP_ITER"] >= 0:  # rounding must not leave nothing
        schedule["STOP_ITER"] = max(schedule["STOP_ITER"], schedule["START_ITER"] + 1)
    cfg.SOLVER.EMA_DECAY **= world_size / reference
    if frozen:
        cfg.freeze()
    return cfg


class TeacherEvaluation(HookBase):
    """Evaluates the teachers whose settings ask for it on the student's test sets before the first
    step, or that of a resumed run which hasn't yet, logs it as ``teacher/...``, that of teacher i >
    1 as ``teacher_i/...``, and warns once of a student that is better, at the start or later.

    Put it after the student's evaluation.
    """

    def __init__(self):
        self._teachers: Dict[str, Dict[str, float]] = {}  # key -> name -> AP
        self._told: List[str] = []  # keys

    def before_train(self) -> None:
        student, cfg = unwrap(self.trainer.model), self.trainer.cfg
        for i, (_, one) in enumerate(teacher_configs(cfg)):
            key = f"teacher_{i + 1}" if i else "teacher"
            if one.MODEL.CROSSKD.TEACHER.EVAL_AT_START and key not in self._teachers:
                teacher = student.teachers[i]
                results = evaluate_teacher(cfg, student, self.trainer.test, teacher, key)
                self._log(key, flatten_results_dict(results))
        # Else the student's predictors are random.
        if self.trainer.start_iter == 0 and self.trainer.checkpointer.is_complete:
            logger.info("Evaluating the student before the first step")
            results = self.trainer.test(cfg, student)
            self._compare(flatten_results_dict(results), "at the start")

    def _log(self, key: str, results: Dict[str, float]) -> None:
        for name, value in results.items():  # none but in the main process
            self.trainer.storage.put_scalar(f"{key}/{name}", value, smoothing_hint=False)
            if name.endswith(("AP", "AP50")):
                whose = key.capitalize().replace("_", " ")
                logger.info(
                    f"{whose} on {', '.join(self.trainer.cfg.DATASETS.TEST)}: {name} {value:.2f}"
                )
        # Those of VOC's evaluator are numpy's.
        self._teachers[key] = {k: float(v) for k, v in results.items() if k.endswith("/AP")}

    def after_step(self) -> None:
        self._look(self.trainer.iter)

    def after_train(self) -> None:
        self._look(self.trainer.iter)

    def _look(self, iteration: int) -> None:
        latest = self.trainer.storage.latest()
        found = {name: value for name, (value, when) in latest.items() if when == iteration}
        self._compare(found, f"after {min(iteration + 1, self.trainer.max_iter)} iterations")

    def _compare(self, student: Dict[str, float], when: str) -> None:
        for key, teacher in self._teachers.items():
            better = [name for name, value in teacher.items() if student.get(name, value) > value]
            if better and key not in self._told:
                self._told.append(key)
                ours, theirs = student[better[0]], teacher[better[0]]
                logger.warning(
                    f"The student is better than its {key.replace('_', ' ')} {when}: {better[0]} "
                    f"{ours:.2f}, the teacher's is {theirs:.2f}. Distilling may hold it back: take "
                    "a better teacher (MODEL.CROSSKD.TEACHER), or end it early "
                    "(MODEL.CROSSKD.SCHEDULE.STOP_ITER)"
                )

    def state_dict(self) -> Dict[str, Any]:
        return {"teachers": self._teachers, "told": self._told} if self._teachers else {}

    def load_state_dict(self, state: Dict[str, Any]) -> None:
        self._teachers, self._told = state["teachers"], state["told"]


def evaluate_teacher(
    ours: CfgNode,
    student: nn.Module,
    test: Callable[[CfgNode, nn.Module], Dict[str, Any]],
    teacher: Optional[Teacher] = None,
    folder: str = "teacher",
) -> Dict[str, Any]:
    """The results of a student's teacher, with its own input settings, on the student's test sets.

    Args:
        ours: the student's config.
        student: with an attached teacher.
        test: of the trainer.
        teacher: one of them; the first if not given.
        folder: in OUTPUT_DIR, for its results.
    """
    teacher = teacher or student.teacher
    cfg = (teacher.cfg or ours).clone()
    cfg.defrost()
    cfg.INPUT.FORMAT = ours.INPUT.FORMAT  # which the teacher turns into its own
    cfg.MODEL.DEVICE = ours.MODEL.DEVICE  # that of a LazyConfig isn't known
    cfg.DATASETS = ours.DATASETS
    cfg.DATALOADER = ours.DATALOADER
    cfg.TEST.KEYPOINT_OKS_SIGMAS = ours.TEST.KEYPOINT_OKS_SIGMAS  # of the data
    cfg.OUTPUT_DIR = os.path.join(ours.OUTPUT_DIR, folder)
    return test(cfg, _StudentTasks(teacher, student))


class _StudentTasks(nn.Module):
    """A teacher that answers only what its student predicts: the test set may have no more."""

    def __init__(self, teacher: Teacher, student: nn.Module):
        super().__init__()
        self._teacher = teacher
        heads = getattr(student, "roi_heads", None)
        self._dropped = []
        if not getattr(heads, "mask_on", False):
            self._dropped += ["pred_masks"]
        if not getattr(heads, "keypoint_on", False):
            self._dropped += ["pred_keypoints", "pred_keypoint_heatmaps"]

    def forward(self, batched_inputs):
        outputs = self._teacher.detect(batched_inputs)
        for instances in (x["instances"] for x in outputs):
            for field in self._dropped:
                if instances.has(field):
                    instances.remove(field)
        return outputs
