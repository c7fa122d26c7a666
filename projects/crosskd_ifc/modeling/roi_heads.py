"""ROI heads that hand out what their box head computed in a training step.

Shape shorthand: R RoIs over all images, C channels, (P, P) pooler resolution, D width of a fully
connected layer, K classes.
"""

import contextlib
from typing import Dict, Iterator, List, Optional, Tuple

import torch
from detectron2.modeling import ROI_HEADS_REGISTRY
from detectron2.modeling.roi_heads import MaskRCNNConvUpsampleHead, StandardROIHeads
from detectron2.structures import Instances
from torch.utils.hooks import RemovableHandle

from ..distillation.head_layers import BoxHeadLayers
from ..distillation.traces import HeadTrace, MaskTrace


@ROI_HEADS_REGISTRY.register()
class CrossKDROIHeads(StandardROIHeads):
    """``StandardROIHeads`` that can be recorded; unrecorded, it is its parent bit for bit."""

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
