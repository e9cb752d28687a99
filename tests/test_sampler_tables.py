"""The sampler tables against the schedulers they were read from, run as diffusers' pipelines do."""

import functools
import inspect
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
import torch
from diffusers.schedulers.scheduling_ddim import DDIMScheduler

from engine.errors import InvalidRequest
from engine.samplers import (
    KEPT_TRAJECTORIES,
    SamplerTable,
    StepCoefficients,
    predict_clean,
    read_sampler_tables,
    step,
)
from trainer import sampler_tables
from trainer.sampler_fit import (
    GATE_TOLERANCE,
    SamplerRefused,
    TableReport,
    closed_loop_error,
    tabulate,
)
from trainer.sampler_tables import (
    SAMPLERS,
    build_sampler_tables,
    make_scheduler,
    make_table,
    samplers_key,
)
from trainer.scheduler_probe import Schedule

# DEIS takes numpy's log of a tensor.
pytestmark = pytest.mark.filterwarnings("ignore:__array_wrap__:DeprecationWarning")

STABLE_DIFFUSION = {
    "_class_name": "PNDMScheduler",
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "num_train_timesteps": 1000,
    "steps_offset": 1,
    "clip_sample": False,
    "set_alpha_to_one": False,
    "skip_prk_steps": True,
}
CONFIGS: dict[str, dict[str, Any]] = {
    "epsilon": STABLE_DIFFUSION,
    "v_prediction": {
        **STABLE_DIFFUSION,
        "_class_name": "DDIMScheduler",
        "prediction_type": "v_prediction",
        "timestep_spacing": "trailing",
    },
    # Hard on numerics: the first sigma is about 20000.
    "cosine": {
        "_class_name": "DDIMScheduler",
        "beta_schedule": "squaredcos_cap_v2",
        "prediction_type": "v_prediction",
        "num_train_timesteps": 1000,
        "steps_offset": 1,
        "clip_sample": False,
        "timestep_spacing": "trailing",
    },
}
STOCHASTIC = ("ddpm", "euler_a", "dpmpp_2m_sde", "dpmpp_2m_sde_karras", "lcm", "tcd")
WITHOUT_COLD_ROWS = (
    *("ddim", "ddpm", "euler_a", "lcm", "tcd", "euler", "euler_karras"),
    *("heun", "heun_karras", "lms", "lms_karras"),
)
SHAPE = (3, 6, 5)
# 20 steps lie beyond the 15 below which some schedulers lower their order at the end.
MAX_STEPS = 20
# Relative to the largest latent, for two float32 runs that round differently. Both are within 1e-6
# of the same run in float64, but for diffusers' Heun at 2 steps, which loses 1e-5.
FLOAT32_TOLERANCE = 5e-5

each_sampler = pytest.mark.parametrize("name", SAMPLERS)
each_config = pytest.mark.parametrize("config", CONFIGS)
# On the cosine schedule diffusers' float32 runs are off by up to 4e-2 (Heun, 20 steps), from sigmas
# of 20000 that cancel, where the tables are within 1e-6: it is judged in float64 alone.
each_float32_config = pytest.mark.parametrize("config", ["epsilon", "v_prediction"])


@functools.cache
def made(name: str, config: str) -> tuple[SamplerTable, TableReport]:
    return make_table(name, CONFIGS[config], MAX_STEPS)


def model(model_input: torch.Tensor, timestep: float) -> torch.Tensor:
    """A nonlinear stand-in for the denoiser."""
    return torch.tanh(model_input * 1.3 + 0.002 * timestep) - 0.2 * model_input.cos()


def gaussian(seed: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(SHAPE, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def diffusers_scheduler(name: str, config: str, steps: int, start: int) -> tuple[Any, Any]:
    """The scheduler and the timesteps left to run, as in StableDiffusionImg2ImgPipeline."""
    scheduler = make_scheduler(name, CONFIGS[config])
    scheduler.set_timesteps(steps)
    if hasattr(scheduler, "set_begin_index"):
        scheduler.set_begin_index(start * scheduler.order)
    return scheduler, scheduler.timesteps[start * scheduler.order :]


def run_diffusers(scheduler: Any, timesteps: Any, latents: torch.Tensor, seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    draws = "generator" in inspect.signature(scheduler.step).parameters
    extra = {"generator": generator} if draws else {}
    latents = latents[None]
    for timestep in timesteps:
        noise_pred = model(scheduler.scale_model_input(latents, timestep), float(timestep))
        latents = scheduler.step(noise_pred, timestep, latents, **extra).prev_sample
    return latents[0]


def run_table(
    rows: tuple[StepCoefficients, ...],
    latents: torch.Tensor,
    seed: int,
    noise_dtype: torch.dtype | None = None,
) -> torch.Tensor:
    """As the engine does: noise is drawn from the generator for rows with c != 0, and only then.

    One seed gives other noise in another dtype; by default it is drawn in that of the latents.
    """
    generator = torch.Generator().manual_seed(seed)
    current, history = latents.numpy(), ()
    for row in rows:
        noise_pred = model(torch.from_numpy(row.s * current), row.timestep).numpy()
        noise = None
        if row.c != 0.0:
            drawn = torch.randn(SHAPE, generator=generator, dtype=noise_dtype or latents.dtype)
            noise = drawn.to(latents.dtype).numpy()
        current, history = step(current, noise_pred, history, noise, row)
    return torch.from_numpy(current)


def relative_error(found: torch.Tensor, expected: torch.Tensor) -> float:
    assert found.dtype == expected.dtype
    return float((found - expected).abs().max() / expected.abs().max())


def image_to_image_error(name: str, config: str, steps: int, start: int, seed: int) -> float:
    found, expected, _ = image_to_image_runs(name, config, steps, start, seed)
    return relative_error(found, expected)


def image_to_image_runs(
    name: str, config: str, steps: int, start: int, seed: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The table's run and diffusers' in float32, and the table's in float64."""
    table, _ = made(name, config)
    scheduler, timesteps = diffusers_scheduler(name, config, steps, start)
    rows = table.trajectory(steps, strength=(steps - start + 0.5) / steps if start else 1.0).rows
    assert len(rows) == len(timesteps)
    image, noise = gaussian(seed), gaussian(seed + 1)
    expected = run_diffusers(
        scheduler, timesteps, scheduler.add_noise(image[None], noise, timesteps[:1])[0], seed
    )
    latents = rows[0].k0 * image + rows[0].k1 * noise
    exact = run_table(rows, latents.double(), seed, noise_dtype=torch.float32)
    return run_table(rows, latents, seed), expected, exact


def test_trajectories_are_kept_for_requests_alike_and_not_without_end() -> None:
    table, _ = made("dpmpp_2m", "epsilon")
    first = table.trajectory(20)
    assert table.trajectory(20) is first
    # So many of 20 steps are run, whatever the strength is called.
    assert table.trajectory(20, strength=0.51) is table.trajectory(20, strength=0.54)
    assert table.trajectory(20, strength=0.5).rows != first.rows
    for steps in range(1, KEPT_TRAJECTORIES + 1):
        table.trajectory(steps)
    again = table.trajectory(20)
    assert again is not first and again == first


def test_there_are_twenty_samplers_and_karras_variants_where_diffusers_has_them() -> None:
    assert len(SAMPLERS) == 20
    for name, spec in SAMPLERS.items():
        parameters = inspect.signature(spec.scheduler_class.__init__).parameters
        assert (f"{name.removesuffix('_karras')}_karras" in SAMPLERS) == (
            "use_karras_sigmas" in parameters
        )


@each_sampler
@each_float32_config
def test_table_draws_the_image_of_the_scheduler(name: str, config: str) -> None:
    """From noise, with the shipped float32 scheduler and the noise of one torch.Generator."""
    table, _ = made(name, config)
    for steps in (1, 2, 5, 20):
        scheduler, timesteps = diffusers_scheduler(name, config, steps, start=0)
        trajectory = table.trajectory(steps)
        noise = gaussian(steps)
        expected = run_diffusers(scheduler, timesteps, noise * scheduler.init_noise_sigma, steps)
        found = run_table(trajectory.rows, noise * trajectory.init_sigma, steps)
        assert relative_error(found, expected) < FLOAT32_TOLERANCE


@each_sampler
@each_config
def test_table_has_the_precision_of_float64(name: str, config: str) -> None:
    """Against the scheduler in float64: no float32 rounding (1e-7) is left in the coefficients."""
    _, report = made(name, config)
    assert report.max_error < 1e-9


@each_sampler
@each_float32_config
def test_image_to_image_starts_as_in_diffusers(name: str, config: str) -> None:
    for steps, start in ((2, 1), (5, 1), (5, 2), (5, 4), (20, 3), (20, 12), (20, 18)):
        error = image_to_image_error(name, config, steps, start, seed=start)
        assert error < FLOAT32_TOLERANCE, (steps, start)


@each_sampler
@each_config
def test_levels_are_those_of_the_scheduler(name: str, config: str) -> None:
    """init_sigma, s, k0 and k1; to float32 rounding, in which the scheduler computes them."""
    table, _ = made(name, config)
    scheduler, timesteps = diffusers_scheduler(name, config, 5, start=0)
    trajectory = table.trajectory(5)
    np.testing.assert_allclose(trajectory.init_sigma, float(scheduler.init_noise_sigma), rtol=1e-6)
    latents, noise = gaussian(0)[None], gaussian(1)[None]
    for row, timestep in zip(trajectory.rows, timesteps, strict=True):
        assert row.timestep == float(timestep)
        scaled = scheduler.scale_model_input(latents, timestep)
        torch.testing.assert_close(row.s * latents, scaled, rtol=1e-5, atol=1e-8)
        noisy = scheduler.add_noise(latents, noise, timestep[None])
        # 1 - alpha^2 loses digits in float32 where alpha is near 1.
        torch.testing.assert_close(row.k0 * latents + row.k1 * noise, noisy, rtol=1e-4, atol=1e-5)
        scheduler.step(latents, timestep, latents)


@each_sampler
@each_config
def test_clean_latents_are_predicted_from_a_perfect_model(name: str, config: str) -> None:
    """A model that knows image y and noise z: epsilon is z, v is alpha z - sigma y."""
    table, _ = made(name, config)
    rng = np.random.default_rng(0)
    image, noise = rng.standard_normal((2, *SHAPE))
    for row in table.trajectory(20).rows:
        norm = np.hypot(row.k0, row.k1)
        velocity = (row.k0 * noise - row.k1 * image) / norm
        noise_pred = noise if config == "epsilon" else velocity
        clean = predict_clean(row.k0 * image + row.k1 * noise, noise_pred, row)
        # float64 rounding, times 1/alpha (up to 2e4).
        np.testing.assert_allclose(clean, image, rtol=0, atol=1e-10)


@pytest.mark.parametrize("name", STOCHASTIC)
@each_config
def test_stochastic_samplers_draw_noise_only_where_they_use_it(name: str, config: str) -> None:
    """A draw without use would part the engine's generator from diffusers' for all later rows."""
    table, _ = made(name, config)
    for steps in (1, 2, 20):
        rows = table.trajectory(steps).rows
        drawn = [
            probe.draws
            for probe in Schedule(make_scheduler(name, CONFIGS[config]), steps).run(
                0, np.random.default_rng(0)
            )
        ]
        used = [int(row.c != 0.0) for row in rows]
        # The last draw may be unused (euler_a, dpmpp_2m_sde): nothing is drawn after it.
        assert used[:-1] == drawn[:-1] == [1] * (len(rows) - 1)
        assert used[-1] <= drawn[-1]


def test_only_samplers_with_memory_have_cold_rows() -> None:
    for name in SAMPLERS:
        table, _ = made(name, "epsilon")
        assert (len(table.cold_rows) == 0) == (name in WITHOUT_COLD_ROWS), name


def test_cold_index_is_sorted() -> None:
    index = made("pndm", "epsilon")[0].cold_index.tolist()
    assert index == sorted(index) and len(index) > 0


def clipping(config: str, **options: Any) -> Any:
    """DDIM as its class has it by default, clipping; make_scheduler would turn it off."""
    return DDIMScheduler.from_config({**CONFIGS[config], **options})


@each_config
def test_clipping_scheduler_is_refused(config: str) -> None:
    with pytest.raises(SamplerRefused, match=r"'ddim' .*DDIMScheduler.* 5 steps: .*clip_sample"):
        tabulate("ddim", clipping(config, clip_sample=True), max_steps=5)


@pytest.mark.parametrize("name", ["ddim", "ddpm", "dpmpp_2m", "unipc_karras"])
@each_config
def test_thresholding_scheduler_is_refused(name: str, config: str) -> None:
    with pytest.raises(SamplerRefused, match=f"'{name}' .*thresholding"):
        make_table(name, {**CONFIGS[config], "thresholding": True}, 5)


@pytest.mark.parametrize("option", ["clip_sample", "thresholding"])
@each_config
def test_gate_alone_tells_a_clipping_scheduler_from_its_linear_part(
    config: str, option: str
) -> None:
    table, _ = made("ddim", config)
    rows = table.rows[table.offsets[4] : table.offsets[5]]
    linear, nonlinear = (
        Schedule(clipping(config, **{"clip_sample": False, option: value}), 5)
        for value in (False, True)
    )
    errors = [
        closed_loop_error(list(schedule.run(0, np.random.default_rng(3))), rows)
        for schedule in (linear, nonlinear)
    ]
    assert errors[0] < GATE_TOLERANCE
    assert errors[1] > 0.01


def test_clip_sample_of_the_config_is_turned_off_as_the_pipelines_do() -> None:
    without = {key: v for key, v in CONFIGS["epsilon"].items() if key != "clip_sample"}
    for model_config in (without, {**without, "clip_sample": True}):
        assert not make_scheduler("ddim", model_config).config.clip_sample


def test_zero_terminal_snr_fits_v_prediction_and_is_refused_for_epsilon() -> None:
    options = {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}
    _, report = make_table("ddim", {**CONFIGS["v_prediction"], **options}, 3)
    assert report.max_error < GATE_TOLERANCE
    with pytest.raises(SamplerRefused, match="no signal"):
        make_table("ddim", {**CONFIGS["epsilon"], **options}, 3)


def test_other_prediction_types_are_refused() -> None:
    with pytest.raises(SamplerRefused, match="'sample'"):
        make_table("ddim", {**CONFIGS["epsilon"], "prediction_type": "sample"}, 2)


def test_third_order_solver_of_the_config_takes_a_longer_history() -> None:
    _, report = make_table("unipc", {**CONFIGS["epsilon"], "solver_order": 3}, 8)
    assert report.history_length == 4


def test_step_counts_that_the_scheduler_refuses_are_refused_by_name() -> None:
    """LCM subsamples its 10 distillation steps here (50 by default): it cannot run 11."""
    table, report = make_table("lcm", {**CONFIGS["epsilon"], "original_inference_steps": 10}, 12)
    assert report.refused_steps == [11, 12]
    assert len(table.trajectory(10).rows) == 10
    with pytest.raises(InvalidRequest, match="lcm has no schedule of 12 steps.*nearest.* 10"):
        table.trajectory(12)


def test_schedule_with_a_timestep_below_zero_is_refused() -> None:
    """diffusers' trailing spacing counts to -1 at 61 steps of 1000, by rounding."""
    scheduler = make_scheduler("ddim", CONFIGS["v_prediction"])
    with pytest.raises(ValueError, match="61 steps"):
        Schedule(scheduler, 61)


def test_file_is_read_back_as_it_was_made(tmp_path: Path) -> None:
    names = ["ddim", "pndm", "heun_karras"]
    finished: list[tuple[int, int]] = []
    reports = build_sampler_tables(
        CONFIGS["epsilon"],
        tmp_path / "samplers.safetensors",
        names=names,
        max_steps=6,
        workers=1,
        progress=lambda done, total: finished.append((done, total)),
    )
    tables = read_sampler_tables(tmp_path / "samplers.safetensors")
    assert list(tables) == list(reports) == names
    assert finished == [(1, 3), (2, 3), (3, 3)]
    for name in names:
        expected, report = make_table(name, CONFIGS["epsilon"], 6)
        assert report == reports[name]
        assert (tables[name].name, tables[name].order) == (name, expected.order)
        for key in ("rows", "offsets", "init_sigma", "cold_rows", "cold_index"):
            np.testing.assert_array_equal(getattr(tables[name], key), getattr(expected, key))


def test_same_config_gives_the_same_bytes(tmp_path: Path) -> None:
    for file in ("first", "second"):
        build_sampler_tables(
            CONFIGS["epsilon"], tmp_path / file, names=["dpmpp_2m_sde"], max_steps=3, workers=1
        )
    assert (tmp_path / "first").read_bytes() == (tmp_path / "second").read_bytes()


def key_of(config: dict[str, Any]) -> str:
    return samplers_key(config, names=["ddim", "euler"], max_steps=3)


def test_whatever_changes_a_table_changes_its_key(monkeypatch: pytest.MonkeyPatch) -> None:
    key = key_of(CONFIGS["epsilon"])
    assert key_of(dict(reversed(CONFIGS["epsilon"].items()))) == key
    others = [key_of({**CONFIGS["epsilon"], "steps_offset": 0})]
    others.append(samplers_key(CONFIGS["epsilon"], names=["ddim", "euler"], max_steps=4))
    others.append(samplers_key(CONFIGS["epsilon"], names=["ddim"], max_steps=3))
    with monkeypatch.context() as patch:
        override = {**SAMPLERS["ddim"].overrides, "timestep_spacing": "linspace"}
        changed = {**SAMPLERS, "ddim": SAMPLERS["ddim"]._replace(overrides=override)}
        patch.setattr(sampler_tables, "SAMPLERS", changed)
        others.append(key_of(CONFIGS["epsilon"]))
    with monkeypatch.context() as patch:
        patch.setattr(sampler_tables, "digest_of_sources", lambda _: "other code")
        others.append(key_of(CONFIGS["epsilon"]))
    assert len({key, *others}) == 1 + len(others)


def test_an_override_counts_where_the_config_has_a_default() -> None:
    """diffusers' from_config passes over the config's keys that `_use_default_values` lists."""
    config = {**CONFIGS["epsilon"], "_use_default_values": ["use_karras_sigmas", "clip_sample"]}
    assert make_scheduler("euler_karras", config).config.use_karras_sigmas
    assert not make_scheduler("ddim", config).config.clip_sample


WORKERS = """
import multiprocessing, threading, time
from trainer.sampler_pool import map_in_processes
def tell():
    while len(children := multiprocessing.active_children()) < 2:
        time.sleep(0.01)
    print(*(child.pid for child in children), flush=True)
threading.Thread(target=tell).start()
import signal, sys
signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
list(map_in_processes(time.sleep, [60, 60, 60, 60], 2))
"""


@pytest.mark.slow
@pytest.mark.parametrize("sent", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
def test_workers_end_with_their_parent(sent: signal.Signals) -> None:
    with subprocess.Popen(
        [sys.executable, "-c", WORKERS], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
    ) as parent:
        assert parent.stdout is not None
        workers = [psutil.Process(int(pid)) for pid in parent.stdout.readline().split()]
        for worker in workers:  # at work, not importing torch: signals are answered then
            while not worker.num_threads() > 1:
                time.sleep(0.05)
        time.sleep(1)
        parent.send_signal(sent)
        # Their tasks would take another minute each, and two more are waiting.
        _, alive = psutil.wait_procs(workers, timeout=20)
        assert not alive
        assert parent.wait(timeout=20) != 0


def test_unknown_sampler_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="unknown samplers eular; there are ddim"):
        build_sampler_tables(CONFIGS["epsilon"], tmp_path / "x", names=["ddim", "eular"])


@pytest.mark.slow
def test_workers_do_not_change_the_bytes(tmp_path: Path) -> None:
    for workers in (1, 2):
        build_sampler_tables(
            CONFIGS["epsilon"],
            tmp_path / str(workers),
            names=["ddim", "dpmpp_2m", "euler_a"],
            max_steps=10,
            workers=workers,
        )
    assert (tmp_path / "1").read_bytes() == (tmp_path / "2").read_bytes()


@pytest.mark.slow
@each_sampler
@each_float32_config
def test_every_step_count_passes_the_gate_and_draws_the_image_of_the_scheduler(
    name: str, config: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    table, report = make_table(name, CONFIGS[config])
    monkeypatch.setitem(globals(), "made", lambda *_: (table, report))
    assert report.max_error < GATE_TOLERANCE
    rng = np.random.default_rng(0)
    for steps in set(range(1, 101)) - set(report.refused_steps):
        for start in {0, int(rng.integers(steps))}:
            found, expected, exact = image_to_image_runs(name, config, steps, start, 0)
            assert relative_error(found.double(), exact) < FLOAT32_TOLERANCE
            # diffusers' own float32 can lose more: DEIS at 81 steps stands 5.2e-5 from float64.
            loss = relative_error(expected.double(), exact)
            assert relative_error(found, expected) < FLOAT32_TOLERANCE + loss
