"""How training itself can fail, beside the errors that all parts share."""

from __future__ import annotations

from collections.abc import Mapping

from cbtm_common.errors import InvalidState, ResourceExhausted


class OutOfDeviceMemory(ResourceExhausted):
    """The device cannot hold this task: not with a micro-batch of 1 and recomputed activations either."""


class Diverged(InvalidState):
    """The loss is not a finite number any more; going on would only spoil weights."""


class StartAgain(ResourceExhausted):
    """Devices that share a model could not finish a step, and their group is over.

    Training goes on from the newest checkpoint, in a new group, with `changes` to the `TrainJob`.
    """

    def __init__(self, message: str, *, changes: Mapping[str, int | bool]) -> None:
        super().__init__(message)
        self.changes = dict(changes)
