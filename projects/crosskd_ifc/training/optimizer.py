"""The optimizer's settings: the decay of what the distillation learns; a resumed run goes on with
its own learning rate, momentum and decay, not with those of its checkpoint."""

import copy
import logging
from typing import Any, Dict, List, Mapping, Sequence

import torch
from detectron2.config import CfgNode
from detectron2.solver import LRMultiplier
from torch import nn
from torch.optim.lr_scheduler import LRScheduler

from ..modeling.student import learned_by_distillation
from .run_config import as_table

Settings = List[Dict[str, Any]]  # of each parameter group

logger = logging.getLogger(__name__)

_BASE = "initial_lr"  # that the schedule multiplies


def set_fusion_weight_decay(
    optimizer: torch.optim.Optimizer, cfg: CfgNode, model: nn.Module
) -> torch.optim.Optimizer:
    """Give what the distillation learns a parameter group with ``FUSION.WEIGHT_DECAY``.

    For an optimizer of your own, before its first step; ``CrossKDTrainer`` calls it for
    detectron2's.

    Args:
        optimizer: over the parameters of ``model``; changed in place.
        cfg: the student's config.
        model: the student, or a DDP wrapper around it.
    """
    adapters = learned_by_distillation(model)
    parameters = [] if adapters is None else list(adapters.parameters())
    if parameters:
        ours = {id(p) for p in parameters}
        for group in optimizer.param_groups:
            group["params"] = [p for p in group["params"] if id(p) not in ours]
        optimizer.param_groups[:] = [g for g in optimizer.param_groups if g["params"]]
        decay = cfg.MODEL.CROSSKD.FUSION.WEIGHT_DECAY
        optimizer.add_param_group({"params": parameters, "weight_decay": decay})
    return optimizer


def settings_of(groups: Sequence[Mapping[str, Any]]) -> Settings:
    """The settings of an optimizer's ``param_groups``, before the first step."""
    return [
        {
            **{k: copy.deepcopy(v) for k, v in group.items() if k not in ("params", "lr")},
            _BASE: copy.deepcopy(group.get(_BASE, group["lr"])),
        }
        for group in groups
    ]


def go_on_with(
    settings: Settings, kept: Settings, optimizer: torch.optim.Optimizer, scheduler: Any
) -> None:
    """Give an optimizer that has loaded its state the settings that have changed since; the others
    may be part of the state.

    Args:
        settings: of this run.
        kept: of the run that has written the checkpoint.
        optimizer: has as many groups.
        scheduler: detectron2's; its learning rates become those of this iteration. Another one of
            torch's goes on with the rates of the checkpoint, which is told.
    """
    told, keeps_rate, is_stock = [], False, isinstance(scheduler, LRMultiplier)
    is_own = isinstance(scheduler, LRScheduler) and not is_stock
    for group, then, now in zip(optimizer.param_groups, kept, settings):
        changed = {k: v for k, v in now.items() if then.get(k) != v}
        if is_own:
            keeps_rate |= changed.pop(_BASE, None) is not None
        group.update(changed)
        rows = [
            (f"optimizer.{k.removeprefix('initial_')}", then.get(k), v) for k, v in changed.items()
        ]
        told += [row for row in rows if row not in told]
    if is_stock:
        scheduler.base_lrs = [group[_BASE] for group in optimizer.param_groups]
        for group, rate in zip(optimizer.param_groups, scheduler.get_lr()):
            group["lr"] = rate
    if told:
        logger.warning(f"The optimizer goes on with other settings:\n{as_table(told)}")
    if keeps_rate:
        logger.warning(
            f"The new learning rate has no effect: {type(scheduler).__name__} goes on with that of "
            "the checkpoint"
        )
