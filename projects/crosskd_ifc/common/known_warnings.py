"""Ignores warnings of libraries about their own code, which nobody who trains can mend.

Importing this module does it. It must come before detectron2, whose import gives most of them.
"""

import logging
import warnings

# fvcore and detectron2 compile losses while they are imported
warnings.filterwarnings(
    "ignore", r"`torch\.jit\.script` is deprecated", FutureWarning, r"torch\.jit\._script"
)
# exported files in TorchScript, which detectron2 can be traced to and not to what replaces it
warnings.filterwarnings(
    "ignore", r"`torch\.jit\.load` is deprecated", FutureWarning, r"torch\.jit\._serialization"
)
# detectron2's model zoo finds its files by pkg_resources
warnings.filterwarnings(
    "ignore", r"pkg_resources is deprecated", UserWarning, r"detectron2\.model_zoo\.model_zoo"
)
# detectron2's anchors name no indexing
warnings.filterwarnings(
    "ignore", r"torch\.meshgrid: ", UserWarning, r"torch\.(functional|nn\.modules\.module)"
)
# detectron2's trainer hands it to DDP, where there are several processes
warnings.filterwarnings(
    "ignore", r"`broadcast_buffers` is", FutureWarning, r"detectron2\.engine\.defaults"
)
# detectron2 asks whether it is traced; torch logs this once
logging.getLogger("torch.fx._symbolic_trace").addFilter(
    lambda record: "is_fx_tracing will return true for both" not in record.getMessage()
)
