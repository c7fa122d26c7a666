"""ROI heads that hand out what their box head computed in a training step.

Shape shorthand: R RoIs over all images, C channels, (P, P) pooler resolution, D width of a fully
connected layer, K classes.
"""

import contextlib
import dataclasses
from typing import Dict, Iterator, List, Optional, Tuple

import torch
from detectron2.modeling import ROI_HEADS_REGISTRY
from detectron2.modeling.roi_heads import StandardROIHeads
from detectron2.structures import Boxes, Instances

from .cross_head import BoxHeadLayers


@dataclasses.dataclass
class BoxHeadTrace:
    """What one pass of the box head saw and computed; tensors carry their graph.

    Attributes:
        proposals: per image, the boxes (``proposal_boxes``, absolute pixels) from before any
            ``TRAIN_ON_PRED_BOXES`` rewriting.
        layers: layer name -> its output, ``pool`` (R, C, P, P), ``convk`` (R, C, P, P), ``fck`` (R,
            D).
        logits: (R, K + 1) class logits of the predictor.
        deltas: (R, 4K) or (R, 4) box deltas of the predictor.
    """

    proposals: List[Instances] = dataclasses.field(default_factory=list)
    layers: Dict[str, torch.Tensor] = dataclasses.field(default_factory=dict)
    logits: Optional[torch.Tensor] = None
    deltas: Optional[torch.Tensor] = None

    @property
    def boxes(self) -> List[Boxes]:
        """The boxes of the proposals, per image."""
        return [p.proposal_boxes for p in self.proposals]


@ROI_HEADS_REGISTRY.register()
class CrossKDROIHeads(StandardROIHeads):
    """:class:`StandardROIHeads` whose box head can be recorded; unrecorded, it is its parent bit
    for bit."""

    _trace: Optional[BoxHeadTrace] = None

    def box_head_layers(self) -> BoxHeadLayers:
        """The named layers of the box head.

        Raises:
            TypeError: if the box head has no known layers.
        """
        return BoxHeadLayers(self.box_head, self.box_pooler.output_size)

    @contextlib.contextmanager
    def record(self) -> Iterator[BoxHeadTrace]:
        """Within this context, the next forward fills the trace that it yields.

        The parent's own forward runs, once, and forward hooks read its layers, so that nothing is
        computed twice.
        """
        trace = BoxHeadTrace()
        layers = self.box_head_layers()

        def keep(name: str):
            def hook(module, inputs, output):
                trace.layers[name] = output

            return hook

        def keep_predictions(module, inputs, output: Tuple[torch.Tensor, torch.Tensor]):
            trace.logits, trace.deltas = output

        modules = {name: layers.output_module(name) for name in layers.names[1:]}
        handles = [self.box_pooler.register_forward_hook(keep("pool"))]
        handles += [m.register_forward_hook(keep(name)) for name, m in modules.items()]
        handles.append(self.box_predictor.register_forward_hook(keep_predictions))
        self._trace = trace
        try:
            yield trace
        finally:
            self._trace = None
            for handle in handles:
                handle.remove()

    def _forward_box(self, features: Dict[str, torch.Tensor], proposals: List[Instances]):
        if self._trace is not None:
            # TRAIN_ON_PRED_BOXES puts new Boxes into the proposals; these references keep the old
            # ones.
            self._trace.proposals = [
                Instances(p.image_size, proposal_boxes=p.proposal_boxes) for p in proposals
            ]
        return super()._forward_box(features, proposals)
