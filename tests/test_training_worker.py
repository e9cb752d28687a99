"""The trainer's own learning process behind a server: same words, whatever is killed on the way."""

import argparse
import asyncio
import dataclasses
import io
import json
import os
import subprocess
import sys
from collections.abc import AsyncIterator, Generator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, get_args, get_type_hints

import numpy as np
import psutil
import pytest
import torch
from grpc import StatusCode
from PIL import Image

from engine.client import Client, ServerError
from engine.concepts import read_concept
from engine.fingerprint import embedding_fingerprint
from engine.training.folder import TrainingFolder, TrainingRecord
from engine.training.model import read_fingerprint
from engine.training.option_wire import (
    LEARNABLE_PROPERTIES,
    OPTIMIZERS,
    STOP_RULES,
    options_from_proto,
    options_to_proto,
)
from engine.training.options import AUTO, MAX_CANDIDATES, MAX_STEPS_BETWEEN, MAX_STOP_WINDOW
from engine.training.reports import Failure, Progress, Skipped, from_line, to_line
from engine.training.spec import TrainingLimits, TrainingSpec, check_spec
from engine.training.store import TrainingStore
from protos.oneword.v1 import training_pb2
from protos.oneword.v1.generation_pb2 import GenerateRequest
from protos.oneword.v1.generation_pb2_grpc import ImageGenerationServiceStub
from tests.tiny_model import make_tiny_model, make_tiny_xl_model
from tests.training_harness import IMAGES, TIMEOUT_S, LearningServer, pipeline_of, png
from trainer.errors import Diverged, NoUsableImages
from trainer.images import read_images
from trainer.learning import learn
from trainer.model import ModelError, load_model
from trainer.options import LearnOptions
from trainer.sampling import image_size
from trainer.splicing import as_concept, text_spec
from trainer.terminal import Terminated
from trainer.training_worker import Reporter, Run, failure_of

ROOT = Path(__file__).resolve().parent.parent
SUCCEEDED = training_pb2.TRAINING_STATE_SUCCEEDED
KILLED_STEPS = 150


@pytest.fixture(scope="module")
def model_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("tiny")
    return make_tiny_model(path, max_tokens=40, unet_channels=(8, 16), latent_size=8)


@pytest.fixture
async def served(model_path: Path, tmp_path: Path) -> AsyncIterator[LearningServer]:
    pipeline = pipeline_of(load_model(model_path).token_embedding.numpy())
    server = await LearningServer.start(pipeline, model_path, tmp_path / "words-training")
    yield server
    await server.stop()


def learned_here(
    model_path: Path, folder: Path, more: Mapping[str, bytes] | None = None, **options: Any
) -> tuple[str, float]:
    """What the trainer learns in this process, without a server: the concept's id, and the
    evaluation loss before the first step.

    `more` are masks and captions beside the images.
    """
    folder.mkdir()
    for name, content in {**IMAGES, **(more or {})}.items():
        (folder / name).write_bytes(content)
    model = load_model(model_path)
    images = read_images(folder, size=image_size(model), placeholder_token="<cat>")
    *_, last = learn(model, images, LearnOptions(**options))
    concept = as_concept(model, last.best_vectors, placeholder_token="<cat>")
    return concept.concept_id, last.initial_evaluation_loss


async def test_images_become_the_word_that_the_trainer_learns_from_them(
    served: LearningServer, model_path: Path, tmp_path: Path
) -> None:
    options: dict[str, Any] = {"steps": 8, "batch_size": 2, "num_vectors": 2, "seed": 5}
    sent = {**IMAGES, "half.png": png(7)[:2000]}
    created = await served.create(images=sent, options=options, preview_every_steps=4)
    responses = await served.watch(created.training_id)
    ended = responses[-1].training
    assert (ended.state, ended.error) == (SUCCEEDED, "")
    assert ended.progress.step == ended.progress.steps == 8
    assert ended.progress.best_evaluation_loss <= ended.progress.initial_evaluation_loss
    assert [skipped.file_name for skipped in ended.skipped_images] == ["half.png"]
    assert "broken image" in ended.skipped_images[0].reason
    previews = [response.preview for response in responses if response.HasField("preview")]
    assert previews and all(Image.open(io.BytesIO(p)).size == (16, 16) for p in previews)
    assert ended.concept_id == learned_here(model_path, tmp_path / "images", **options)[0]
    metadata = served.store.find_by_token("<cat>").metadata
    assert (metadata["seed"], metadata["num_vectors"]) == ("5", "2")
    stub = ImageGenerationServiceStub(served.channel)
    call = stub.Generate(GenerateRequest(prompt="a photo of <cat>", num_inference_steps=2))
    *_, summary = [response async for response in call]
    assert [c.concept_id for c in summary.summary.matched_concepts] == [ended.concept_id]


async def test_masks_captions_and_options_reach_the_trainer(
    served: LearningServer, model_path: Path, tmp_path: Path
) -> None:
    options: dict[str, Any] = {
        "steps": 4,
        "batch_size": 2,
        "eval_every": 1,
        "optimizer": "dti",
        "stop": "dvar",
        "stop_window": 2,
        "stop_threshold": 0.9,
        "learnable_property": "style",
        "initializer_token": "auto",
        "initializer_candidates": ("a", "of"),
    }
    mask, captions = grey_png(side=40), "a {} here\n<cat>, by hand\n"
    with Client(served.address, timeout_s=TIMEOUT_S) as client:
        created = await asyncio.to_thread(
            client.training.create,
            "<cat>",
            {**IMAGES, "c.png": png(9)},
            masks={"a.png": mask, "c.png": grey_png(side=8)},
            captions={"b.png": captions},
            **options,
        )
    assert (created.num_masks, created.num_captioned_images) == (2, 1)
    ended = await served.ended(created.training_id)
    assert (ended.state, ended.error) == (SUCCEEDED, "")
    (skipped,) = ended.skipped_images
    assert skipped.file_name == "c.png"
    assert skipped.reason.startswith("its mask is 8 x 8, the upright image 40 x 40")
    beside = {"a.mask.png": mask, "b.txt": captions.encode()}
    learned = ended.concept_id, ended.progress.initial_evaluation_loss
    assert learned == learned_here(model_path, tmp_path / "images", beside, **options)
    for name in beside:  # both of them count
        only = {name: beside[name]}
        _, loss = learned_here(model_path, tmp_path / f"only {name}", only, **options)
        assert loss != ended.progress.initial_evaluation_loss
    metadata = served.store.find_by_token("<cat>").metadata
    told = {"optimizer": "dti", "stop": "dvar"}
    assert told.items() <= metadata.items()
    assert json.loads(metadata["initializer_candidates"]) == ["a", "of"]


def grey_png(side: int) -> bytes:
    """A mask: the left half is white."""
    levels = np.zeros((side, side), np.uint8)
    levels[:, : side // 2] = 255
    buffer = io.BytesIO()
    Image.fromarray(levels).save(buffer, format="PNG")
    return buffer.getvalue()


@pytest.mark.slow
async def test_cancelling_ends_the_process_without_a_word(served: LearningServer) -> None:
    created = await served.create(options={"steps": 10_000, "batch_size": 1})
    await served.progressed(created.training_id)
    await served.cancel(created.training_id)
    ended = await served.ended(created.training_id)
    assert ended.state == training_pb2.TRAINING_STATE_CANCELLED
    assert 0 < ended.progress.step < 10_000
    log = (served.folder / "jobs" / created.training_id / "worker.log").read_text()
    assert "Traceback" not in log


_SERVE = """
import asyncio, sys
from pathlib import Path
sys.modules.update(dict.fromkeys(sys.argv[3:]))  # packages that cannot be imported
from safetensors.numpy import load_file
from engine.pipeline import Pipeline
from engine.serving.serve import serve
from engine.serving.server_config import ServerConfig
from engine.training.config import TrainingConfig
from tests.training_harness import pipeline_of

model, concept_dir = map(Path, sys.argv[1:3])
weights = load_file(model / "text_encoder" / "model.safetensors")
pipeline = pipeline_of(weights["embeddings.token_embedding.weight"])
Pipeline.open = lambda *_arguments, **_settings: pipeline
training = TrainingConfig(training_model=model, checkpoint_every_s=0.0, retry_delay_s=0.0)
config = ServerConfig(
    bundle=Path("none"), listen="127.0.0.1:0", concept_dir=concept_dir, training=training,
    model_process=False,
)
asyncio.run(serve(config, lambda address: print(address, flush=True)))
"""


@contextmanager
def server_process(
    model: Path, concept_dir: Path, *missing: str
) -> Generator[tuple[psutil.Popen, Client]]:
    """A server in a process of its own, without the packages `missing`."""
    command = [sys.executable, "-c", _SERVE, str(model), str(concept_dir), *missing]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    with psutil.Popen(
        command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, text=True
    ) as process:
        try:
            with Client(process.stdout.readline().strip(), timeout_s=TIMEOUT_S) as client:
                yield process, client
        finally:
            process.kill()


def wait_for_step(client: Client, training_id: str, step: int) -> None:
    for response in client.training.watch(training_id):
        assert not response.training.HasField("end_time"), response.training
        if response.training.progress.step >= step:
            return


def resumed_at(client: Client, training_id: str, process: psutil.Popen, before: int) -> int:
    """Wait until another process than `before` learns; returns the step at which it went on."""
    for response in client.training.watch(training_id):
        children = process.children()
        if children and children[0].pid != before and response.training.progress.step:
            return response.training.progress.step
    raise AssertionError("the training has ended")


@pytest.mark.slow
async def test_killing_the_process_and_the_server_loses_nothing(
    model_path: Path, tmp_path: Path
) -> None:
    options: dict[str, Any] = {"steps": KILLED_STEPS, "batch_size": 1}
    concept_dir, folder = tmp_path / "words", tmp_path / "words-training"
    with server_process(model_path, concept_dir) as (process, client):
        training_id = client.training.create("<cat>", IMAGES, **options).training_id
        await asyncio.to_thread(wait_for_step, client, training_id, 3)
        (child,) = process.children()
        child.kill()
        await asyncio.to_thread(child.wait)
        step = await asyncio.to_thread(resumed_at, client, training_id, process, child.pid)
        await asyncio.to_thread(wait_for_step, client, training_id, step + 3)
        (child,) = process.children()
        process.kill()
        await asyncio.to_thread(child.wait, TIMEOUT_S)  # it ends by itself
    job = TrainingFolder(folder / "jobs" / training_id)
    assert (job.read_state().status, job.read_state().attempts) == ("running", 2)
    assert job.checkpoint.exists()

    pipeline = pipeline_of(load_model(model_path).token_embedding.numpy())
    server = await LearningServer.start(pipeline, model_path, folder)
    steps = [r.training.progress.step for r in await server.watch(training_id)]
    ended = await server.get(training_id)
    await server.stop()
    assert steps[0] >= 3 and steps == sorted(steps)  # never back at the beginning
    assert (ended.state, ended.error) == (SUCCEEDED, "")
    assert ended.concept_id == learned_here(model_path, tmp_path / "images", **options)[0]


def test_a_server_without_pytorch_starts_and_says_what_to_install(
    model_path: Path, tmp_path: Path
) -> None:
    missing = ("torch", "transformers")  # an attempt to import them would end the server
    with (
        server_process(model_path, tmp_path / "words", *missing) as (_, client),
        pytest.raises(ServerError, match=r"pip install 'oneword\[train\]'") as caught,
    ):
        assert client.server_info().model.name == "fake"
        client.training.create("<cat>", IMAGES)
    assert caught.value.code == StatusCode.FAILED_PRECONDITION
    assert "torch, transformers is not installed" in str(caught.value)


# The process from within


@pytest.fixture
def job(tmp_path: Path) -> TrainingFolder:
    """A training of two images and six steps, as a server leaves it for the process."""
    store = TrainingStore(tmp_path / "trainings", TrainingLimits())
    store.open()
    upload = store.begin_upload()
    for name, content in IMAGES.items():
        upload.add("image", name, 0, content)
    upload.finish(len(IMAGES))
    options = {"steps": 6, "batch_size": 2, "eval_every": 2}
    record = TrainingRecord(
        training_id=upload.training_id,
        create_time=0.0,
        spec=TrainingSpec(placeholder_token="<cat>", options=options),
        images=upload.images,
    )
    stored = store.commit(upload, record)
    store.close()
    return stored.folder


def prepare(job: TrainingFolder, model_path: Path) -> tuple[Run, io.BytesIO]:
    reports = io.BytesIO()
    arguments = argparse.Namespace(model=model_path, device="cpu", checkpoint_every_s=0.0)
    return Run.prepare(job, arguments, Reporter(reports)), reports


class _InterruptedStream(io.BytesIO):
    """Where reports go until SIGTERM comes."""

    def write(self, buffer: Any, /) -> int:
        if len(self.getvalue().splitlines()) == 4:
            raise Terminated
        return super().write(buffer)


def test_an_interrupted_run_goes_on_to_the_same_word(
    job: TrainingFolder, model_path: Path, tmp_path: Path
) -> None:
    run, _ = prepare(job, model_path)
    run.reporter = Reporter(_InterruptedStream())
    with pytest.raises(Terminated):
        run.learn()
    run, reports = prepare(job, model_path)
    run.learn()
    progress = [from_line(line) for line in reports.getvalue().splitlines()]
    assert [one.step for one in progress if isinstance(one, Progress)] == [4, 5, 6]
    expected, _ = learned_here(model_path, tmp_path / "images", **run.record.spec.options)
    assert read_concept(job.concept).concept_id == expected


def test_a_checkpoint_of_another_run_is_of_no_use(
    job: TrainingFolder, model_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    prepare(job, model_path)[0].learn()
    expected = job.concept.read_bytes()
    record = json.loads((job.path / "spec.json").read_text())
    record["spec"]["options"]["seed"] = 1
    (job.path / "spec.json").write_text(json.dumps(record))
    run, reports = prepare(job, model_path)
    run.learn()
    assert "starting anew: " in capsys.readouterr().err
    progress = [from_line(line) for line in reports.getvalue().splitlines()]
    assert [one.step for one in progress if isinstance(one, Progress)] == list(range(7))
    assert job.concept.read_bytes() != expected


def test_a_run_that_was_learned_to_the_end_only_writes_its_word(
    job: TrainingFolder, model_path: Path
) -> None:
    prepare(job, model_path)[0].learn()
    job.concept.unlink()  # it was killed before it wrote it
    run, reports = prepare(job, model_path)
    run.learn()
    assert len(reports.getvalue().splitlines()) == 1 and job.concept.exists()


def test_unusable_images_are_called_as_the_caller_calls_them(
    job: TrainingFolder, model_path: Path
) -> None:
    for path in job.images.iterdir():
        path.write_bytes(path.read_bytes()[:300])
    with pytest.raises(NoUsableImages, match="a.png: broken image.*b.png: broken image"):
        prepare(job, model_path)


def test_a_failure_says_no_more_than_it_should() -> None:
    model = Path("/srv/models/secret")
    told = failure_of(ModelError(f"{model}: cannot read the weights"), model)
    assert told == Failure(reason="the training model: cannot read the weights", retryable=False)
    assert not failure_of(Diverged("step 3: loss nan"), model).retryable
    assert failure_of(torch.OutOfMemoryError("CUDA"), model).retryable
    full = failure_of(OSError(28, "No space left on device", "/srv/x"), model)
    assert full == Failure(reason="the disk of the trainings is full", retryable=True)
    bug = failure_of(KeyError("/srv/models"), model)
    assert bug.retryable and "/srv" not in bug.reason


@pytest.mark.parametrize(
    "report",
    [
        Progress(
            step=1,
            steps=2,
            loss=None,
            initial_evaluation_loss=0.1,
            best_evaluation_loss=0.1,
            best_step=0,
        ),
        Skipped(index=3, reason="broken\nimage"),
        Failure(reason="é", retryable=True),
    ],
)
def test_a_report_is_one_line_and_comes_back_as_it_was(report: Any) -> None:
    line = to_line(report)
    assert line.count(b"\n") == 1 and line.endswith(b"\n")
    assert from_line(line) == report


@pytest.mark.parametrize(
    "line", [b"", b"[]", b"{}", b"null", b'{"kind": "x"}', b'{"kind": "failure"}', b"\xff"]
)
def test_what_is_no_report_is_refused(line: bytes) -> None:
    with pytest.raises(ValueError):
        from_line(line)


# What server and trainer must agree on


@pytest.mark.parametrize("dtype", ["fp32", "fp16", "bf16"])
def test_the_server_reads_the_fingerprint_that_the_trainer_computes(
    model_path: Path, tmp_path: Path, dtype: str
) -> None:
    from safetensors.torch import load_file, save_file

    folder = tmp_path / "text_encoder"
    folder.mkdir()
    weights = load_file(model_path / "text_encoder" / "model.safetensors")
    kinds = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
    halved = {name: tensor.to(kinds[dtype]) for name, tensor in weights.items()}
    save_file(halved, folder / "model.safetensors")
    table = halved["embeddings.token_embedding.weight"].float().numpy()
    assert read_fingerprint(folder) == embedding_fingerprint(table)
    if dtype == "fp32":
        assert read_fingerprint(folder) == text_spec(load_model(model_path)).embedding_fingerprint


def test_the_server_reads_both_encoders_of_a_model_with_two(tmp_path: Path) -> None:
    path = make_tiny_xl_model(tmp_path / "xl")
    for encoder in load_model(path).encoders:
        assert read_fingerprint(path / encoder.name) == text_spec(encoder).embedding_fingerprint


def test_what_the_server_takes_the_trainer_takes() -> None:
    limits = TrainingLimits()
    taken: tuple[dict[str, Any], ...] = (
        {"steps": 1, "batch_size": 1, "num_vectors": 1, "seed": 0, "eval_every": 1},
        {"steps": limits.max_steps, "batch_size": limits.max_batch_size, "seed": 2**63 - 1},
        {"learning_rate": float(np.nextafter(0.0, 1.0))},
        {"learning_rate": 1.0, "initializer_token": "a cat"},
        {"stop": "dvar", "stop_window": 2, "stop_threshold": float(np.nextafter(0.0, 1.0))},
        {"stop_window": MAX_STOP_WINDOW, "stop_threshold": float(np.nextafter(1.0, 0.0))},
        {"eval_every": MAX_STEPS_BETWEEN},
        {"initializer_token": AUTO, "initializer_candidates": ("x",) * MAX_CANDIDATES},
        {"regularization": 0.0, "per_image_tokens": True},
        {"progressive": True, "num_vectors": 2},
        {"cross_initialization": True, "optimizer": "adamw"},
        {"cross_initialization": True, "progressive": True, "num_vectors": 2},
        *({"learnable_property": name} for name in LEARNABLE_PROPERTIES),
        *({"optimizer": name} for name in OPTIMIZERS),
        *({"stop": name} for name in STOP_RULES),
    )
    for options in taken:
        check_spec(TrainingSpec(placeholder_token="<cat>", options=options), limits)
        LearnOptions(**options)


def test_every_option_of_learning_can_be_asked_for() -> None:
    names = {field.name for field in dataclasses.fields(LearnOptions)}
    asked = names - {"warm_start"}  # needs an image tower, which a server has not
    assert set(training_pb2.LearnOptions.DESCRIPTOR.fields_by_name) == asked
    for name, words in (
        ("learnable_property", LEARNABLE_PROPERTIES),
        ("optimizer", OPTIMIZERS),
        ("stop", STOP_RULES),
    ):
        assert get_args(get_type_hints(LearnOptions)[name]) == words


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"steps": 3, "seed": 2**63 - 1, "learning_rate": 0.1, "progressive": False},
        {"optimizer": "dti", "stop": "dvar", "learnable_property": "style"},
        {"regularization": 0.5, "progressive": True, "num_vectors": 2, "per_image_tokens": False},
        {"initializer_token": "auto", "initializer_candidates": ("a", "b c")},
        {"cross_initialization": True, "regularization": 0.0},
    ],
)
def test_options_survive_the_wire(options: dict[str, Any]) -> None:
    sent = training_pb2.LearnOptions.FromString(options_to_proto(options).SerializeToString())
    assert options_from_proto(sent) == options
