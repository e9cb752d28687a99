"""Sampler tables: diffusers' schedulers read off into `samplers.safetensors` (engine.samplers).

There is no hand-written sampler: every coefficient comes from diffusers' own scheduler, and every
table is run against that scheduler before it is written.
"""

import functools
import hashlib
import importlib.metadata
import json
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import closing, contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

from diffusers.schedulers.scheduling_ddim import DDIMScheduler
from diffusers.schedulers.scheduling_ddpm import DDPMScheduler
from diffusers.schedulers.scheduling_deis_multistep import DEISMultistepScheduler
from diffusers.schedulers.scheduling_dpmsolver_multistep import DPMSolverMultistepScheduler
from diffusers.schedulers.scheduling_euler_ancestral_discrete import EulerAncestralDiscreteScheduler
from diffusers.schedulers.scheduling_euler_discrete import EulerDiscreteScheduler
from diffusers.schedulers.scheduling_heun_discrete import HeunDiscreteScheduler
from diffusers.schedulers.scheduling_lcm import LCMScheduler
from diffusers.schedulers.scheduling_lms_discrete import LMSDiscreteScheduler
from diffusers.schedulers.scheduling_pndm import PNDMScheduler
from diffusers.schedulers.scheduling_tcd import TCDScheduler
from diffusers.schedulers.scheduling_unipc_multistep import UniPCMultistepScheduler
from diffusers.utils import logging as diffusers_logging
from safetensors.numpy import save

from engine.files import write_atomically
from engine.samplers import FORMAT, MAX_INFERENCE_STEPS, SamplerTable
from trainer.sampler_fit import TableReport, tabulate
from trainer.sampler_pool import map_in_processes
from trainer.sources import digest_of_sources


class SamplerSpec(NamedTuple):
    """How a sampler is made of a model's scheduler config."""

    scheduler_class: type[Any]
    overrides: Mapping[str, Any]


_KARRAS = {
    "use_karras_sigmas": True,
    # The three are exclusive, and the model's own config may have chosen another.
    "use_exponential_sigmas": False,
    "use_beta_sigmas": False,
}
_WITH_KARRAS = {
    "euler": SamplerSpec(EulerDiscreteScheduler, {}),
    "heun": SamplerSpec(HeunDiscreteScheduler, {}),
    "dpmpp_2m": SamplerSpec(
        DPMSolverMultistepScheduler, {"algorithm_type": "dpmsolver++", "solver_order": 2}
    ),
    "dpmpp_2m_sde": SamplerSpec(
        DPMSolverMultistepScheduler,
        {"algorithm_type": "sde-dpmsolver++", "solver_order": 2},
    ),
    "unipc": SamplerSpec(UniPCMultistepScheduler, {}),
    "deis": SamplerSpec(DEISMultistepScheduler, {}),
    "lms": SamplerSpec(LMSDiscreteScheduler, {}),
}
SAMPLERS: Mapping[str, SamplerSpec] = {
    "ddim": SamplerSpec(DDIMScheduler, {}),
    "ddpm": SamplerSpec(DDPMScheduler, {}),
    "euler_a": SamplerSpec(EulerAncestralDiscreteScheduler, {}),
    # The Runge-Kutta start takes 13 entries of history; Stable Diffusion skips it.
    "pndm": SamplerSpec(PNDMScheduler, {"skip_prk_steps": True}),
    "lcm": SamplerSpec(LCMScheduler, {}),
    "tcd": SamplerSpec(TCDScheduler, {}),
    **{
        name: spec._replace(overrides={**spec.overrides, "use_karras_sigmas": False})
        for name, spec in _WITH_KARRAS.items()
    },
    **{
        f"{name}_karras": spec._replace(overrides={**spec.overrides, **_KARRAS})
        for name, spec in _WITH_KARRAS.items()
    },
}


_SOURCES = (
    "engine/samplers.py",
    "trainer/sampler_fit.py",
    "trainer/sampler_tables.py",
    "trainer/scheduler_probe.py",
)
_PACKAGES = ("diffusers", "numpy", "scipy", "torch")


def make_scheduler(name: str, scheduler_config: Mapping[str, Any]) -> Any:
    """The scheduler of `pipe.scheduler = Class.from_config(pipe.scheduler.config, ...)`.

    `clip_sample` is off, as diffusers' Stable Diffusion pipelines set it: latents are not bounded
    by 1, and clipping is not linear. `thresholding` is left as it is, to be refused by the gate.
    """
    spec = SAMPLERS[name]
    # As arguments: from_config passes over keys of the config that `_use_default_values` lists.
    with _quiet_diffusers():
        return spec.scheduler_class.from_config(
            dict(scheduler_config), **{**spec.overrides, "clip_sample": False}
        )


@contextmanager
def _quiet_diffusers() -> Generator[None]:
    """Without the warnings about keys that other schedulers left in the config."""
    verbosity = diffusers_logging.get_verbosity()
    diffusers_logging.set_verbosity_error()
    try:
        yield
    finally:
        diffusers_logging.set_verbosity(verbosity)


def samplers_key(
    scheduler_config: Mapping[str, Any], *, names: Sequence[str], max_steps: int
) -> str:
    """SHA-256 over all that decides what is in the tables: equal keys, equal tables."""
    made_of = {
        "sources": digest_of_sources(_SOURCES),
        "versions": {name: importlib.metadata.version(name) for name in _PACKAGES},
        "scheduler_config": dict(scheduler_config),
        "max_steps": max_steps,
        "specs": {
            name: (SAMPLERS[name].scheduler_class.__name__, dict(SAMPLERS[name].overrides))
            for name in names
        },
    }
    return hashlib.sha256(json.dumps(made_of, sort_keys=True, default=str).encode()).hexdigest()


def make_table(
    name: str, scheduler_config: Mapping[str, Any], max_steps: int = MAX_INFERENCE_STEPS
) -> tuple[SamplerTable, TableReport]:
    """The gated table of one sampler for 1 to `max_steps` steps; raises `SamplerRefused`."""
    return tabulate(name, make_scheduler(name, scheduler_config), max_steps=max_steps)


def build_sampler_tables(
    scheduler_config: Mapping[str, Any],
    output: Path,
    *,
    names: Sequence[str] | None = None,
    max_steps: int = MAX_INFERENCE_STEPS,
    workers: int = 2,
    progress: Callable[[int, int], None] | None = None,
) -> dict[str, TableReport]:
    """Write the tables of `names` (default: all) to `output`; the same input gives the same bytes.

    With more than one worker the calling script needs the `if __name__ == "__main__"` guard.
    `progress` is called with the number of finished samplers and of all. Raises `SamplerRefused`
    for the first sampler that is no linear table.
    """
    names = list(SAMPLERS if names is None else names)
    if unknown := [name for name in names if name not in SAMPLERS]:
        raise ValueError(f"unknown samplers {', '.join(unknown)}; there are {', '.join(SAMPLERS)}")
    make = functools.partial(
        make_table, scheduler_config=dict(scheduler_config), max_steps=max_steps
    )
    results: dict[str, tuple[SamplerTable, TableReport]] = {}
    # Closed, not left to the garbage collector: workers end with an error of `progress` as well.
    with closing(_map_samplers(make, names, workers)) as made:
        for name, result in made:
            results[name] = result
            if progress is not None:
                progress(len(results), len(names))
    tables = [results[name][0] for name in names]
    reports = {name: results[name][1] for name in names}
    key = samplers_key(scheduler_config, names=names, max_steps=max_steps)
    write_atomically(output, serialize_tables(tables, reports, scheduler_config, key=key))
    return reports


_Made = tuple[SamplerTable, TableReport]
# The slowest schedulers first: a long task begun last would leave the other workers idle.
_SLOWEST = ("unipc", "dpmpp_2m", "dpmpp_2m_sde", "deis", "lms")


def _map_samplers(
    make: Callable[[str], _Made], names: Sequence[str], workers: int
) -> Generator[tuple[str, _Made]]:
    if min(workers, len(names)) <= 1:
        yield from ((name, make(name)) for name in names)
        return
    ordered = sorted(names, key=lambda name: name.removesuffix("_karras") not in _SLOWEST)
    yield from map_in_processes(make, ordered, min(workers, len(names)))


def serialize_tables(
    tables: Sequence[SamplerTable],
    reports: Mapping[str, TableReport],
    scheduler_config: Mapping[str, Any],
    *,
    key: str,
) -> bytes:
    """The bytes of `samplers.safetensors`, as `engine.samplers.read_sampler_tables` reads them."""
    tensors = {
        f"{table.name}/{key}": getattr(table, key)
        for table in tables
        for key in ("rows", "offsets", "init_sigma", "cold_rows", "cold_index")
    }
    metadata = {
        "format": FORMAT,
        "key": key,
        "orders": json.dumps({table.name: table.order for table in tables}),
        "diffusers": importlib.metadata.version("diffusers"),
        "reports": json.dumps({name: asdict(report) for name, report in reports.items()}),
        "scheduler_config": json.dumps(dict(scheduler_config), sort_keys=True),
    }
    return _with_sorted_header(save(tensors, metadata=metadata))


def _with_sorted_header(content: bytes) -> bytes:
    """safetensors writes its metadata in the order of a hash table, another one in each process.

    Layout: 8 bytes little-endian header length, the header in JSON, the data.
    """
    end = 8 + int.from_bytes(content[:8], "little")
    header = json.dumps(json.loads(content[8:end]), sort_keys=True).encode()
    header += b" " * (-len(header) % 8)
    return len(header).to_bytes(8, "little") + header + content[end:]
