"""What a run is told: `LearnOptions`, with every limit checked."""

import math
from dataclasses import dataclass
from typing import Literal, get_args

from trainer.errors import LearningError
from trainer.stopping import DeterministicVariance
from trainer.templates import LearnableProperty

Optimizer = Literal["adam", "adamw", "dti"]
StopRule = Literal["steps", "dvar"]

AUTO = "auto"  # as initializer_token: search for it
MAX_STEPS = 1_000_000
MAX_BATCH_SIZE = 4096
MAX_CANDIDATES = 512
CROSS_REGULARIZATION = 1e-5
_LIMITS = {
    "steps": (1, MAX_STEPS),
    "batch_size": (1, MAX_BATCH_SIZE),
    "num_vectors": (1, None),
    "eval_every": (1, None),
    "warm_start": (0, MAX_STEPS),
}
_CHOICES = {
    "learnable_property": get_args(LearnableProperty),
    "optimizer": get_args(Optimizer),
    "stop": get_args(StopRule),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class LearnOptions:
    """Everything that decides what is learned; docs/learning.md gives reasons for the defaults."""

    steps: int = 400  # at most
    batch_size: int = 8
    optimizer: Optimizer = "adam"
    learning_rate: float | None = None  # None: what the optimizer is usually given
    num_vectors: int = 1
    # A word or phrase; "auto": the best by a search; None: the mean of the vocabulary.
    initializer_token: str | None = None
    initializer_candidates: tuple[str, ...] = ()  # for the search; none: words of the vocabulary
    # Weight of the squared distance to the start, added to the loss; None: 0, but for Cross
    # Initialization its authors' 1e-5.
    regularization: float | None = None
    cross_initialization: bool = False  # start at the text encoder's output, of any length
    warm_start: int = 0  # steps towards what an image tower sees, before the first step
    learnable_property: LearnableProperty = "object"
    seed: int = 0
    eval_every: int = 50  # steps between two evaluations on the fixed batch
    stop: StopRule = "steps"  # dvar: as soon as the evaluation loss has settled
    stop_window: int = 6  # evaluations that must have settled
    stop_threshold: float = 0.15  # of their variance, relative to that of all evaluations
    progressive: bool = False  # vectors join one after another, at equal parts of the run
    per_image_tokens: bool = False  # a vector of its own for each image, dropped at the end

    def __post_init__(self) -> None:
        for name, (least, most) in _LIMITS.items():
            self._check_limits(name, least, most)
        for name, choices in _CHOICES.items():
            if getattr(self, name) not in choices:
                raise LearningError(
                    f"{name} must be {' or '.join(choices)}, got {getattr(self, name)!r}"
                )
        if self.learning_rate is not None and not 0.0 < self.learning_rate <= 1.0:
            raise LearningError(
                f"learning_rate must be above 0 and at most 1, got {self.learning_rate}"
            )
        if not 0 <= self.seed < 2**63:
            raise LearningError(f"seed must be between 0 and 2**63 - 1, got {self.seed}")
        if not 0.0 <= self.pull < math.inf:
            raise LearningError(
                f"regularization must be finite and at least 0, got {self.regularization}"
            )
        self._check_candidates()
        self._check_progressive()
        self._check_cross_initialization()
        self._settling()  # refuses what cannot be

    def _check_limits(self, name: str, least: int, most: int | None) -> None:
        value = getattr(self, name)
        if value < least:
            raise LearningError(f"{name} must be at least {least}, got {value}")
        if most is not None and value > most:
            raise LearningError(f"{name} must be at most {most}, got {value}")

    def _check_candidates(self) -> None:
        count = len(self.initializer_candidates)
        if count and self.initializer_token != AUTO:
            raise LearningError(
                f"initializer_candidates are for a search: initializer_token must be {AUTO!r}, got "
                f"{self.initializer_token!r}"
            )
        if count > MAX_CANDIDATES:
            raise LearningError(
                f"initializer_candidates must be at most {MAX_CANDIDATES}, got {count}"
            )

    def _check_progressive(self) -> None:
        if not self.progressive:
            return
        if not 2 <= self.num_vectors <= self.steps:
            raise LearningError(
                "progressive needs at least 2 vectors, and a step for each: num_vectors is "
                f"{self.num_vectors}, steps {self.steps}"
            )
        if self.per_image_tokens:
            raise LearningError("progressive and per_image_tokens cannot be combined; choose one")
        if self.warm_start:
            raise LearningError(
                f"warm_start ({self.warm_start}) leads all vectors at once, and progressive lets "
                "them join one after another; choose one"
            )
        if self.stop != "steps":
            raise LearningError(
                f"progressive lets vectors join at parts of all steps: stop must be 'steps', got "
                f"{self.stop!r}"
            )

    def _check_cross_initialization(self) -> None:
        """What holds a word's length cannot start where vectors are many times longer."""
        if self.cross_initialization and self.optimizer == "dti":
            raise LearningError(
                "cross_initialization starts longer than any word, and optimizer dti holds a "
                "word's length; use optimizer adam or adamw, or leave cross_initialization out"
            )
        if self.cross_initialization and self.warm_start:
            raise LearningError(
                "cross_initialization starts longer than any word, and warm_start "
                f"({self.warm_start}) holds a word's length; use one of them"
            )

    @property
    def pull(self) -> float:
        """The weight of the squared distance to the start that is meant, given or usual.

        That of Cross Initialization is in arXiv 2312.15905; its code takes the distance itself.
        """
        if self.regularization is not None:
            return self.regularization
        return CROSS_REGULARIZATION if self.cross_initialization else 0.0

    @property
    def rate(self) -> float:
        """The learning rate that is meant: the given one, or the optimizer's usual.

        Adam's is in units of a word (`rate_is_relative`). AdamW's is the paper's 5e-3 for each
        sample of a step (its code scales by batch size and number of GPUs, together 8), `dti` has
        0.04 radians (0.01 for each of 4 samples in the code of arXiv 2512.13672).
        """
        if self.learning_rate is not None:
            return self.learning_rate
        usual = {"adam": 0.2, "adamw": min(5e-3 * self.batch_size, 1.0), "dti": 0.04}
        return usual[self.optimizer]

    @property
    def rate_is_relative(self) -> bool:
        """Whether the rate is a share of the typical (root mean square) number in a word's vector.

        Those numbers are four times as large in the embedded model as in Stable Diffusion 1.x, and
        Adam's step in each of them is about the rate: one rate cannot suit both.
        """
        return self.optimizer == "adam" and self.learning_rate is None

    def rate_at(self, step: int) -> float:
        """The learning rate after `step` steps: along half a cosine for `adam`, else constant.

        Each stage of a progressive run has its own half cosine, or the last vector would hardly
        move.
        """
        if self.optimizer != "adam":
            return self.rate
        joined = {self.joined_at(row) for row in range(self.num_vectors)}
        start = max(at for at in joined if at <= step)
        end = min((at for at in joined if at > step), default=self.steps)
        return self.rate * 0.5 * (1 + math.cos(math.pi * ((step - start) / (end - start))))

    def joined_at(self, row: int) -> int:
        """The step at which a vector joins: 0, in a progressive run the first of its equal part.

        Gal et al. 2022, section 5; in the authors' code the parts have 2000 steps.
        """
        return -(-row * self.steps // self.num_vectors) if self.progressive else 0

    def settled(self, evaluation_losses: tuple[float, ...]) -> bool:
        """Whether the stop rule ends a run with these evaluations before its last step."""
        return self.stop == "dvar" and self._settling().settled(evaluation_losses)

    def _settling(self) -> DeterministicVariance:
        return DeterministicVariance(window=self.stop_window, threshold=self.stop_threshold)
