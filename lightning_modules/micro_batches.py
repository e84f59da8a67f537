"""Batches in parts, where memory does not allow them whole."""

from collections.abc import Callable
from typing import TypeVar

import torch
from pytorch_lightning.utilities.memory import garbage_collection_cuda, is_oom_error

from lightning_modules.data.datamodule import Batch

Result = TypeVar("Result")


class MicroBatches:
    """Passes batches whole until memory runs out, and in halved parts from then on.

    Attributes:
        size: Most images that are passed at once; none while batches are whole.
    """

    def __init__(self) -> None:
        self.size: int | None = None

    def parts(self, batch: Batch) -> list[Batch]:
        """Return a batch's parts in order, as equal as can be; the batch if it is whole."""
        return [batch] if self.size is None else batch.split(self.size)

    def shrink_to_fit(self, compute: Callable[[], Result], num_images: int) -> Result:
        """Return what a computation on ``parts`` returns, repeated with smaller ones until it fits.

        Args:
            compute: Starts over each time that it is called.
            num_images: The batch's.

        Raises:
            RuntimeError, MemoryError: If a single image does not fit.
        """
        while True:
            try:
                return compute()
            except (RuntimeError, MemoryError) as error:
                size = min(self.size or num_images, num_images)
                if size == 1 or not is_out_of_memory(error):
                    raise
            # Not before: the exception holds the frames, and they what was allocated.
            self.size = (size + 1) // 2
            garbage_collection_cuda()


def is_out_of_memory(error: BaseException) -> bool:
    """Tell whether an exception says that a device, or this machine, has no memory left."""
    return isinstance(error, (torch.OutOfMemoryError, MemoryError)) or is_oom_error(error)
