"""The tokenizer of a model: its own, or an error; and whether two models have the same."""

from __future__ import annotations

import fnmatch
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor
from transformers import AutoConfig, AutoTokenizer, PreTrainedConfig

from globe.checkpoint.side_files import foreign_code, named_code
from globe.errors import CheckpointError, SettingsError, UntrustedCodeError

_WHOLE = ("tokenizer.json", "tekken.json", "*.model", "*.model.v*", "*.tiktoken")
"""Files of which one is a tokenizer's vocabulary, whatever the class."""


def load_tokenizer(folder: str | Path, trust_remote_code: bool = False) -> Any:
    """The tokenizer in the folder of a model; code of its own is run only with `trust_remote_code`.

    Raises `UntrustedCodeError` without it, `CheckpointError` with the cause when there is no tokenizer: where its files
    are missing, transformers would make one up.
    """
    folder = Path(folder)
    code = sorted(named_code(folder))
    if trust_remote_code and (foreign := foreign_code(folder)):
        raise CheckpointError(
            f"the tokenizer of {folder} is code of another repository, {foreign[0]}, which is not fetched: save that "
            "code beside the weights and name it in tokenizer_config.json without the repository"
        )
    try:
        tokenizer: Any = AutoTokenizer.from_pretrained(
            str(folder), config=_config(folder), trust_remote_code=trust_remote_code
        )
    except Exception as error:  # that of the tokenizers library has no class of its own
        if code and not trust_remote_code:
            raise UntrustedCodeError(
                f"the tokenizer of {folder} is code of its own ({', '.join(code)}), which is not run unasked: read it, "
                "and give --trust-remote-code if you trust it (in Python: trust_remote_code=True)"
            ) from error
        if not _has_vocabulary(folder):
            raise _none(folder, ["tokenizer.json"]) from error
        raise CheckpointError(
            f"the tokenizer of {folder} cannot be loaded: {type(error).__name__}: {' '.join(str(error).split())}. "
            "If its files are damaged, copy them from where the model came from"
        ) from error
    if type(tokenizer).__module__.startswith("transformers.") and (missing := _missing(tokenizer, folder)):
        raise _none(folder, missing)
    return tokenizer


def encode(tokenizer: Any, text: str, **settings: Any) -> Any:
    """What the tokenizer makes of a text; `CheckpointError` if its files do not let it."""
    try:
        return tokenizer(text, **settings)
    except Exception as error:  # that of the tokenizers library has no class of its own
        raise CheckpointError(
            f"the tokenizer cannot read the text ({type(error).__name__}: {error}): its files are damaged; copy them "
            "from where the model came from"
        ) from error


def chat_writer(tokenizer: Any) -> Callable[[list[Any]], str]:
    """Makes the text of a chat of its messages by the model's chat template.

    It raises `SettingsError` where the model has none, or the template does not take the messages.
    """

    def write(messages: list[Any]) -> str:
        if not getattr(tokenizer, "chat_template", None):
            raise SettingsError("the model has no chat template; give its text as the field `text`")
        try:
            return tokenizer.apply_chat_template(messages, tokenize=False)
        except Exception as error:  # whatever a template raises
            raise SettingsError(
                f"the model's chat template does not take it ({type(error).__name__}: {error}); a chat is a list of "
                "objects with `role` and `content`"
            ) from error

    return write


def check_same_tokenizer(ids: Sequence[int], others: Sequence[int], model: str, reference: str) -> None:
    """Raise `CheckpointError` unless two tokenizers made the same of one text."""
    if list(ids) == list(others):
        return
    place = next((i for i, pair in enumerate(zip(ids, others, strict=False)) if pair[0] != pair[1]), None)
    where = (
        f"token {place} is number {ids[place]} to one and {others[place]} to the other"
        if place is not None
        else f"{len(ids)} tokens and {len(others)}"
    )
    raise CheckpointError(
        f"{model} and {reference} cannot be compared: their tokenizers read the same text differently ({where}); "
        "give the model that it was compressed from as --reference, or none"
    )


def check_vocabulary(ids: Tensor, model: Any, name: str) -> None:
    """Raise `CheckpointError` unless the model has an embedding for every token."""
    largest, known = int(ids.max()), len(model.get_input_embeddings().weight)
    if largest >= known:
        raise CheckpointError(
            f"the text has token {largest}, and {name} knows {known} of them: its tokenizer belongs to another model; "
            "copy the tokenizer's files from where the model came from"
        )


def _config(folder: Path) -> PreTrainedConfig:
    """The configuration, from which transformers takes the tokenizer's class, without code of the model."""
    try:
        return AutoConfig.from_pretrained(str(folder), trust_remote_code=False)
    except (ValueError, OSError):
        entries, _ = PreTrainedConfig.get_config_dict(str(folder))
        return PreTrainedConfig.from_dict({key: value for key, value in entries.items() if key != "model_type"})


def _missing(tokenizer: Any, folder: Path) -> list[str]:
    """The files from which the tokenizer's class reads its vocabulary, if it made one up without them."""
    files: dict[str, str] = type(tokenizer).vocab_files_names
    read = {name for kind, name in files.items() if kind != "tokenizer_file"}
    if not files or _has_vocabulary(folder) or (read and all((folder / name).is_file() for name in read)):
        return []
    return [name for name in sorted({"tokenizer.json", *read}) if not (folder / name).is_file()]


def _has_vocabulary(folder: Path) -> bool:
    names = [path.name for path in folder.iterdir() if path.is_file()]
    return any(fnmatch.fnmatchcase(name, pattern) for name in names for pattern in _WHOLE)


def _none(folder: Path, missing: Sequence[str]) -> CheckpointError:
    return CheckpointError(
        f"{folder} has no tokenizer: it lacks {', '.join(missing)}; copy the tokenizer's files from where the model "
        "came from"
    )
