"""What a ``results.json`` must hold: it may be edited, merged or of an older version."""

import json
from typing import Annotated, Any, Dict, List, Optional

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from ..config import ConfigError


class RunRecord(BaseModel):
    """What every report needs of a run; a run may have more."""

    model_config = ConfigDict(extra="allow", strict=True, allow_inf_nan=False)

    arm: str
    seed: int
    replicate: int = 1
    AP: float
    AP50: float
    AP_val: Optional[float] = None
    AP50_val: Optional[float] = None
    config_sha256: str
    inputs_sha256: Optional[str] = None
    teacher_sha256: Optional[str] = None
    teacher_seed: Optional[int] = None
    iterations: int
    seconds: float
    seconds_per_step: float
    versions: Dict[str, str]
    hardware: str
    curve: List[Annotated[List[float], Field(min_length=2, max_length=2)]]  # [steps done, AP]
    statistics: Dict[str, float] = {}


class ResultsRecord(BaseModel):
    """What is read of a results file; all else in it is written anew from the protocol."""

    model_config = ConfigDict(extra="allow", strict=True)

    name: str
    command: str = ""
    runs: List[RunRecord]


def read_results(path: str) -> Dict[str, Any]:
    """Read a results file.

    Raises:
        ConfigError: naming the file and the key that can't be used.
    """
    try:
        with open(path) as f:
            content = json.load(f)
    except (OSError, ValueError) as error:
        raise ConfigError(f"{path}: not the results of a comparison: {error}") from error
    try:
        ResultsRecord.model_validate(content)
    except ValidationError as error:
        fault = error.errors(include_url=False)[0]
        key = ".".join(map(str, fault["loc"])) or "content"
        raise ConfigError(
            f"{path}: not the results of a comparison: {key}: {fault['msg']}"
        ) from error
    return content
