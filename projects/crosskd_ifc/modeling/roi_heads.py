"""ROI heads that hand out what their box head computed in a training step.

Shape shorthand: R RoIs over all images, C channels, (P, P) pooler resolution, D width of a fully
connected layer, K classes.
"""

import contextlib
import dataclasses
from typing import Dict, Iterator, List, Optional, Tuple

import torch
from detectron2.modeling import ROI_HEADS_REGISTRY
from detectron2.modeling.roi_heads import MaskRCNNConvUpsampleHead, StandardROIHeads
from detectron2.structures import Boxes, Instances
from torch.utils.hooks import RemovableHandle

from ..distillation.head_layers import BoxHeadLayers


@dataclasses.dataclass
class MaskTrace:
    """What one training pass of the mask branch saw and computed; tensors carry their graph.

    Attributes:
        instances: per image its positive RoIs, P in all: ``proposal_boxes`` and ``gt_classes``.
        pooled: (P, C, H, W) output of the mask pooler.
        logits: (P, K or 1, 2H, 2W) of the head's predictor; None for a head without one.
    """

    instances: List[Instances] = dataclasses.field(default_factory=list)
    pooled: Optional[torch.Tensor] = None
    logits: Optional[torch.Tensor] = None

    @property
    def boxes(self) -> List[Boxes]:
        """The boxes of the RoIs, per image, absolute pixels."""
        return [x.proposal_boxes for x in self.instances]


@dataclasses.dataclass
class HeadTrace:
    """What one pass of the ROI heads saw and computed; tensors carry their graph.

    Attributes:
        proposals: per image, the boxes (``proposal_boxes``, absolute pixels) from before any
            ``TRAIN_ON_PRED_BOXES`` rewriting, and in training their ``gt_classes``.
        layers: layer name of the box head -> its output, ``pool`` (R, C, P, P), ``convk`` (R, C, P,
            P), ``fck`` (R, D).
        logits: (R, K + 1) class logits of the box predictor.
        deltas: (R, 4K) or (R, 4) box deltas of the box predictor.
        mask: of the mask branch, where there is one.
    """

    proposals: List[Instances] = dataclasses.field(default_factory=list)
    layers: Dict[str, torch.Tensor] = dataclasses.field(default_factory=dict)
    logits: Optional[torch.Tensor] = None
    deltas: Optional[torch.Tensor] = None
    mask: MaskTrace = dataclasses.field(default_factory=MaskTrace)

    @property
    def boxes(self) -> List[Boxes]:
        """The boxes of the proposals, per image."""
        return [p.proposal_boxes for p in self.proposals]


@ROI_HEADS_REGISTRY.register()
class CrossKDROIHeads(StandardROIHeads):
    """:class:`StandardROIHeads` that can be recorded; unrecorded, it is its parent bit for bit."""

    _trace: Optional[HeadTrace] = None

    def box_head_layers(self) -> BoxHeadLayers:
        """The named layers of the box head.

        Raises:
            TypeError: if the box head has no known layers.
        """
        return BoxHeadLayers(self.box_head, self.box_pooler.output_size)

    @contextlib.contextmanager
    def record(self) -> Iterator[HeadTrace]:
        """Within this context, the next forward fills the trace that it yields.

        The parent's own forward runs, once, and forward hooks read its layers, so that nothing is
        computed twice.
        """
        trace = HeadTrace()
        layers = self.box_head_layers()

        def keep(name: str):
            def hook(module, inputs, output):
                trace.layers[name] = output

            return hook

        def keep_predictions(module, inputs, output: Tuple[torch.Tensor, torch.Tensor]):
            trace.logits, trace.deltas = output

        handles = [self.box_pooler.register_forward_hook(keep("pool"))]
        for name in layers.names[1:]:
            handles.append(layers.output_module(name).register_forward_hook(keep(name)))
        handles.append(self.box_predictor.register_forward_hook(keep_predictions))
        if self.mask_on:
            handles += self._record_mask(trace.mask)
        self._trace = trace
        try:
            yield trace
        finally:
            self._trace = None
            for handle in handles:
                handle.remove()

    def _record_mask(self, trace: MaskTrace) -> List[RemovableHandle]:
        def keep_inputs(module, inputs: Tuple[torch.Tensor, List[Instances]]):
            trace.pooled, trace.instances = inputs

        def keep_logits(module, inputs, output: torch.Tensor):
            trace.logits = output

        handles = [self.mask_head.register_forward_pre_hook(keep_inputs)]
        if isinstance(self.mask_head, MaskRCNNConvUpsampleHead):
            handles.append(self.mask_head.predictor.register_forward_hook(keep_logits))
        return handles

    def _forward_box(self, features: Dict[str, torch.Tensor], proposals: List[Instances]):
        if self._trace is not None:
            # TRAIN_ON_PRED_BOXES puts new Boxes into the proposals; these references keep the old
            # ones.
            self._trace.proposals = [_keep(p, "proposal_boxes", "gt_classes") for p in proposals]
        return super()._forward_box(features, proposals)


def _keep(instances: Instances, *fields: str) -> Instances:
    return Instances(
        instances.image_size, **{f: instances.get(f) for f in fields if instances.has(f)}
    )
