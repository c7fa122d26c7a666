"""The settings of an optimizer that goes on from a checkpoint."""

import copy

import pytest
import torch
from helpers import tiny_cfg, tiny_model

from crosskd_ifc import ConfigError
from crosskd_ifc.training.averaging import WeightAverage
from crosskd_ifc.training.optimizer import go_on_with, set_fusion_weight_decay, settings_of
from crosskd_ifc.weights.strict import load_strictly


def test_a_detectors_own_module_called_fusion_is_no_adapter(tmp_path):
    model = tiny_model()
    model.fusion = torch.nn.Linear(2, 2)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, weight_decay=0.5)
    set_fusion_weight_decay(optimizer, tiny_cfg(), model)
    assert [group["weight_decay"] for group in optimizer.param_groups] == [0.5]
    averaged = WeightAverage(model, 0.9).weights()
    assert averaged.keys() == model.state_dict().keys()
    torch.save({"model": {k: v for k, v in averaged.items() if "fusion" not in k}}, tmp_path / "a")
    with pytest.raises(ConfigError, match="missing: fusion.weight, fusion.bias"):
        load_strictly(model, str(tmp_path / "a"))


def test_what_hasnt_changed_stays_as_it_was_loaded():
    """An optimizer may count in its groups."""
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.ones(1))], lr=0.1, momentum=0.9)
    group = optimizer.param_groups[0]
    group["count"] = 0
    settings = settings_of(optimizer.param_groups)
    group.update(count=7, lr=0.05)
    loaded = copy.deepcopy(group)
    go_on_with(settings, copy.deepcopy(settings), optimizer, None)
    assert group == loaded
    go_on_with([{**settings[0], "momentum": 0.5}], settings, optimizer, None)
    assert group == {**loaded, "momentum": 0.5}


def test_a_scheduler_of_ones_own_keeps_its_rate_and_that_is_told(caplog):
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=0.1)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 10)
    kept = settings_of(optimizer.param_groups)
    wanted = [{**kept[0], "initial_lr": 0.01, "momentum": 0.5}]
    go_on_with(wanted, kept, optimizer, scheduler)
    group = optimizer.param_groups[0]
    assert (group["lr"], group["initial_lr"], group["momentum"]) == (0.1, 0.1, 0.5)
    assert "optimizer.lr" not in caplog.text and "optimizer.momentum" in caplog.text
    assert "The new learning rate has no effect: CosineAnnealingLR goes on with" in caplog.text
