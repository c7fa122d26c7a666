"""How long the gradient is, and how much that varies: a measure of how steady training is."""

import collections

import torch
from detectron2.engine import HookBase
from detectron2.utils.events import get_event_storage

_WINDOW = 20  # steps


class GradientNorm(HookBase):
    """Logs ``crosskd/grad_norm``, the norm of the gradient of all that the optimizer trains, before
    clipping, and ``crosskd/grad_norm_variation``, its standard deviation over its mean in the last
    20 steps. With or without a teacher.

    For detectron2's inner trainer (``SimpleTrainer``), whose hooks see the gradient.
    """

    def __init__(self):
        self._norms = collections.deque(maxlen=_WINDOW)

    def after_backward(self) -> None:
        scaler = getattr(self.trainer, "grad_scaler", None)
        scale = 1.0 if scaler is None else scaler.get_scale()
        groups = self.trainer.optimizer.param_groups
        grads = [p.grad for group in groups for p in group["params"] if p.grad is not None]
        norm = torch.stack([torch.linalg.vector_norm(g.float()) for g in grads]).norm().item()
        self._norms.append(norm / scale)
        storage = get_event_storage()
        storage.put_scalar("crosskd/grad_norm", self._norms[-1])
        if len(self._norms) == _WINDOW:
            deviation, mean = torch.std_mean(torch.tensor(self._norms))
            if mean > 0:
                storage.put_scalar("crosskd/grad_norm_variation", (deviation / mean).item())
