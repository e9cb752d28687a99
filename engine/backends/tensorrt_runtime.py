"""Plans deserialized by TensorRT or TensorRT for RTX, with what only one of them has.

Not executed by the project's tests beyond what the libraries do without a GPU: they refuse.
"""

import hashlib
import os
from pathlib import Path
from typing import Any

from engine.backends.plan_program import OpenedPlan
from engine.errors import BundleError, ProviderUnavailable
from engine.files import write_atomically
from engine.plans.manifest import PlanSpec
from engine.plans.tensorrt_module import MODULES, Kind, import_tensorrt, make_logger


class TensorRtRuntime:
    """Opens plans. What it is given was checked against its manifest before."""

    def __init__(self, kind: Kind, *, gpu_name: str, cache_dir: Path | None = None) -> None:
        """`cache_dir`: what TensorRT for RTX compiles on this GPU is kept there; None: is not."""
        self._trt = import_tensorrt(kind)
        self._kind: Kind = kind
        self._log = make_logger(self._trt)
        self._runtime = self._trt.Runtime(self._log)
        self._gpu_name, self._cache_dir = gpu_name, cache_dir

    @property
    def version(self) -> str:
        return str(self._trt.__version__)

    def open(self, file: Path, plan: PlanSpec) -> OpenedPlan:
        """Deserialize a plan; raises `BundleError` with TensorRT's own words."""
        content = file.read_bytes()
        self._check_validity(file, content)
        engine = self._runtime.deserialize_cuda_engine(content)
        if engine is None:
            raise BundleError(
                f"{MODULES[self._kind]} cannot open {file.name}: {self._log.summary()}; compile "
                "the target again on this machine"
            )
        config = engine.create_runtime_config()
        config.set_execution_context_allocation_strategy(
            self._trt.ExecutionContextAllocationStrategy.USER_MANAGED
        )
        kept = None
        if self._kind == "rtx":
            config.cuda_graph_strategy = self._trt.CudaGraphStrategy.WHOLE_GRAPH_CAPTURE
            if self._cache_dir is not None:
                kept = RuntimeCache(config, self._cache_file(plan))
        return OpenedPlan(
            engine=engine,
            make_context=lambda: self._context(engine, config, file.name),
            warmed_up=(lambda: None) if kept is None else kept.save,
        )

    def _context(self, engine: Any, config: Any, name: str) -> Any:
        context = engine.create_execution_context(config)
        if context is None:
            raise ProviderUnavailable(f"{name} cannot run: {self._log.summary()}")
        return context

    def _check_validity(self, file: Path, content: bytes) -> None:
        """TensorRT for RTX can read a plan's header alone, and say why it is no good here."""
        if not hasattr(self._runtime, "get_engine_validity"):
            return
        validity, reasons = self._runtime.get_engine_validity(content)
        if validity == self._trt.EngineValidity.INVALID:
            raise BundleError(
                f"{MODULES[self._kind]} {self.version} does not take {file.name}: "
                f"{self._reasons(int(reasons))}; compile the target again"
            )

    def _reasons(self, bits: int) -> str:
        members = self._trt.EngineInvalidityDiagnostics.__members__.items()
        names = [name.lower().replace("_", " ") for name, bit in members if int(bit) & bits]
        return ", ".join(names) or self._log.summary()

    def _cache_file(self, plan: PlanSpec) -> Path:
        assert self._cache_dir is not None
        made_of = f"{plan.sha256} {self.version} {self._gpu_name}"
        return self._cache_dir / f"{hashlib.sha256(made_of.encode()).hexdigest()}.rtxcache"


class RuntimeCache:
    """What TensorRT for RTX compiled on this GPU, kept from one start to the next.

    The library itself refuses a cache of another GPU, version or driver; then it is made anew.
    """

    def __init__(self, config: Any, file: Path) -> None:
        self._cache = config.create_runtime_cache()
        self._file = file
        self._nbytes = 0
        if file.is_file():
            content = file.read_bytes()
            self._nbytes = len(content) if self._cache.deserialize(content) else 0
        config.set_runtime_cache(self._cache)

    def save(self) -> None:
        """Write it where it has grown. A cache that cannot be written is no reason to stop."""
        content = bytes(memoryview(self._cache.serialize()))
        if len(content) == self._nbytes:
            return
        self._nbytes = len(content)
        try:
            write_atomically(self._file, content)
        except OSError:
            pass


def default_cache_dir() -> Path:
    """`oneword/rtx` in the user's cache folder."""
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "oneword" / "rtx"
