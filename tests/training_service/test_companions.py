"""Masks and captions on their way to the trainer: stored where it looks, refused, counted."""

from typing import Any

import pytest
from grpc import StatusCode

from engine.training.folder import TrainingFolder
from engine.training.spec import MAX_CAPTIONS_BYTES, TrainingLimits
from protos.oneword.v1 import training_pb2
from protos.oneword.v1.training_pb2 import CreateTrainingRequest, ImageChunk
from tests.test_service import field_of
from tests.training_harness import (
    IMAGES,
    LearningServer,
    Start,
    chunk,
    end,
    nothing_is_left,
    png,
    refusal,
    spec,
)
from trainer.captions import MAX_FILE_BYTES
from trainer.masks import masked_stem


def mask(name: str, data: bytes, offset: int = 0) -> CreateTrainingRequest:
    return CreateTrainingRequest(mask=ImageChunk(file_name=name, offset=offset, data=data))


def captions(name: str, text: str = "a {}") -> CreateTrainingRequest:
    return CreateTrainingRequest(captions=training_pb2.ImageCaptions(file_name=name, text=text))


async def test_masks_and_captions_lie_beside_their_images_under_no_name_of_the_caller(
    served: LearningServer,
) -> None:
    names = ["../../evil", "a\x00b\n.png", "c.mask.png"]
    created = await served.create(
        images={name: png(seed, side=16) for seed, name in enumerate(names)},
        masks={names[0]: png(7, side=16), names[2]: png(8, side=16)},
        captions={names[2]: "a {} \N{FOX FACE}\n"},
        initializer="hold",
    )
    assert (created.num_images, created.num_masks, created.num_captioned_images) == (3, 2, 1)
    folder = TrainingFolder(served.folder / "jobs" / created.training_id)
    images = folder.read_record().images
    stems = [f"{index:04d}-{image.sha256}" for index, image in enumerate(images)]
    content = {path.name: path.read_bytes() for path in folder.images.iterdir()}
    assert content == {
        **{stem: png(seed, side=16) for seed, stem in enumerate(stems)},
        f"{stems[0]}.mask.png": png(7, side=16),
        f"{stems[2]}.mask.png": png(8, side=16),
        f"{stems[2]}.txt": "a {} \N{FOX FACE}\n".encode(),
    }
    assert masked_stem(f"{stems[0]}.mask.png") == stems[0]  # the trainer finds it


async def test_a_mask_in_many_chunks_arrives_whole(served: LearningServer) -> None:
    content = png(3)
    parts = [mask("x", content[at : at + 100], at) for at in range(0, len(content), 100)]
    created = await served.upload(
        [spec(options={"initializer_token": "hold"}), chunk("x", png(4)), *parts, end(1)]
    )
    images = served.folder / "jobs" / created.training_id / "images"
    (stored,) = images.glob("*.mask.png")
    assert stored.read_bytes() == content


@pytest.mark.parametrize(
    ("requests", "message", "field"),
    [
        ([mask("a", png())], "mask of 'a', but no image of that name has come", "mask.file_name"),
        ([captions("a")], "captions of 'a', but no image", "captions.file_name"),
        ([chunk("a", png()), mask("b", png())], "mask of 'b', but no image", "mask.file_name"),
        (
            [chunk("a", png()), mask("a", png()), captions("a"), mask("a", png())],
            "mask of 'a' have come already",
            "mask.file_name",
        ),
        (
            [chunk("a", png()), captions("a"), mask("a", png()), captions("a")],
            "captions of 'a' have come already",
            "captions.file_name",
        ),
        (
            [chunk("a", png()), captions("a"), captions("a")],
            "goes on at offset 0",
            "captions.offset",
        ),
        (
            [chunk("a", png()), mask("a", png(), 3)],
            "mask of 'a' goes on at offset 3",
            "mask.offset",
        ),
        ([chunk("a", png()), mask("a", b"")], "without data", "mask.data"),
        ([chunk("a", png()), captions("a", "")], "without data", "captions.text"),
        (
            [chunk("a", png()), mask("a", b"GIF89a")],
            "mask of 'a': it is not a PNG file",
            "mask.data",
        ),
        ([chunk("a", png()), mask("a", b"\xff\xd8\xff\xe0")], "it is not a PNG file", "mask.data"),
        (
            [chunk("a", png()), mask("a", bytes(20_001))],
            "mask of 'a' is larger than 20000",
            "mask.data",
        ),
        (
            [chunk("a", png(side=70)), mask("a", png(side=75))],
            "the upload is larger than 30000",
            "mask.data",
        ),
        (
            [chunk("a", png(side=70)), captions("a", "x" * 20_000)],
            "the upload is larger than 30000",
            "captions.text",
        ),
        (
            [chunk("a", png()), mask("a", png()), chunk("a", png())],
            "two images are called",
            "image.file_name",
        ),
    ],
)
async def test_what_belongs_to_no_image_or_is_too_much_is_refused_and_leaves_nothing(
    served: LearningServer, requests: list[Any], message: str, field: str
) -> None:
    error = await refusal(served.upload([spec(), *requests, end(1)]))
    assert error.code() == StatusCode.INVALID_ARGUMENT
    assert message in (error.details() or "")
    assert field_of(error) == field
    await nothing_is_left(served)


async def test_captions_have_the_trainers_limit(start: Start) -> None:
    served = await start(limits=TrainingLimits())
    assert MAX_CAPTIONS_BYTES == MAX_FILE_BYTES
    text = "\N{FOX FACE}" * (MAX_CAPTIONS_BYTES // 4)  # in bytes, not in characters
    await served.upload([spec(), chunk("a", png()), captions("a", text), end(1)])
    error = await refusal(
        served.upload([spec("<b>"), chunk("a", png()), captions("a", f"{text}x"), end(1)])
    )
    assert "captions of 'a' is larger than 65536 bytes" in (error.details() or "")


@pytest.mark.parametrize(
    "other",
    [
        {"masks": {}},
        {"masks": {"a.png": png(6)}},
        {"captions": {"a.png": "two {}"}},
        {"captions": {"b.png": "one {}"}},
    ],
)
async def test_other_masks_or_captions_are_another_request(
    served: LearningServer, other: dict[str, Any]
) -> None:
    fields: dict[str, Any] = {
        "request_id": "once",
        "images": IMAGES,
        "masks": {"a.png": png(5)},
        "captions": {"a.png": "one {}"},
        "initializer": "hold",
    }
    first = await served.create(**fields)
    assert (await served.create(**fields)).training_id == first.training_id
    error = await refusal(served.create(**{**fields, **other}))
    assert (error.code(), field_of(error)) == (StatusCode.INVALID_ARGUMENT, "request_id")
