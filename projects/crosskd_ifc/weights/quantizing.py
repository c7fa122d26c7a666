"""Post-training quantization of an ONNX file: convolutions and linear layers in int8."""

import logging
import os
import tempfile
from typing import Iterator, Sequence

import torch

_QUANTIZED = ["Conv", "Gemm", "MatMul"]  # RoIAlign, NMS and boxes stay float32


def quantize(path: str, images: Sequence[torch.Tensor]) -> None:
    """Replace an ONNX file by one whose convolutions and linear layers compute in int8.

    Weights are scaled for each channel, activations by the range that they have on ``images``.

    Args:
        path: of a file that :func:`write_graph` wrote.
        images: (3, H, W) as the file takes them.
    """
    from onnxruntime import quantization
    from onnxruntime.quantization.shape_inference import quant_pre_process

    class Reader(quantization.CalibrationDataReader):
        def __init__(self):
            self._inputs: Iterator = iter([{"image": x.contiguous().numpy()} for x in images])

        def get_next(self):
            return next(self._inputs, None)

    with tempfile.TemporaryDirectory(dir=os.path.dirname(path)) as folder:
        prepared, quantized = (os.path.join(folder, x) for x in ("prepared.onnx", "int8.onnx"))
        logging.disable(logging.WARNING)  # it warns of nodes without known shapes, such as NMS
        try:
            quant_pre_process(path, prepared, skip_symbolic_shape=True)
            quantization.quantize_static(
                prepared,
                quantized,
                Reader(),
                quant_format=quantization.QuantFormat.QDQ,
                op_types_to_quantize=_QUANTIZED,
                per_channel=True,
                activation_type=quantization.QuantType.QUInt8,
                weight_type=quantization.QuantType.QInt8,
            )
        finally:
            logging.disable(logging.NOTSET)
        os.replace(quantized, path)
