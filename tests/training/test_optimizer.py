"""The settings of an optimizer that goes on from a checkpoint."""

import copy

import torch

from crosskd_ifc.training.optimizer import go_on_with, settings_of


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
