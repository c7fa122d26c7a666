"""What a GPU does during a profiled step, read from its Chrome trace."""

import gzip
import json
from collections import Counter
from typing import Any, Dict, List, Optional, Tuple

_DEVICE_WORK = ("kernel", "gpu_memcpy", "gpu_memset")  # categories of torch's profiler


def gpu_use(path: str, top: int = 12) -> Optional[Dict[str, Any]]:
    """How long a GPU works, and with what; None if the trace shows no GPU.

    Args:
        path: Chrome trace that ``torch.profiler`` exported, ``.json`` or ``.json.gz``.
        top: how many kernels are named.

    Returns:
        "span": seconds from the first device work to the end of the last; "busy": those with any
        work, copies too; "kernels": name -> seconds of all its launches, the longest first.
    """
    open_trace = gzip.open if path.endswith(".gz") else open
    with open_trace(path, "rt") as f:
        events = json.load(f)["traceEvents"]
    work = [event for event in events if event.get("cat") in _DEVICE_WORK]
    if not work:
        return None
    spans = sorted((event["ts"], event["ts"] + event["dur"]) for event in work)  # microseconds
    kernels: Counter = Counter()
    for event in work:
        if event["cat"] == "kernel":
            kernels[event["name"]] += event["dur"]
    return {
        "span": (max(end for _, end in spans) - spans[0][0]) / 1e6,
        "busy": _covered(spans) / 1e6,
        "kernels": {name: microseconds / 1e6 for name, microseconds in kernels.most_common(top)},
    }


def _covered(spans: List[Tuple[float, float]]) -> float:
    """The length of the union of sorted intervals."""
    covered, reached = 0.0, spans[0][0]
    for start, end in spans:
        covered += max(end - max(start, reached), 0.0)
        reached = max(reached, end)
    return covered
