"""How training itself can fail, beside the errors that all parts share."""

from __future__ import annotations

from cbtm_common.errors import InvalidState, ResourceExhausted


class OutOfDeviceMemory(ResourceExhausted):
    """The device cannot hold this task: not with a micro-batch of 1 and recomputed activations either."""


class Diverged(InvalidState):
    """The loss is not a finite number any more; going on would only spoil weights."""
