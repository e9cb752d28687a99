"""Every error that learning can raise on purpose; each message is one line and names a remedy.

LearningError
|-- NoUsableImages      the folder holds nothing to learn from
|-- CheckpointError     the checkpoint is broken, or belongs to another run
|-- Diverged            the loss or the gradient is NaN or infinite
`-- NoGradient          the vectors do not move: something cut the graph
"""

from engine.errors import OneWordError


class LearningError(OneWordError):
    """Base of all errors of learning."""


class NoUsableImages(LearningError):
    """No file of the folder is an image that can be learned from."""


class CheckpointError(LearningError):
    """The checkpoint cannot be read, or does not fit the run that wants to resume it."""


class Diverged(LearningError):
    """A loss or gradient is NaN or infinite; the state before it is the last one yielded."""


class NoGradient(LearningError):
    """The gradient was exactly zero for several steps in a row."""
