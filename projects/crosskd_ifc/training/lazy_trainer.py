"""The trainer of a run that a LazyConfig describes."""

import copy
import os
from typing import Any, Callable, Dict, Optional

import torch
from detectron2.config import CfgNode, instantiate
from detectron2.data import (
    DatasetMapper,
    build_detection_test_loader,
    build_detection_train_loader,
    get_detection_dataset_dicts,
)
from detectron2.engine.hooks import PeriodicCheckpointer, PeriodicWriter
from detectron2.evaluation import inference_on_dataset, print_csv_format
from detectron2.utils import comm
from detectron2.utils.registry import locate
from fvcore.common.param_scheduler import ParamScheduler
from omegaconf import DictConfig
from torch import nn
from torch.utils.data import DataLoader, IterableDataset, Sampler

from ..common.lazy_config import instantiate_model
from ..common.random_state import same_random_state
from ..config import distillation_requested
from ..data.cards import drop_degenerate_boxes
from ..data.mapper import CheckedMapper
from ..modeling.attach import attach_teacher
from ..modeling.summary import describe_distillation
from .optimizer import set_fusion_weight_decay
from .preemption import StoppableLoader, keep_workers_on_sigterm
from .preflight import check_training_settings
from .preflight_data import check_test_data
from .records import with_boxes
from .run_folder import find_checkpoints
from .stream import TrainingStream
from .trainer import CrossKDTrainer, logger


class LazyTrainer(CrossKDTrainer):
    """:class:`CrossKDTrainer` whose model, optimizer, data and evaluation are those of a
    LazyConfig; steps, hooks, checkpoints and resuming are its parent's."""

    def __init__(self, config: DictConfig, cfg: CfgNode):
        """
        Args:
            config: what the LazyConfig file defines.
            cfg: of the run, see :func:`run_config`.

        Raises:
            ConfigError: for settings that can't work, before anything is trained.
        """
        self.config = config
        super().__init__(cfg)

    def check_config(self, cfg: CfgNode) -> None:
        check_training_settings(cfg)
        check_test_data(cfg)

    def ddp_options(self, cfg: CfgNode) -> Dict[str, Any]:
        return {**(self.config.train.get("ddp") or {}), **super().ddp_options(cfg)}

    def build_model(self, cfg: CfgNode) -> nn.Module:
        model = build_lazy_model(self.config, cfg)
        if distillation_requested(cfg):
            attach_teacher(model, cfg)
            if comm.is_main_process():
                logger.info(describe_distillation(model, cfg))
        return model

    def build_optimizer(self, cfg: CfgNode, model: nn.Module) -> torch.optim.Optimizer:
        node = copy.deepcopy(self.config.optimizer)
        node.params.model = model
        return set_fusion_weight_decay(instantiate(node), cfg, model)

    def build_lr_scheduler(self, cfg: CfgNode, optimizer: torch.optim.Optimizer) -> ParamScheduler:
        return instantiate(self.config.lr_multiplier)

    def build_train_loader(self, cfg: CfgNode):
        """The loader of ``dataloader.train``: a numbered stream where that is detectron2's
        ``build_detection_train_loader`` of a list of records or a data set with a length."""
        node = self.config.dataloader.train
        if _target(node) is build_detection_train_loader:
            dataset = instantiate(node.dataset)
            if not isinstance(dataset, IterableDataset):
                return LazyStream(cfg, node, dataset).build_loader()
        logger.warning(
            "dataloader.train is no build_detection_train_loader of a data set with a length: a "
            "resumed run will see other data than one that was never interrupted"
        )
        return instantiate(node)

    def test(self, cfg: CfgNode, model: nn.Module, evaluators=None) -> Dict[str, Any]:
        return test_lazy(self.config, model)

    def resume_or_load(self, resume: bool = True) -> None:
        super().resume_or_load(resume)
        earlier = reversed(find_checkpoints(self.cfg.OUTPUT_DIR))  # the oldest first
        for hook in self._hooks:
            if isinstance(hook, PeriodicCheckpointer) and self.start_iter:  # it forgets them
                beyond = f"model_{self.start_iter:07d}"
                hook.recent_checkpoints = [x for x in earlier if os.path.basename(x) < beyond]

    def build_hooks(self):
        hooks = super().build_hooks()
        train = self.config.train
        for hook in hooks:
            if isinstance(hook, PeriodicCheckpointer):
                hook.max_to_keep = train.checkpointer.get("max_to_keep")
            elif isinstance(hook, PeriodicWriter):
                hook._period = train.log_period
        return hooks


class LazyStream(TrainingStream):
    """The stream of a LazyConfig's ``dataloader.train``."""

    def __init__(self, cfg: CfgNode, node: DictConfig, dataset: Any):
        """
        Args:
            cfg: of the run.
            node: of ``build_detection_train_loader``.
            dataset: its data set, with a length.
        """
        self._node = node
        records, _ = drop_degenerate_boxes([dataset[i] for i in range(len(dataset))])
        loader = node.dataset
        filtered = _target(loader) is get_detection_dataset_dicts
        filtered = filtered and loader.get("filter_empty", True) and "annotations" in records[0]
        # An image may have lost its last box since. A given sampler counts them as they were.
        if filtered and node.get("sampler") is None:
            records = with_boxes(records, cfg.DATASETS.TRAIN)
        super().__init__(cfg, records, _checked_mapper(node))

    def _sampler(self) -> Optional[Sampler]:
        return instantiate(self._node.get("sampler"))

    def _loader_arguments(self, mapper: Optional[Callable]) -> Dict[str, Any]:
        given = _arguments(self._node, without=("dataset", "mapper", "sampler"))
        return {**super()._loader_arguments(mapper), "num_workers": 0, **given}


def build_lazy_model(config: DictConfig, cfg: CfgNode) -> nn.Module:
    """The ``model`` of a LazyConfig on the run's device.

    Raises:
        ConfigError: if it can't be built.
    """
    model = instantiate_model(config, what=f"{cfg.LAZY_CONFIG} `model`")
    return model.to(cfg.MODEL.DEVICE)


def test_lazy(config: DictConfig, model: nn.Module) -> Dict[str, Any]:
    """Evaluate a model as ``dataloader.test`` and ``dataloader.evaluator`` say, leaving the global
    random state as it was.

    Args:
        config: the LazyConfig.
        model: in any mode.

    Returns:
        {} where ``dataloader.evaluator`` is missing.
    """
    data = copy.deepcopy(config.dataloader)
    if "evaluator" not in data or "test" not in data:
        return {}
    with same_random_state(torch.device(config.train.device)):
        if _target(data.test) is build_detection_test_loader:
            arguments = _arguments(data.test, without=("mapper",))
            loader = build_detection_test_loader(**arguments, mapper=_checked_mapper(data.test))
        else:
            loader = instantiate(data.test)
        if isinstance(loader, DataLoader):
            loader = StoppableLoader(keep_workers_on_sigterm(loader))
        results = inference_on_dataset(model, loader, instantiate(data.evaluator))
    if comm.is_main_process():
        print_csv_format(results)
    return results


def _target(node: DictConfig) -> Any:
    target = node.get("_target_")
    return locate(target) if isinstance(target, str) else target


def _arguments(node: DictConfig, *, without: tuple) -> Dict[str, Any]:
    """What a LazyCall's function gets."""
    return {str(k): instantiate(node[k]) for k in node if k not in ("_target_", *without)}


def _checked_mapper(node: DictConfig) -> CheckedMapper:
    mapper = instantiate(node.mapper)
    return CheckedMapper(mapper, check_image=isinstance(mapper, DatasetMapper))
