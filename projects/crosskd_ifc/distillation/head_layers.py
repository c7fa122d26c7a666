"""Heads as lists of named layers, so that they can be entered and left anywhere.

Shape shorthand: R RoIs, C channels, (P, P) pooler resolution, D width of a fully connected layer, N
images, (Hi, Wi) size of level i of a pyramid.
"""

import contextlib
import functools
import re
from typing import Dict, Iterator, List, NamedTuple, Tuple

import torch
from detectron2.modeling.meta_arch.fcos import FCOSHead
from detectron2.modeling.meta_arch.retinanet import RetinaNetHead
from detectron2.modeling.roi_heads import (
    CascadeROIHeads,
    FastRCNNConvFCHead,
    FastRCNNOutputLayers,
    StandardROIHeads,
)
from torch import nn

Shape = Tuple[int, ...]


class NamedLayers:
    """Modules in the order in which they run, grouped into layers with names.

    The modules stay those of their head: nothing is copied.

    Attributes:
        names: of the input, then of each layer.
        shapes: name -> shape of the output without its first dimension.
    """

    def __init__(
        self, first: str, layers: Dict[str, List[nn.Module]], shapes: Dict[str, Shape]
    ) -> None:
        """
        Args:
            first: name of the input.
            layers: name -> modules.
            shapes: of the input and each layer.
        """
        self._layers, self.shapes = layers, shapes
        self.names = [first, *layers]

    @property
    def last(self) -> str:
        return self.names[-1]

    def depth(self, name: str) -> int:
        """Position of a layer, the input being 0."""
        return self.names.index(name)

    def output_module(self, name: str) -> nn.Module:
        """The module whose output is the layer's (for ``fck`` its ReLU); the input has none."""
        return self._layers[name][-1]

    def run(self, x: torch.Tensor, after: str, until: str = "") -> torch.Tensor:
        """Apply the layers after ``after`` up to and including ``until`` (default: the last).

        Args:
            x: the output of layer ``after``.

        Returns:
            The output of layer ``until``; ``x`` itself if the two are the same.
        """
        for name in self.names[self.depth(after) + 1 : self.depth(until or self.last) + 1]:
            for module in self._layers[name]:
                x = module(x)
        return x

    def trace(self, x: torch.Tensor) -> Dict[str, torch.Tensor]:
        """The output of every layer, from the input ``x`` on."""
        outputs = {self.names[0]: x}
        for previous, name in zip(self.names, self.names[1:]):
            outputs[name] = self.run(outputs[previous], previous, name)
        return outputs


class BoxHeadLayers(NamedLayers):
    """The layers ``pool`` < ``conv1`` < ... < ``fc1`` < ... of a :class:`FastRCNNConvFCHead`.

    ``pool`` is the pooled map (R, C, P, P) that enters the head; ``convk`` and ``fck`` are outputs
    after norm (if any) and ReLU; flattening belongs to ``fc1``.
    """

    def __init__(self, box_head: nn.Module, pooler_resolution: Tuple[int, int]):
        """
        Args:
            box_head: the head to split.
            pooler_resolution: (height, width) of the pooled map.

        Raises:
            TypeError: if the head is of another type, whose layers are not known.
        """
        # A subclass with another forward or more children computes something else than its layers.
        names = dict(box_head.named_children())
        if getattr(type(box_head), "forward", None) is not FastRCNNConvFCHead.forward or not all(
            re.fullmatch(r"(conv|fc|fc_relu)\d+|flatten", name) for name in names
        ):
            raise TypeError(
                f"box head {type(box_head).__name__} ({', '.join(names)}) has no known layers to "
                "tap or enter; use FastRCNNConvFCHead (MODEL.ROI_BOX_HEAD.NAME)"
            )
        layers: Dict[str, List[nn.Module]] = {}
        shapes: Dict[str, Shape] = {}
        prefix: List[nn.Module] = []
        for name, module in names.items():
            if name.startswith("conv"):
                channels, size = module.in_channels, tuple(pooler_resolution)
                shapes.setdefault("pool", (channels, *size))
                layers[name], shapes[name] = [module], (module.out_channels, *size)
            elif name.startswith("fc_relu"):
                layers[f"fc{name[len('fc_relu'):]}"].append(module)
            elif name.startswith("fc"):
                area = pooler_resolution[0] * pooler_resolution[1]
                shapes.setdefault("pool", (module.in_features // area, *pooler_resolution))
                layers[name], shapes[name] = prefix + [module], (module.out_features,)
                prefix = []
            else:  # flatten
                prefix = [module]
        super().__init__("pool", layers, shapes)


class BoxStage(NamedTuple):
    """A box head, its layers and its predictor."""

    head: nn.Module
    layers: BoxHeadLayers
    predictor: FastRCNNOutputLayers

    def predict(self, features: torch.Tensor) -> Tuple[torch.Tensor, torch.Tensor]:
        """Class logits and box deltas; a predictor of one's own may return more."""
        return self.predictor(features)[:2]


def box_stages(heads: StandardROIHeads) -> List[BoxStage]:
    """The box heads in the order in which they run: one, or those of a ``CascadeROIHeads``.

    Raises:
        TypeError: if one has no known layers.
    """
    found, size = (heads.box_head, heads.box_predictor), heads.box_pooler.output_size
    pairs = zip(*found) if isinstance(heads.box_head, nn.ModuleList) else [found]
    return [BoxStage(head, BoxHeadLayers(head, size), predictor) for head, predictor in pairs]


def own_method(heads: StandardROIHeads, *names: str) -> str:
    """The first of these methods that the heads have from neither detectron2 nor this package, ""
    if there is none: what they compute isn't known from their pooler and layers."""
    for name in names:
        owner = next((kind for kind in type(heads).__mro__ if name in vars(kind)), StandardROIHeads)
        is_ours = owner.__module__.split(".")[0] == __name__.split(".")[0]
        if owner not in (StandardROIHeads, CascadeROIHeads) and not is_ours:
            return name
    return ""


class TowerLayers(NamedLayers):
    """The layers ``input`` < ``conv1`` < ``conv2`` < ... of one tower of a dense head
    (:class:`RetinaNetHead`, :class:`FCOSHead`).

    ``input`` is a level of the pyramid (N, C, Hi, Wi); ``convk`` is the output of the k-th
    convolution after norm (if any) and ReLU. A tower is shared over the levels: its norm may count
    them, so run all levels in order, one after the other.

    The shapes are (C, 0, 0): a map of any size.
    """

    def __init__(self, tower: nn.Sequential):
        """
        Args:
            tower: convolutions, each with a norm or not, and ReLUs.

        Raises:
            TypeError: if it is made of something else.
        """
        layers: Dict[str, List[nn.Module]] = {}
        shapes: Dict[str, Shape] = {}
        for module in tower:
            if isinstance(module, nn.Conv2d):
                shapes.setdefault("input", (module.in_channels, 0, 0))
                name = f"conv{len(layers) + 1}"
                layers[name], shapes[name] = [module], (module.out_channels, 0, 0)
            elif layers:
                layers[name].append(module)
        if not layers or not all(isinstance(m[-1], nn.ReLU) for m in layers.values()):
            kinds = ", ".join(type(m).__name__ for m in tower)
            raise TypeError(
                f"a tower of ({kinds}) has no known layers to tap or enter; each must be a "
                "convolution, a norm or none, and a ReLU"
            )
        super().__init__("input", layers, shapes)


TOWERS = ("cls", "bbox")


def towers_of(head: RetinaNetHead) -> Dict[str, TowerLayers]:
    """The towers of a dense head by name, "cls" and "bbox".

    Raises:
        TypeError: if it is no such head, computes more than its layers, or those are unknown.
    """
    if not isinstance(head, RetinaNetHead):
        raise TypeError(f"head {type(head).__name__} is no RetinaNetHead or FCOSHead")
    if type(head).forward not in (RetinaNetHead.forward, FCOSHead.forward):
        raise TypeError(
            f"head {type(head).__name__} has a forward of its own, so what it predicts isn't known "
            "from its layers; use RetinaNetHead or FCOSHead"
        )
    return {name: TowerLayers(head.get_submodule(f"{name}_subnet")) for name in TOWERS}


@contextlib.contextmanager
def record_towers(head: RetinaNetHead) -> Iterator[Dict[str, Dict[str, List[torch.Tensor]]]]:
    """Within this context, a forward of ``head`` fills tower -> layer -> outputs per level."""
    layers: Dict[str, Dict[str, List[torch.Tensor]]] = {name: {} for name in TOWERS}
    with contextlib.ExitStack() as hooks:
        for tower, named in towers_of(head).items():
            for layer in named.names[1:]:
                outputs = layers[tower][layer] = []
                keep = functools.partial(_keep, outputs)
                hooks.enter_context(named.output_module(layer).register_forward_hook(keep))
        yield layers


def _keep(outputs: List[torch.Tensor], module, inputs, output: torch.Tensor) -> None:
    outputs.append(output)
