"""The settings of an evaluation: the API, the command line and the record of it."""

from __future__ import annotations

import dataclasses

from globe.errors import SettingsError
from globe.machine.device import AUTO, check_device_word
from globe.typed import documented, fit_settings


@documented
@dataclasses.dataclass(frozen=True)
class EvaluateConfig:
    """What a model is evaluated on."""

    text: str = "heldout"
    """Text to predict: a shipped split (heldout, calibration), a file, plain or with a field `text`, or a chat in
    `messages`, in each line of JSON, or a data set of the Hub with such fields: OWNER/NAME, OWNER/NAME:CONFIG or
    OWNER/NAME:CONFIG:SPLIT (train unless said)."""
    max_tokens: int = 32768
    """Tokens predicted at most."""
    length: int = 256
    """Tokens in a window; windows do not overlap and the first token of each is not predicted."""
    batch: int = 8
    """Windows in a forward pass."""
    tasks: tuple[str, ...] = ()
    """Also tasks of lm-eval: names, or YAML files of your own, separated by commas or spaces."""
    device: str = AUTO
    """Where the models run: cpu, cuda, mps, or auto: the GPU where there is one."""
    trust_remote_code: bool = False
    """Run the code of a tokenizer that brings its own."""

    def __post_init__(self) -> None:
        fit_settings(self, SettingsError, max_tokens=1, length=2, batch=1)
        object.__setattr__(self, "tasks", tuple(name for each in self.tasks for name in each.split(",") if name))
        check_device_word(self.device)

    @property
    def num_characters(self) -> int:
        """Of the text that hold all tokens: no tokenizer in use makes them longer than 16 characters on average."""
        return 16 * (self.max_tokens + self.length)
