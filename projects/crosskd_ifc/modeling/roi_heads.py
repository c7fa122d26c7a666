"""ROI heads that hand out what their box heads and branches computed in a training step."""

import contextlib
from typing import Dict, Iterator, List, Optional, Tuple

import torch
from detectron2.modeling import ROI_HEADS_REGISTRY
from detectron2.modeling.roi_heads import CascadeROIHeads, StandardROIHeads
from detectron2.structures import Instances
from torch import nn
from torch.utils.hooks import RemovableHandle

from ..distillation.head_layers import BoxStage, box_stages
from ..distillation.traces import BoxTrace, BranchTrace, HeadTrace


class RecordedROIHeads:
    """Mixin for ``StandardROIHeads``: they can be recorded; unrecorded, they are their parent bit
    for bit.

    The parent calls :meth:`_see` for each box head with what enters it.
    """

    _trace: Optional[HeadTrace] = None

    @contextlib.contextmanager
    def record(self) -> Iterator[HeadTrace]:
        """Within this context, the next forward fills the trace that it yields.

        The parent's own forward runs, once, and forward hooks read its layers, so that nothing is
        computed twice.

        Raises:
            TypeError: if a box head has no known layers.
        """
        stages = box_stages(self)
        trace = HeadTrace([BoxTrace() for _ in stages])
        with contextlib.ExitStack() as stack:
            for handle in sum(map(_record_box, stages, trace.stages), []):
                stack.enter_context(handle)
            for branch in ("mask", "keypoint"):
                head = getattr(self, f"{branch}_head", None)
                if hasattr(head, "layers"):
                    stack.enter_context(_recording_branch(head, getattr(trace, branch)))
            self._trace = trace
            try:
                yield trace
            finally:
                self._trace = None

    def _see(self, stage: int, proposals: List[Instances]) -> None:
        if self._trace is not None:
            # TRAIN_ON_PRED_BOXES puts new Boxes into the proposals; these references keep the old
            # ones.
            kept = [_keep(p, "proposal_boxes", "gt_classes") for p in proposals]
            self._trace.stages[stage].proposals = kept


@ROI_HEADS_REGISTRY.register()
class CrossKDROIHeads(RecordedROIHeads, StandardROIHeads):
    """``StandardROIHeads`` that can be recorded."""

    def _forward_box(self, features: Dict[str, torch.Tensor], proposals: List[Instances]):
        self._see(0, proposals)
        return super()._forward_box(features, proposals)


@ROI_HEADS_REGISTRY.register()
class CrossKDCascadeROIHeads(RecordedROIHeads, CascadeROIHeads):
    """``CascadeROIHeads`` that can be recorded."""

    def _run_stage(self, features: List[torch.Tensor], proposals: List[Instances], stage: int):
        self._see(stage, proposals)
        return super()._run_stage(features, proposals, stage)


def _record_box(stage: BoxStage, trace: BoxTrace) -> List[RemovableHandle]:
    def keep(name: str):
        def hook(module, inputs, output):
            trace.layers[name] = output

        return hook

    def keep_pooled(module, inputs: Tuple[torch.Tensor]):
        # As the head sees it: a Cascade R-CNN scales the gradient behind the pooler.
        (trace.layers["pool"],) = inputs

    def keep_predictions(module, inputs, output: Tuple[torch.Tensor, ...]):
        trace.logits, trace.deltas = output[:2]  # a predictor of one's own may return more

    layers = stage.layers
    return [
        stage.head.register_forward_pre_hook(keep_pooled),
        *(layers.output_module(n).register_forward_hook(keep(n)) for n in layers.names[1:]),
        stage.predictor.register_forward_hook(keep_predictions),
    ]


@contextlib.contextmanager
def _recording_branch(head: nn.Module, trace: BranchTrace) -> Iterator[None]:
    """For a BaseMaskRCNNHead or BaseKeypointRCNNHead, whose ``layers`` are a method, no module with
    a hook."""
    layers = head.layers

    def keep_instances(module, inputs: Tuple[torch.Tensor, List[Instances]]):
        trace.instances = inputs[1]

    def keep_layers(x: torch.Tensor) -> torch.Tensor:
        trace.pooled, trace.logits = x, layers(x)
        return trace.logits

    head.layers = keep_layers
    try:
        with head.register_forward_pre_hook(keep_instances):
            yield
    finally:
        del head.layers


def _keep(instances: Instances, *fields: str) -> Instances:
    return Instances(
        instances.image_size, **{f: instances.get(f) for f in fields if instances.has(f)}
    )
