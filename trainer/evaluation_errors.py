"""What an evaluation can refuse; each message is one line and names a remedy."""

from engine.errors import OneWordError


class EvaluationError(OneWordError):
    """Something that was given to `oneword evaluate` cannot be judged, or cannot judge."""


class EncoderError(EvaluationError):
    """An encoder is missing, broken or of a kind that is not known, or cannot read its input."""


class PromptSetError(EvaluationError):
    """A set of prompts cannot be read, or says nothing that could be measured."""


class ReportError(EvaluationError):
    """A stored report is broken, or of another version."""
