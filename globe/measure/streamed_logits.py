"""The logits of a model that does not fit into memory: its layers are run at once, its head a batch at a time."""

from __future__ import annotations

import torch
from torch import Tensor

from globe.machine.memory import explained_exhaustion
from globe.measure.tokenizers import check_vocabulary
from globe.model.loading import OUT_OF_MEMORY
from globe.model.streamed import StreamedModel


class StreamedLogits:
    """Logits of a model on token windows (N, length), with the hidden states behind the last layer in memory."""

    @torch.no_grad()
    def __init__(self, model: StreamedModel, windows: Tensor, batch: int, *, name: str, because: str) -> None:
        """Run all layers, so many windows at a time; `CheckpointError` for tokens that the model does not know.

        Args:
            name: what messages call the model.
            because: why it was not loaded.
        """
        check_vocabulary(windows, model.model, name)
        self.device, self.because = model.device, because
        self._model, self._windows = model, windows
        with explained_exhaustion(f"running {name} on {model.device}", OUT_OF_MEMORY):
            passage = model.enter(windows, batch)
            for index in range(len(model)):
                with model.layer(index) as layer:
                    passage.through(index, layer)
        self._hidden = torch.cat(passage.hidden)

    @torch.no_grad()
    def batch(self, first: int, count: int) -> Tensor:
        """Of the next tokens in the windows from `first` on, (count, length - 1, vocabulary)."""
        some = slice(first, first + count)
        return self._model.leave(self._windows[some], self._hidden[some])[:, :-1]
