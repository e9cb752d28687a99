"""Models in processes of their own, for tests: started, broken on order, and driven."""

import dataclasses
import os
import select
import shutil
import threading
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import load_file, save_file

from engine.batching.batcher import Model
from engine.bundle import MANIFEST, TOKEN_EMBEDDING, read_manifest
from engine.errors import NumericalError
from engine.files import sha256_of_file
from engine.fingerprint import embedding_fingerprint
from engine.planner import GenerationPlan
from engine.requests import GenerationRequest, RgbImage
from engine.worker.process import WorkerCommand
from engine.worker.remote_model import RemoteModel
from engine.worker.supervisor import WorkerConfig
from tests import faulty_worker

WAIT_S = 120.0  # a guard; everything here takes well under a second where nobody else computes


def faulty_model(bundle: Path, **config: Any) -> RemoteModel:
    """A model whose process heeds the orders in the folder that `faulty_worker.FAULTS` names."""
    command = WorkerCommand(bundle=bundle, module=faulty_worker.MODULE)
    return RemoteModel(command, WorkerConfig(**config))


def draw(model: Model, plan: GenerationPlan) -> list[RgbImage | NumericalError]:
    """The pictures of one request, alone."""
    images = model.begin(plan)
    while not images[0].is_done:
        model.step(images)
    return list(model.decode(images))


def draw_staggered(
    model: Model, plans: Sequence[GenerationPlan]
) -> list[list[np.ndarray[Any, Any] | None]]:
    """The previews of each step and the pictures of each request; one joins at every step."""
    waiting, in_flight = list(enumerate(plans)), list[tuple[int, Any]]()
    seen: list[list[np.ndarray[Any, Any] | None]] = [[] for _ in plans]
    while waiting or in_flight:
        if waiting:
            place, plan = waiting.pop(0)
            in_flight += [(place, image) for image in model.begin(plan)]
        for group in _by_shape(in_flight):
            model.step([image for _, image in group])
            for place, image in group:
                seen[place].append(model.preview(image))
        for group in _by_shape([(p, image) for p, image in in_flight if image.is_done]):
            pictures = model.decode([image for _, image in group])
            for (place, _), picture in zip(group, pictures, strict=True):
                assert isinstance(picture, np.ndarray), picture
                seen[place].append(picture)
        in_flight = [(place, image) for place, image in in_flight if not image.is_done]
    return seen


def _by_shape(images: Sequence[tuple[int, Any]]) -> list[list[tuple[int, Any]]]:
    groups: dict[tuple[int, ...], list[tuple[int, Any]]] = {}
    for place, image in images:
        groups.setdefault(image.shape_key, []).append((place, image))
    return list(groups.values())


def same(ones: Sequence[Any], others: Sequence[Any]) -> bool:
    """Whether pictures are equal bit for bit."""
    return len(ones) == len(others) and all(
        np.array_equal(one, other) for one, other in zip(ones, others, strict=True)
    )


def request(prompt: str = "a red dog", **fields: Any) -> GenerationRequest:
    fields = {"num_inference_steps": 3, "seed": 11, **fields}
    return GenerationRequest(prompt=prompt, **fields)


@dataclass
class States:
    """What a model tells of its state, and a way to wait for it."""

    told: list[tuple[bool, str]] = field(default_factory=list[tuple[bool, str]])
    _changed: threading.Condition = field(default_factory=threading.Condition)

    def __call__(self, serving: bool, reason: str) -> None:
        with self._changed:
            self.told.append((serving, reason))
            self._changed.notify_all()

    def wait_for(self, *serving: bool) -> str:
        """Wait until these states have been told, one after another; the last one's reason."""
        with self._changed:
            assert self._changed.wait_for(lambda: len(self.told) >= len(serving), WAIT_S)
            assert tuple(state for state, _ in self.told[: len(serving)]) == serving
            return self.told[len(serving) - 1][1]


def wait_for_end(pid: int) -> None:
    """Return when a process has ended, whosever child it is."""
    try:
        descriptor = os.pidfd_open(pid)
    except ProcessLookupError:
        return
    try:
        assert select.select([descriptor], [], [], WAIT_S)[0], f"process {pid} goes on"
    finally:
        os.close(descriptor)


def altered_bundle(source: Path, target: Path, model_name: str) -> Path:
    """A sound bundle of another model: the same graphs, other token embeddings."""
    shutil.copytree(source, target)
    path = target / TOKEN_EMBEDDING
    tensors = {name: 1.5 * table for name, table in load_file(path).items()}
    save_file(tensors, path)
    manifest = read_manifest(target)
    fingerprint = embedding_fingerprint(tensors["token_embedding"])
    changed = dataclasses.replace(
        manifest,
        model_name=model_name,
        text=dataclasses.replace(manifest.text, embedding_fingerprint=fingerprint),
        files={**manifest.files, TOKEN_EMBEDDING: sha256_of_file(path)},
    )
    (target / MANIFEST).write_text(changed.to_json())
    return target
