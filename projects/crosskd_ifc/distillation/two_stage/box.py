"""Distillation of a box head; a Cascade R-CNN has several.

Shape shorthand: N images, R RoIs over all images, K the teacher's foreground classes (background is
column K), D width of a fully connected layer, C channels, (P, P) pooler resolution.
"""

from typing import Callable, Dict, List, Mapping, Optional, Sequence, Tuple

import torch
import torch.nn.functional as F
from detectron2.config import CfgNode, configurable
from detectron2.modeling import GeneralizedRCNN
from detectron2.modeling.roi_heads.fast_rcnn import fast_rcnn_inference
from detectron2.structures import Boxes, Instances

from ...config import ConfigError
from .. import losses as L
from ..compatibility.class_map import ClassMap
from ..compatibility.two_stage import StagePair, build_fusion, check_sigmoid_settings
from ..fusion import FeatureFusion
from ..head_layers import BoxStage, box_stages
from ..loss_types.classification import ClsLoss, SigmoidClsLoss
from ..teacher import Teacher, TeacherPass
from ..traces import BoxTrace, HeadTrace, StepTrace, put_scalars
from .box_heads import BoxPredictions, CrossHead, StudentHead, Term


class BoxDistiller:
    """The losses ``loss_cls_kd`` and ``loss_box_reg_kd`` of one box head; of stage k of a Cascade
    R-CNN student ``loss_cls_stagek_kd`` and ``loss_box_reg_stagek_kd``."""

    @configurable
    def __init__(
        self,
        *,
        teacher: Teacher,
        stages: StagePair,
        head: BoxStage,
        mimic,
        class_map: Optional[ClassMap],
        sigmoids: Tuple[bool, bool],
        cls_weight: float,
        cls_loss: Callable[..., torch.Tensor],
        box_weight: float,
        box_type: str,
    ):
        """
        Args:
            teacher: a :class:`GeneralizedRCNN` whose box head has known layers.
            stages: which box head of the student learns from which of the teacher.
            head: the latter.
            mimic: a :class:`CrossHead` or :class:`StudentHead`.
            class_map: for statistics; None if the teacher has other classes.
            sigmoids: whether student and teacher score each class by itself.
            cls_weight, cls_loss: of the classification loss, a :class:`ClsLoss` or
                :class:`SigmoidClsLoss`.
            box_weight, box_type: of the box loss, "l1" or "giou".
        """
        self.teacher, self.stages, self._head = teacher, stages, head
        self.keys = tuple(f"loss_{x}{stages.suffix}_kd" for x in ("cls", "box_reg"))
        self.mimic = mimic
        self.fusion: Optional[FeatureFusion] = mimic.fusion
        self.cls_weight, self._cls_loss = cls_weight, cls_loss
        self.box_weight = box_weight
        self._box_loss = {"l1": self._box_l1, "giou": self._box_giou}[box_type]
        self._class_map, self._sigmoids = class_map, sigmoids

    @classmethod
    def from_config(
        cls,
        cfg: CfgNode,
        student: GeneralizedRCNN,
        teacher: Teacher,
        class_map: Optional[ClassMap],
        *,
        stages: StagePair,
        own_predictions: bool,
    ):
        kd = cfg.MODEL.CROSSKD
        ours = box_stages(student.roi_heads)[stages.student]
        theirs = box_stages(teacher.model.roi_heads)[stages.teacher]
        sigmoids = ours.predictor.use_sigmoid_ce, theirs.predictor.use_sigmoid_ce
        box_type = kd.LOSS.BOX_TYPE or "l1"
        if box_type not in ("l1", "giou"):
            raise ConfigError(
                f"MODEL.CROSSKD.LOSS.BOX_TYPE {box_type!r} is for dense detectors; possible values "
                "here: 'l1', 'giou'"
            )
        if own_predictions:
            mimic = StudentHead(ours, theirs, class_map)
        else:
            mimic = CrossHead(theirs, build_fusion(cfg, ours.layers, theirs.layers))
        if sigmoids[1]:
            check_sigmoid_settings(cfg)
        return {
            "teacher": teacher,
            "stages": stages,
            "head": theirs,
            "mimic": mimic,
            "class_map": class_map,
            "sigmoids": sigmoids,
            "cls_weight": kd.LOSS.CLS_WEIGHT * stages.share,
            "cls_loss": SigmoidClsLoss() if sigmoids[1] else ClsLoss(kd.LOSS),
            "box_weight": kd.LOSS.BOX_WEIGHT * stages.share,
            "box_type": box_type,
        }

    @property
    def parts(self) -> Sequence["BoxDistiller"]:
        return (self,)

    def losses(self, step: StepTrace) -> Dict[str, torch.Tensor]:
        """The weighted losses of one step, scalars; with both weights 0 nothing is computed, and
        with that of the classes 0 not their loss, which may need a class map."""
        trace = step.heads.stages[self.stages.student]
        if self.cls_weight == self.box_weight == 0:
            return {key: self.zero(step.heads) for key in self.keys}
        if not trace.proposals:
            raise ConfigError(
                "MODEL.ROI_HEADS.NAME: the student's ROI heads have a _forward_box (of a cascade, "
                "a _run_stage) that doesn't call super()'s, so its boxes aren't known"
            )
        targets, layers = self._targets(step.teacher, trace.boxes)
        terms, wanted = self.mimic.terms(trace, layers), self.mimic.targets(targets)
        loss_cls = sum(
            x.weight * self._cls_loss(x.logits, wanted.logits, lambda: self._truth(trace))
            for x in (terms if self.cls_weight > 0 else ())
        )
        loss_box = sum(x.weight * self._box_loss(x, wanted, trace.boxes) for x in terms)
        if step.log:
            self._log(terms, targets, trace, layers)
        # The terms may leave out some learned parameters, and DDP wants a gradient for each.
        loss_cls = loss_cls * self.cls_weight + self.zero(step.heads)
        return dict(zip(self.keys, (loss_cls, loss_box * self.box_weight)))

    def zero(self, trace: HeadTrace) -> torch.Tensor:
        """0, connected to every learned parameter of the fusion."""
        parameters = () if self.fusion is None else self.fusion.parameters()
        return L.connected_zero(trace.stages[0].logits.new_zeros(()), parameters)

    def predict(
        self, teacher: TeacherPass, boxes: List[Boxes]
    ) -> Tuple[BoxPredictions, Dict[str, torch.Tensor]]:
        """The teacher's own predictions and box-head layers for the given boxes; no gradient.

        Args:
            teacher: on the batch.
            boxes: per image, absolute pixels of the student's input.
        """
        return self._answer(teacher, self._pool(teacher, boxes))

    def _targets(self, teacher: TeacherPass, boxes: List[Boxes]):
        """As :meth:`predict`, for the RoIs of a step: what parts have in common, once."""
        ours, theirs = self.stages.student, self.stages.teacher

        def pooled() -> torch.Tensor:
            return teacher.once(f"pooled {ours}", lambda: self._pool(teacher, boxes))

        return teacher.once(f"box {ours} {theirs}", lambda: self._answer(teacher, pooled()))

    def _pool(self, teacher: TeacherPass, boxes: List[Boxes]) -> torch.Tensor:
        heads = self.teacher.model.roi_heads
        return teacher.pooled(heads.box_pooler, heads.box_in_features, boxes)

    def _answer(self, teacher: TeacherPass, pooled: torch.Tensor):
        with teacher.running():
            layers = self._head.layers.trace(pooled)
            last = layers[self._head.layers.last]
            return BoxPredictions(*self._head.predict(last)), layers

    def _truth(self, trace: BoxTrace) -> torch.Tensor:
        """The ground truth of the RoIs (R,), as columns of the logits that are compared."""
        classes = torch.cat([p.gt_classes for p in trace.proposals])
        if self.fusion is None:
            return self._class_map.to_column(classes)
        # MASKED, -1, becomes background.
        return self._class_map.to_teacher(classes) % (self._class_map.num_teacher_classes + 1)

    def _box_l1(self, found: BoxPredictions, wanted: BoxPredictions, boxes: List[Boxes]):
        return L.confident_l1(found.deltas, wanted.deltas, wanted.logits, sigmoid=self._sigmoids[1])

    def _box_giou(self, found: BoxPredictions, wanted: BoxPredictions, boxes: List[Boxes]):
        confidence, classes = L.teacher_confidence(wanted.logits, sigmoid=self._sigmoids[1])
        anchors, transform = Boxes.cat(boxes).tensor, self.mimic.predictor.box2box_transform
        decoded = (
            transform.apply_deltas(L.at_least_float32(L.select_class_boxes(x, classes)), anchors)
            for x in (found.deltas, wanted.deltas)
        )
        return L.confident_giou(*decoded, confidence, normalizer=confidence.sum() + L.EPS)

    @torch.no_grad()
    def _log(
        self,
        terms: List[Term],
        targets: BoxPredictions,
        trace: BoxTrace,
        teacher: Mapping[str, torch.Tensor],
    ) -> None:
        """Statistics of this step to the EventStorage."""
        scalars = {"num_rois": float(len(targets.logits))}
        ours, theirs = self._sigmoids
        if len(targets.logits):
            answer = _best_class(targets.logits, sigmoid=theirs)
            confidence, _ = L.teacher_confidence(targets.logits, sigmoid=theirs)
            scalars["teacher_confidence"] = confidence.mean().item()
            for term in terms if self.fusion is not None else ():
                agreement = _share(_best_class(term.logits, sigmoid=theirs), answer)
                if term.name == "combined":
                    scalars["agreement_cross_head"] = agreement
                    scalars.update(_compare(term.feature, teacher[self.fusion.entry]))
                else:
                    scalars[f"agreement_{term.name}"] = agreement
            if self._class_map is not None:
                answer = self._class_map.to_student(answer)
                own = _best_class(trace.logits, sigmoid=ours)
                scalars["agreement_student"] = _share(answer, own)
                truth = torch.cat([p.gt_classes for p in trace.proposals])
                scalars["disagreement_truth"] = 1 - _share(answer, truth)
                positive = truth < self._class_map.num_classes
                if positive.any():
                    wrong = 1 - _share(answer[positive], truth[positive])
                    scalars["disagreement_truth_foreground"] = wrong
        end = f"_{self.stages.name}" if self.stages.name else ""
        put_scalars({name + end: value for name, value in scalars.items()})


def detect(
    parts: Sequence[BoxDistiller], teacher: TeacherPass, trace: HeadTrace
) -> List[Instances]:
    """The detections per image of the cross-head predictions, in the network's pixels.

    Those of several box heads become one as in ``CascadeROIHeads``: the mean of all scores, the
    boxes of the last.
    """
    all_scores = []
    for part in parts:
        predictor, seen = part.mimic.predictor, trace.stages[part.stages.student]
        found = part.mimic.predict(seen, part.predict(teacher, seen.boxes)[1])
        predictions = (found.logits, found.deltas)
        all_scores.append(predictor.predict_probs(predictions, seen.proposals))
    return fast_rcnn_inference(
        predictor.predict_boxes(predictions, seen.proposals),
        [sum(scores) * (1.0 / len(parts)) for scores in zip(*all_scores)],
        [x.image_size for x in seen.proposals],
        predictor.test_score_thresh,
        predictor.test_nms_thresh,
        predictor.test_topk_per_image,
    )[0]


def _best_class(logits: torch.Tensor, *, sigmoid: bool) -> torch.Tensor:
    """(R, K + 1) -> (R,); of sigmoids background, K, where no class has more than one half."""
    return (F.pad(logits[:, :-1], (0, 1)) if sigmoid else logits).argmax(dim=1)


def _compare(fused: torch.Tensor, teacher: torch.Tensor) -> Dict[str, float]:
    """How long the combined features are beside the teacher's own, and how alike their direction,
    over the R > 0 RoIs."""
    ours, theirs = (x.flatten(1).float() for x in (fused, teacher))
    length = ours.norm(dim=1).mean() / theirs.norm(dim=1).mean().clamp(min=L.EPS)
    cosine = F.cosine_similarity(ours, theirs, dim=1).mean()
    return {"fused_length": length.item(), "fused_cosine": cosine.item()}


def _share(a: torch.Tensor, b: torch.Tensor) -> float:
    """Share of equal elements."""
    return (a == b).float().mean().item()
