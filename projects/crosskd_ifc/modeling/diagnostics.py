"""Do distillation and detection pull the student's layers in the same direction?"""

from typing import Dict, List, Mapping, Optional, Tuple

import torch
from detectron2.modeling import FPN, GeneralizedRCNN
from detectron2.modeling.meta_arch.dense_detector import DenseDetector
from detectron2.utils.events import get_event_storage
from torch import nn

from ..distillation.box import BoxDistiller
from ..distillation.dense import DenseBoxDistiller
from ..distillation.fusion import FeatureFusion
from ..distillation.head_layers import towers_of
from ..distillation.traces import put_scalars

# Parameters that both kinds of losses reach, and the modules of the predictors.
Places = Tuple[List[nn.Parameter], List[nn.Module]]


class GradientDiagnostics:
    """Cosine and ratio of the gradients of both kinds of losses, every so many iterations.

    Measured at the last layer that both reach (the deepest tapped layer of the student's box head,
    or of both towers of a dense head; for student-head mimicking its last layer; for ``pool``, or
    without losses of classes and boxes, the output convolutions of the FPN, or all of another
    backbone) and at the predictors of classes and boxes, which cross-head distillation doesn't
    reach. All losses of a kind are added, with their weights,
    before the gradient is taken.

    Logged as ``crosskd/grad_cosine_shared``, ``grad_cosine_predictor`` (-1 to 1; 0 where one of the
    gradients is 0), ``grad_ratio_shared`` and ``grad_ratio_predictor`` (length of the distillation
    gradient over that of detection). In a distributed run they are the first process's.
    """

    def __init__(self, *, period: int, shared: List[nn.Parameter], predictor: List[nn.Parameter]):
        """
        Args:
            period: iterations between measurements.
            shared, predictor: parameters of the two places.
        """
        self.period = period
        self._places = {"shared": shared, "predictor": predictor}

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
        count, none = len(places["shared"]), [total.new_zeros(1)]
        return {
            "shared": torch.cat(vectors[:count] or none),
            "predictor": torch.cat(vectors[count:] or none),
        }


def pyramid_outputs(student: nn.Module) -> List[nn.Parameter]:
    """The parameters of the output convolutions of an FPN; of all of another backbone."""
    backbone = student.backbone
    modules = backbone.output_convs if isinstance(backbone, FPN) else [backbone]
    return [p for m in modules for p in m.parameters()]


def shared_in_box_head(student: GeneralizedRCNN, box: BoxDistiller) -> List[nn.Parameter]:
    """Of the last layer that detection and distillation both reach."""
    layers = student.roi_heads.box_head_layers()
    fusion: Optional[FeatureFusion] = box.fusion
    deepest = layers.last if fusion is None else max(fusion.taps, key=layers.depth)
    if deepest != "pool" and box.is_active:
        return layers.parameters(deepest)
    return pyramid_outputs(student)


def shared_in_towers(student: DenseDetector, box: DenseBoxDistiller) -> List[nn.Parameter]:
    """Of the last layer of each tower that detection and distillation both reach."""
    if not box.is_active:
        return pyramid_outputs(student)
    parameters = []
    for tower, layers in towers_of(student.head).items():
        fusion = None if box.fusion is None else box.fusion[tower]
        deepest = layers.last if fusion is None else max(fusion.taps, key=layers.depth)
        parameters += layers.parameters(deepest)
    return parameters
