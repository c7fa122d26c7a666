"""detectron2's trainer with a teacher: builds both models, follows the schedule, evaluates by the
data set's type."""

import contextlib
import logging
import os
import weakref
from typing import Any, Dict, Iterator, Optional

import torch
from detectron2.config import CfgNode
from detectron2.data import build_detection_test_loader
from detectron2.engine import DefaultTrainer, HookBase, defaults
from detectron2.engine.hooks import EvalHook, PeriodicCheckpointer
from detectron2.evaluation import COCOEvaluator, DatasetEvaluator, PascalVOCDetectionEvaluator
from detectron2.utils import comm
from torch import nn

from ..common.files import write_json
from ..common.random_state import same_random_state
from ..config import ConfigError, distillation_requested, teacher_configs
from ..data.cards import counted_detections
from ..data.mapper import SampleError, build_mapper
from ..modeling.attach import attach_teacher
from ..modeling.student import Student, unwrap
from ..modeling.summary import describe_distillation
from .accumulation import accumulating
from .averaging import WeightAverage
from .best import BestWeights
from .checkpointer import SafeCheckpointer
from .errors import message_in_traceback
from .grad_norm import GradientNorm
from .non_finite import DIVERGED, LastStepRecorder
from .optimizer import go_on_with, set_fusion_weight_decay, settings_of
from .preemption import (
    StopAfterStep,
    StoppableLoader,
    Terminated,
    keep_workers_on_sigterm,
    save_iteration,
    stopping_on_sigterm,
)
from .preflight import (
    check_best_metric,
    check_keypoint_sigmas,
    check_training_config,
    evaluator_type,
)
from .preflight_data import check_classes, check_same_everywhere, check_test_data
from .records import usable_records
from .resume import ResumeState
from .schedule import DistillationSchedule, TeacherEvaluation, scale_schedule
from .stream import TrainingStream
from .wandb_writer import WandbWriter

logger = logging.getLogger(__name__)


class CrossKDTrainer(DefaultTrainer):
    """``DefaultTrainer`` that distils if the config names a teacher, and trains any plain
    config unchanged."""

    def __init__(self, cfg: CfgNode):
        """
        Args:
            cfg: with the keys of ``add_crosskd_ifc_config``.

        Raises:
            ConfigError: for settings that can't work, before anything is trained.
        """
        self.check_config(cfg)
        with _ddp_options(self.ddp_options(cfg)):
            super().__init__(scale_schedule(cfg, comm.get_world_size()))
        check_classes(cfg)  # some data sets know their classes only now
        stream = getattr(self._trainer.data_loader, "stream", None)
        check_same_everywhere(cfg, len(stream.records) if stream else 0)
        if cfg.MODEL.CROSSKD.DIAGNOSTICS.GRAD_NORM:
            self._trainer.register_hooks([GradientNorm()])
        self._watch = LastStepRecorder(self.model, passes=cfg.SOLVER.ACCUMULATE)
        self.model.register_forward_hook(_check_distils)

    def check_config(self, cfg: CfgNode) -> None:
        """Refuse what can't work, before anything is built.

        Raises:
            ConfigError: naming the key.
        """
        check_training_config(cfg)
        # A subclass with evaluators of its own knows other types and fields.
        if type(self).build_evaluator.__func__ is CrossKDTrainer.build_evaluator.__func__:
            kinds = [evaluator_type(name) for name in cfg.DATASETS.TEST]
            if "coco" in kinds:
                check_keypoint_sigmas(cfg)
            check_best_metric(cfg)
            check_test_data(cfg)

    def ddp_options(self, cfg: CfgNode) -> Dict[str, Any]:
        """Of :class:`DistributedDataParallel`, over detectron2's."""
        # DDP refuses device_ids for a CPU model; detectron2 always passes them.
        return {"device_ids": None} if cfg.MODEL.DEVICE == "cpu" else {}

    def run_step(self) -> None:
        """As the parent's.

        Raises:
            FloatingPointError: for a loss that isn't finite, naming it, the iteration and the
                images; the state before the step is in a checkpoint.
            SampleError: for an image that can't be used, naming it; with one process, the state
                before the step is in a checkpoint.
        """
        before = self._resume_state.before()
        try:
            with accumulating(self._trainer, self.cfg.SOLVER.ACCUMULATE):
                super().run_step()
        except FloatingPointError as error:
            self._resume_state.set_back(self.iter - 1, before)
            what = self._watch.explain(self.model, self.iter, error)
            if comm.is_main_process():
                path = os.path.join(self.cfg.OUTPUT_DIR, DIVERGED)
                write_json(path, {"iteration": self.iter, "what": what})
            raise FloatingPointError(f"{what} {self._save_before_step()}") from error
        except SampleError as error:
            if comm.get_world_size() > 1:  # the others are in the step already
                raise
            self._resume_state.set_back(self.iter - 1, before)
            # A data loader's worker sends its traceback along.
            what = message_in_traceback(str(error), SampleError) or str(error)
            raise SampleError(f"{what}. {self._save_before_step()}") from error

    def train(self) -> Any:
        """As the parent's; SIGTERM ends it after a step or a batch of an evaluation.

        Raises:
            Terminated: in every process; a checkpoint of the last step is there.
        """
        with stopping_on_sigterm():
            return super().train()

    def after_step(self) -> None:
        try:
            super().after_step()
        except Terminated:
            save_iteration(self, self.checkpointer, self.iter)
            comm.synchronize()  # launched processes end when the first of them has
            logger.warning(
                f"SIGTERM: stopped after iteration {self.iter}; --resume goes on from "
                f"{self.checkpointer.get_checkpoint_file()}"
            )
            raise

    def after_train(self) -> None:
        has_failed = self.iter < self.max_iter
        if has_failed:  # detectron2 would evaluate, in the last step; other processes may not come
            self._hooks = [h for h in self._hooks if not isinstance(h, (EvalHook, BestWeights))]
        try:
            super().after_train()
        except OSError as error:
            if not has_failed:
                raise
            # The writers' disk is full, too: that must not hide the first error.
            logger.warning(f"Not all could be written at the end: {error}")

    def _save_before_step(self) -> str:
        """Write a checkpoint of the state before the step that has failed; says where it is.

        detectron2 looks at the losses before it changes the weights.
        """
        failed = self.iter
        if failed > self.start_iter and all(
            torch.isfinite(x).all() for x in self.model.state_dict().values()
        ):
            save_iteration(self, self.checkpointer, failed - 1)
        return f"The last good checkpoint: {self.checkpointer.last_good() or 'none'}."

    @classmethod
    def build_model(cls, cfg: CfgNode) -> nn.Module:
        """The student and, if the config asks for one, its teacher, attached."""
        model = super().build_model(cfg)
        if distillation_requested(cfg):
            attach_teacher(model, cfg)
            if comm.is_main_process():
                logger.info(describe_distillation(model, cfg))
        return model

    @classmethod
    def build_optimizer(cls, cfg: CfgNode, model: nn.Module) -> torch.optim.Optimizer:
        """detectron2's optimizer, with ``FUSION.WEIGHT_DECAY`` for what the distillation learns.

        A fusion starts at the mean of its taps; decay would pull it to another place, or to 0.
        """
        return set_fusion_weight_decay(super().build_optimizer(cfg, model), cfg, model)

    def resume_or_load(self, resume: bool = True) -> None:
        """As the parent's; a run that doesn't go on from a checkpoint then starts from the
        teacher's weights where ``MODEL.CROSSKD.INHERIT`` says so.

        Raises:
            CheckpointError, ConfigError: if the run can't go on from what is there.
        """
        wanted, resume = resume, resume and self.checkpointer.all_have_checkpoint()
        if wanted and not resume:
            folder = os.path.abspath(self.cfg.OUTPUT_DIR)
            logger.info(f"There is no checkpoint in {folder} to resume from: this run starts anew")
        super().resume_or_load(resume=resume)
        if resume and self.start_iter >= self.max_iter:
            logger.warning(
                f"There is nothing left to train: {self.start_iter} iterations are done, "
                f"SOLVER.MAX_ITER is {self.max_iter}"
            )
            if comm.is_main_process():
                self.checkpointer.save_final()
        student = unwrap(self.model)
        if hasattr(student, "inherit_weights") and not resume:
            student.inherit_weights()

    def state_dict(self) -> Dict[str, Any]:
        return {**super().state_dict(), "optimizer_settings": self._optimizer_settings}

    def load_state_dict(self, state_dict: Dict[str, Any]) -> None:
        """As the parent's; the optimizer keeps this run's settings.

        Raises:
            ValueError: if the state of one of detectron2's hooks is missing: it would start anew.
        """
        found = state_dict.get("hooks", {})
        for hook in self._hooks:
            name = type(hook).__qualname__
            if name in found:
                continue
            if isinstance(hook, ResumeState):
                logger.warning(
                    "The checkpoint doesn't say the place in the training data, nor random states: "
                    "both start anew. Was it written by another trainer?"
                )
            elif hook.state_dict():
                raise ValueError(f"it lacks the state of {name}")
        super().load_state_dict(state_dict)
        kept = state_dict.get("optimizer_settings")  # earlier versions didn't write them
        kept = kept or settings_of(state_dict["_trainer"]["optimizer"]["param_groups"])
        if self.iter + 1 < self.max_iter:  # there is a step to do
            go_on_with(self._optimizer_settings, kept, self.optimizer, self.scheduler)

    @classmethod
    def build_train_loader(cls, cfg: CfgNode):
        """detectron2's loader less the boxes without area or outside their image, which it logs.

        Raises:
            ConfigError: for data sets that don't fit the model or hold no box to train on.
        """
        return TrainingStream(cfg, usable_records(cfg)).build_loader()

    @classmethod
    def build_test_loader(cls, cfg: CfgNode, dataset_name: str):
        """As the parent's, and stoppable; an image that can't be used is a :class:`SampleError`."""
        mapper = build_mapper(cfg, is_train=False)
        loader = build_detection_test_loader(cfg, dataset_name, mapper=mapper)
        return StoppableLoader(keep_workers_on_sigterm(loader))

    @classmethod
    def build_evaluator(
        cls, cfg: CfgNode, dataset_name: str, output_folder: Optional[str] = None
    ) -> DatasetEvaluator:
        """The evaluator for the data set's ``evaluator_type``: "coco" or "pascal_voc".

        Raises:
            ConfigError: for another type.
        """
        if evaluator_type(dataset_name) == "pascal_voc":
            return PascalVOCDetectionEvaluator(dataset_name)
        folder = output_folder or os.path.join(cfg.OUTPUT_DIR, "inference")
        # A VOC card is converted each time: a cached file of an earlier run could be stale.
        sigmas = cfg.TEST.KEYPOINT_OKS_SIGMAS
        return COCOEvaluator(
            dataset_name,
            output_dir=folder,
            max_dets_per_image=counted_detections(dataset_name, cfg.TEST.DETECTIONS_PER_IMAGE),
            allow_cached_coco=False,
            kpt_oks_sigmas=sigmas,
        )

    @classmethod
    def test(cls, cfg: CfgNode, model: nn.Module, evaluators=None):
        """As the parent's, leaving the global random state as it was.

        A data loader draws from it, and a run that was interrupted after a checkpoint and before
        the evaluation has to go on with the same numbers.
        """
        with same_random_state(torch.device(cfg.MODEL.DEVICE)):
            return super().test(cfg, model, evaluators)

    def build_hooks(self):
        """detectron2's hooks, those that let a run be stopped and resumed exactly and, with a
        teacher, the distillation schedule and the teacher's evaluation."""
        self._optimizer_settings = settings_of(self.optimizer.param_groups)
        # Here, since detectron2 makes its checkpointer just before and offers no other place.
        self.checkpointer = SafeCheckpointer(
            self.model, self.cfg.OUTPUT_DIR, cfg=self.cfg, trainer=weakref.proxy(self)
        )
        hooks = super().build_hooks()
        periods = self.cfg.SOLVER.CHECKPOINT_PERIOD, self.cfg.TEST.EVAL_PERIOD
        self._resume_state = ResumeState(*periods)
        _insert_before(hooks, (PeriodicCheckpointer, EvalHook), self._resume_state)
        _insert_before(hooks, (EvalHook,), StopAfterStep(self._resume_state))
        student = unwrap(self.model)
        after = []  # the evaluation
        if self.cfg.SOLVER.EMA_DECAY > 0:
            average = WeightAverage(student, self.cfg.SOLVER.EMA_DECAY)
            _insert_before(hooks, (ResumeState,), average)
            after.append(EvalHook(self.cfg.TEST.EVAL_PERIOD, average.evaluate))
        metric = self.cfg.TEST.BEST_METRIC
        if metric and comm.is_main_process():
            weights = average.weights if metric.startswith("ema/") else student.state_dict
            sizes = self.cfg.INPUT.MIN_SIZE_TEST, self.cfg.INPUT.MAX_SIZE_TEST
            on = [*self.cfg.DATASETS.TEST, *sizes]
            after.append(BestWeights(periods[1], self.checkpointer, metric, weights, on))
        _insert_after(hooks, EvalHook, after)
        if not _has_teacher(student):
            if any(map(_has_teacher, student.modules())):
                raise ConfigError(
                    f"{type(self).__name__}.build_model puts the student into a "
                    f"{type(student).__name__}; its schedule, optimizer and checkpoints need the "
                    "student itself"
                )
            if distillation_requested(self.cfg):
                raise ConfigError(
                    f"{type(self).__name__}.build_model attaches no teacher, though the config "
                    "names one: call super().build_model(cfg), or attach_teacher(model, cfg)"
                )
            return hooks
        if any(x.MODEL.CROSSKD.TEACHER.EVAL_AT_START for _, x in teacher_configs(self.cfg)):
            _insert_after(hooks, EvalHook, [TeacherEvaluation()])
        kd = self.cfg.MODEL.CROSSKD.SCHEDULE
        schedule = DistillationSchedule(
            start=kd.START_ITER, warmup=kd.WARMUP_ITERS, stop=kd.STOP_ITER
        )
        return [schedule, *hooks]

    def build_writers(self) -> list:
        """detectron2's, and one for Weights & Biases if ``WANDB.PROJECT`` names a project."""
        ours = [WandbWriter(self.cfg)] if self.cfg.WANDB.PROJECT else []
        return [*super().build_writers(), *ours]


def _has_teacher(model: nn.Module) -> bool:
    return isinstance(model, Student) and model.teacher is not None


def _check_distils(model: nn.Module, inputs: Any, losses: Dict[str, torch.Tensor]) -> None:
    student = unwrap(model)
    distils = getattr(student, "distiller", None) is not None
    if distils and model.training and not student.has_distilled:
        raise ConfigError(
            f"{type(student).__name__}.forward adds no distillation losses, so nothing is "
            "distilled: let it call super().forward, which adds them"
        )


def _insert_before(hooks: list, kinds: tuple, hook: HookBase) -> None:
    """Insert a hook before the first of these kinds, or at the end."""
    places = [i for i, h in enumerate(hooks) if isinstance(h, kinds)]
    hooks.insert(places[0] if places else len(hooks), hook)


def _insert_after(hooks: list, kind: type, more: list) -> None:
    """Insert hooks after the first of this kind."""
    place = [isinstance(h, kind) for h in hooks].index(True) + 1
    hooks[place:place] = more


@contextlib.contextmanager
def _ddp_options(options: Dict[str, Any]) -> Iterator[None]:
    """Within this context, DefaultTrainer wraps its model in DDP with these options, for which it
    offers no place."""
    original = defaults.create_ddp_model
    defaults.create_ddp_model = lambda model, **kwargs: original(model, **{**kwargs, **options})
    try:
        yield
    finally:
        defaults.create_ddp_model = original
