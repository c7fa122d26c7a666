"""Distillation of dense detectors: the student's towers through the teacher's.

Shape shorthand: N images, A anchors per position, K foreground classes, C channels, (Hi, Wi) size
of level i, R anchors of an image over all levels.
"""

import contextlib
import dataclasses
from typing import Dict, Iterator, List, Mapping, Optional, Tuple

import torch
from detectron2.config import CfgNode, configurable
from detectron2.layers import cat
from detectron2.modeling.meta_arch.dense_detector import DenseDetector
from detectron2.modeling.meta_arch.fcos import FCOSHead
from detectron2.modeling.meta_arch.retinanet import RetinaNetHead
from detectron2.structures import Boxes, Instances
from detectron2.utils import comm
from torch import nn

from . import losses as L
from .dense_pair import TOWERS, build_fusions, check_pair, check_settings, towers_of
from .step import TeacherPass, is_logging_step, put_scalars
from .teacher import Teacher


@dataclasses.dataclass
class DenseTrace:
    """What a training forward of the student computed; tensors carry their graph.

    Attributes:
        layers: tower -> layer -> its output for each level, (N, C, Hi, Wi).
        anchors: for each level.
        labels: (N, R): class, K for background, -1 for ignored.
        boxes: for each image (R, 4), the matched ground truth.
    """

    layers: Dict[str, Dict[str, List[torch.Tensor]]] = dataclasses.field(default_factory=dict)
    anchors: List[Boxes] = dataclasses.field(default_factory=list)
    labels: Optional[torch.Tensor] = None
    boxes: List[torch.Tensor] = dataclasses.field(default_factory=list)


@contextlib.contextmanager
def record_towers(head: RetinaNetHead) -> Iterator[Dict[str, Dict[str, List[torch.Tensor]]]]:
    """Within this context, a forward of ``head`` fills tower -> layer -> outputs per level."""
    layers: Dict[str, Dict[str, List[torch.Tensor]]] = {name: {} for name in TOWERS}
    handles = []

    def keep(outputs: List[torch.Tensor]):
        def hook(module, inputs, output):
            outputs.append(output)

        return hook

    for tower, named in towers_of(head).items():
        for layer in named.names[1:]:
            outputs = layers[tower].setdefault(layer, [])
            handles.append(named.output_module(layer).register_forward_hook(keep(outputs)))
    try:
        yield layers
    finally:
        for handle in handles:
            handle.remove()


class DenseDistiller:
    """Cross-head distillation of classification and box tower, each with its own fusion.

    For each level, the student's taps are combined, standardized to the teacher's feature at the
    entry layer, rectified, and sent through the teacher's layers after it and its predictor.
    CrossKD's losses for dense heads (Wang et al., 2024) compare the results with the teacher's own.
    """

    keys = ("loss_cls_kd", "loss_box_reg_kd")

    @configurable
    def __init__(
        self,
        *,
        teacher: Teacher,
        fusion: nn.ModuleDict,
        cls_weight: float,
        box_weight: float,
        box_type: str,
    ):
        """
        Args:
            teacher: a RetinaNet or FCOS.
            fusion: tower -> :class:`FeatureFusion`.
            cls_weight: of the quality focal loss.
            box_weight, box_type: of the box loss, "giou" or "iou".
        """
        self.teacher, self.fusion = teacher, fusion
        self.cls_weight, self.box_weight = cls_weight, box_weight
        self._box_loss = {"giou": L.confident_giou, "iou": L.confident_iou}[box_type]
        self._towers = towers_of(teacher.model.head)

    @classmethod
    def from_config(cls, cfg: CfgNode, student: DenseDetector, teacher: Teacher):
        kd = cfg.MODEL.CROSSKD
        check_settings(cfg)
        check_pair(student, teacher)
        return {
            "teacher": teacher,
            "fusion": nn.ModuleDict(build_fusions(kd.FUSION, student, teacher)),
            "cls_weight": kd.LOSS.CLS_WEIGHT,
            "box_weight": kd.LOSS.BOX_WEIGHT,
            "box_type": kd.LOSS.BOX_TYPE or student.kd_box_type,
        }

    def losses(
        self,
        student: DenseDetector,
        batched_inputs: List[Dict[str, torch.Tensor]],
        trace: DenseTrace,
        factor: float,
    ) -> Dict[str, torch.Tensor]:
        """The weighted losses of one step, scalars.

        Args:
            student: whose :meth:`kd_normalizer` gives the divisor.
            batched_inputs: the student's raw images.
            trace: of its forward on them.
            factor: of the schedule; with 0 the teacher isn't run.
        """
        log = is_logging_step()
        if log:
            put_scalars({"factor": factor})
        if factor == 0:
            return {key: self._zero(trace) for key in self.keys}
        run = TeacherPass(self.teacher, batched_inputs, timed=log)
        layers, wanted = self.predict(run)
        found = self.cross_head(trace.layers, layers)
        logits, deltas = self._flatten(found)
        wanted_logits, wanted_deltas = self._flatten(wanted)

        valid = (trace.labels >= 0).flatten().to(torch.float32)  # NR
        normalizer = student.kd_normalizer(trace)
        loss_cls = L.quality_focal(
            logits, wanted_logits, beta=1.0, weights=valid, normalizer=normalizer
        )
        confidence = L.at_least_float32(wanted_logits).sigmoid().amax(dim=1) * valid
        anchors = Boxes.cat(trace.anchors).tensor.repeat(len(trace.labels), 1)  # NRx4
        transform = self.teacher.model.box2box_transform
        found_boxes, wanted_boxes = (
            transform.apply_deltas(L.at_least_float32(x), anchors) for x in (deltas, wanted_deltas)
        )
        # FCOS can answer with an empty box, which has no overlap to learn from.
        confidence = confidence * (Boxes(wanted_boxes).area() > 0)
        loss_box = self._box_loss(found_boxes, wanted_boxes, confidence, normalizer=normalizer)
        if log:
            self._log(logits, wanted_logits, valid, run.seconds)
        return {
            "loss_cls_kd": loss_cls * (self.cls_weight * factor),
            "loss_box_reg_kd": loss_box * (self.box_weight * factor),
        }

    def predict(
        self, teacher: TeacherPass
    ) -> Tuple[Dict[str, List[Dict[str, torch.Tensor]]], List[List[torch.Tensor]]]:
        """The teacher's tower layers and predictions; no gradient.

        Returns:
            tower -> for each level layer -> (N, C, Hi, Wi), and what its head gives: for each level
            the logits (N, A K, Hi, Wi), the deltas (N, 4 A, Hi, Wi) and, for FCOS, the centerness
            (N, 1, Hi, Wi).
        """
        model, features = self.teacher.model, teacher.features
        with teacher.running():
            levels = [features[name] for name in model.head_in_features]
            layers = {t: [named.trace(x) for x in levels] for t, named in self._towers.items()}
            outputs = {t: [x[self._towers[t].last] for x in layers[t]] for t in TOWERS}
            return layers, self._predictions(outputs)

    def cross_head(
        self,
        student: Mapping[str, Mapping[str, List[torch.Tensor]]],
        teacher: Mapping[str, List[Dict[str, torch.Tensor]]],
    ) -> List[List[torch.Tensor]]:
        """Cross-head predictions, as in :meth:`predict`.

        The gradient flows through the frozen layers into the taps and adapters.

        Args:
            student: tower -> layer -> its output for each level.
            teacher: as from :meth:`predict`.
        """
        outputs = {}
        for tower, named in self._towers.items():
            fusion = self.fusion[tower]
            outputs[tower] = []
            for level, theirs in enumerate(teacher[tower]):
                taps = {tap: student[tower][tap][level] for tap in fusion.taps}
                fused = fusion(taps, theirs[fusion.entry], named.run)
                outputs[tower].append(named.run(fused, after=fusion.entry))
        return self._predictions(outputs)

    def detect(
        self, student: DenseDetector, batched_inputs: List[Dict[str, torch.Tensor]]
    ) -> List[Instances]:
        """What the cross-head detects, per image, in the network's pixels; in evaluation mode."""
        images = student.preprocess_image(batched_inputs)
        features = student.backbone(images.tensor)
        levels = [features[name] for name in student.head_in_features]
        with record_towers(student.head) as layers:
            student.head(levels)
        theirs, _ = self.predict(TeacherPass(self.teacher, batched_inputs))
        found = self.cross_head(layers, theirs)
        return self.teacher.model.forward_inference(images, levels, found)

    def _predictions(self, outputs: Mapping[str, List[torch.Tensor]]) -> List[List[torch.Tensor]]:
        head = self.teacher.model.head
        found = [
            [head.cls_score(x) for x in outputs["cls"]],
            [head.bbox_pred(x) for x in outputs["bbox"]],
        ]
        if isinstance(head, FCOSHead):
            found.append([head.ctrness(x) for x in outputs["bbox"]])
        return found

    def _flatten(self, predictions: List[List[torch.Tensor]]) -> Tuple[torch.Tensor, torch.Tensor]:
        """Logits (N R, K) and deltas (N R, 4), image by image in the order of the anchors."""
        model = self.teacher.model
        logits, deltas = model._transpose_dense_predictions(predictions[:2], [model.num_classes, 4])
        return cat(logits, dim=1).flatten(0, 1), cat(deltas, dim=1).flatten(0, 1)

    def _zero(self, trace: DenseTrace) -> torch.Tensor:
        """0, connected to every learned parameter of the fusions."""
        zeros = [f.connected_zero() for f in self.fusion.values()]
        zeros = [z for z in zeros if z is not None]
        return sum(zeros) if zeros else trace.anchors[0].tensor.new_zeros(())

    @torch.no_grad()
    def _log(self, logits, wanted, valid: torch.Tensor, seconds: float) -> None:
        p, q = logits.sigmoid().amax(dim=1), wanted.sigmoid().amax(dim=1)
        same = (logits.argmax(dim=1) == wanted.argmax(dim=1)).float() * valid * q
        put_scalars(
            {
                "teacher_seconds": seconds,
                "teacher_confidence": ((q * valid).sum() / valid.sum().clamp(min=1)).item(),
                "cross_head_confidence": ((p * valid).sum() / valid.sum().clamp(min=1)).item(),
                # Weighted by the teacher's confidence: most positions are plain background.
                "agreement_cross_head": (same.sum() / (q * valid).sum().clamp(min=L.EPS)).item(),
            }
        )


def mean_over_processes(x: torch.Tensor) -> torch.Tensor:
    """The mean of a scalar over all processes."""
    if comm.get_world_size() > 1:
        torch.distributed.all_reduce(x)
        x = x / comm.get_world_size()
    return x
