"""Do distillation and detection pull the student's layers in the same direction?"""

from typing import Dict, Iterable, List, Mapping

import torch
from detectron2.modeling import FPN
from detectron2.utils.events import get_event_storage
from torch import nn

from ..distillation.traces import put_scalars


class GradientDiagnostics:
    """Cosine and ratio of the gradients of both kinds of losses, every so many iterations.

    Measured at the outputs of the student's pyramid (the parameters of the FPN's output
    convolutions, or all of another backbone), which every kind of distillation reaches, so that
    numbers of different settings can be compared; and at the predictors of classes and boxes, which
    cross-head distillation doesn't reach. All losses of a kind are added, with their weights,
    before the gradient is taken.

    Logged as ``crosskd/grad_cosine_pyramid``, ``grad_cosine_predictor`` (-1 to 1; 0 where one of
    the gradients is 0), ``grad_ratio_pyramid`` and ``grad_ratio_predictor`` (norm of the
    distillation gradient over that of detection). In a distributed run they are the first
    process's.
    """

    def __init__(self, student: nn.Module, predictors: Iterable[nn.Module], *, period: int):
        """
        Args:
            student: a detector.
            predictors: its modules that predict classes and boxes.
            period: iterations between measurements.
        """
        self.period = period
        predictor = [p for module in predictors for p in module.parameters()]
        self._places = {"pyramid": pyramid_outputs(student), "predictor": predictor}

    def measure(self, losses: Mapping[str, torch.Tensor]) -> None:
        """Measure and log, if this iteration is due.

        Args:
            losses: all losses of the step, with their graphs, which stay.
        """
        if get_event_storage().iter % self.period:
            return
        kd = self._gradients([v for k, v in losses.items() if k.endswith("_kd")])
        detection = self._gradients([v for k, v in losses.items() if not k.endswith("_kd")])
        scalars = {}
        for place in self._places:
            a, b = kd[place], detection[place]
            lengths = a.norm() * b.norm()
            cosine = torch.where(lengths > 0, a.dot(b) / lengths, torch.zeros_like(lengths))
            ratio = torch.where(b.norm() > 0, a.norm() / b.norm(), torch.zeros_like(lengths))
            scalars[f"grad_cosine_{place}"] = cosine.item()
            scalars[f"grad_ratio_{place}"] = ratio.item()
        put_scalars(scalars)

    def _gradients(self, losses: List[torch.Tensor]) -> Dict[str, torch.Tensor]:
        """Place -> gradient of the sum of the losses, as one long vector in float32."""
        # Asked for now: a training loop may freeze layers at any time.
        places = {k: [p for p in v if p.requires_grad] for k, v in self._places.items()}
        parameters = [p for place in places.values() for p in place]
        total = torch.stack([x.float() for x in losses]).sum()
        found = [None] * len(parameters)
        if total.requires_grad and parameters:
            found = torch.autograd.grad(total, parameters, retain_graph=True, allow_unused=True)
        vectors = [
            (torch.zeros_like(p) if g is None else g).float().flatten()
            for p, g in zip(parameters, found)
        ]
        count, none = len(places["pyramid"]), [total.new_zeros(1)]
        return {
            "pyramid": torch.cat(vectors[:count] or none),
            "predictor": torch.cat(vectors[count:] or none),
        }


def pyramid_outputs(student: nn.Module) -> List[nn.Parameter]:
    """The parameters of the output convolutions of an FPN; of all of another backbone."""
    backbone = student.backbone
    modules = backbone.output_convs if isinstance(backbone, FPN) else [backbone]
    return [p for m in modules for p in m.parameters()]
