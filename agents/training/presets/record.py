"""What a preset is."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Preset:
    """An experiment's settings, as data: reading it needs neither the model nor its family.

    Attributes:
        description: what it stands for, in one line.
        model: the model that it is for, as in `agents.training.config.TrainConfig`.
        agent: the algorithm's name.
        agent_options: the algorithm's settings; those that are not here are the algorithm's own.
        settings: fields of `agents.training.config.TrainConfig`. ``microbatch`` is for the preset's own model.
        model_options: the settings of the model's family.
        family: the name of that family. Where it is known, no hub is asked what the model is.
    """

    description: str
    model: str
    agent: str
    agent_options: Mapping[str, Any] = field(default_factory=dict)
    settings: Mapping[str, Any] = field(default_factory=dict)
    model_options: Mapping[str, Any] = field(default_factory=dict)
    family: str | None = None
