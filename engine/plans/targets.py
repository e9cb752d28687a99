"""What plans are compiled for: a compiler, and the compute capabilities that they run on."""

import re
from dataclasses import dataclass

from engine.errors import ProviderUnavailable
from engine.plans.tensorrt_module import Kind

# What tensorrt_rtx.ComputeCapability offers (1.4 to 1.7): Turing, Ampere, Ada and Blackwell.
CAPABILITIES = ("sm75", "sm80", "sm86", "sm89", "sm120", "sm121")
_THIS_GPU = "native"  # in the place of a capability: that of this machine's GPU
_CAPABILITY = re.compile(r"sm[1-9]\d{1,2}")


@dataclass(frozen=True, slots=True)
class Target:
    """What to compile for: `rtx:sm86,sm89` or `trt:sm90` on the command line."""

    capabilities: tuple[str, ...]  # of an `rtx` target in the order of CAPABILITIES
    kind: Kind = "rtx"

    def __str__(self) -> str:
        return f"{self.kind}:{','.join(self.capabilities)}"

    @property
    def folder(self) -> str:
        """Its folder under `plans/`."""
        return "-".join((self.kind, *self.capabilities))

    @property
    def is_native(self) -> bool:
        """Whether it is `trt:native`, for the GPU of whichever machine compiles it."""
        return self.capabilities == (_THIS_GPU,)

    @classmethod
    def parse(cls, text: str) -> "Target":
        """Read `rtx:smXX[,smYY...]`, `trt:smXX` or `trt:native`.

        Raises `ProviderUnavailable` for what is not known.
        """
        kind, _, listed = text.lower().partition(":")
        wanted = list(dict.fromkeys(name.strip() for name in listed.split(",") if name.strip()))
        if kind == "rtx" and wanted:
            return cls._rtx(text, wanted)
        if kind == "trt" and wanted:
            return cls._trt(text, wanted)
        raise ProviderUnavailable(
            f"unknown target {text!r}; write rtx:SM[,SM...] with SM of {', '.join(CAPABILITIES)}, "
            "or trt:SM with that of this machine's GPU, or trt:native"
        )

    @classmethod
    def _rtx(cls, text: str, wanted: list[str]) -> "Target":
        if unknown := sorted(set(wanted) - set(CAPABILITIES)):
            raise ProviderUnavailable(
                f"unknown compute capability {', '.join(unknown)} in target {text!r}; TensorRT for "
                f"RTX compiles for {', '.join(CAPABILITIES)}"
                + (
                    "; Hopper (sm90) is not supported by TensorRT for RTX: compile trt:sm90 on "
                    "such a machine"
                    if "sm90" in unknown
                    else ""
                )
            )
        return cls(tuple(name for name in CAPABILITIES if name in wanted))

    @classmethod
    def _trt(cls, text: str, wanted: list[str]) -> "Target":
        if len(wanted) > 1:
            raise ProviderUnavailable(
                f"target {text!r} names {len(wanted)} compute capabilities; TensorRT compiles for "
                "the GPU of the machine that it runs on: name one"
            )
        if wanted[0] != _THIS_GPU and not _CAPABILITY.fullmatch(wanted[0]):
            raise ProviderUnavailable(
                f"{wanted[0]!r} in target {text!r} is no compute capability; write sm90, or native"
            )
        return cls((wanted[0],), "trt")
