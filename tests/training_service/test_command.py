"""`oneword trainings` against a server that learns by scripted processes."""

import asyncio
import io
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from engine.concepts import Concept, read_concept
from engine.training.folder import TrainingFolder
from oneword import training_display
from oneword.cli import main
from oneword.image_folder import read_image_folder
from tests.conftest import ROOT
from tests.fakes import DIM
from tests.scripted_worker import PREVIEW_BYTES
from tests.training_harness import CANCELLED, RUNNING, LearningServer, png
from trainer.errors import NoUsableImages

Output = pytest.CaptureFixture[str]


@pytest.fixture
def images(tmp_path: Path) -> Path:
    folder = tmp_path / "cat"
    folder.mkdir()
    for seed, name in enumerate(("a.png", "b.png", "c.png")):
        (folder / name).write_bytes(png(seed))
    (folder / "a.mask.png").write_bytes(png(7))
    (folder / "b.txt").write_text("﻿a {} on grass\n")
    return folder


async def oneword(served: LearningServer, *words: str | Path, expect: int = 0) -> None:
    code = await asyncio.to_thread(
        main, ["trainings", *map(str, words), "--server", served.address]
    )
    assert code == expect


def id_in(out: str) -> str:
    (line,) = (line for line in out.splitlines() if line.startswith("training "))
    return line.removeprefix("training ")


async def test_a_folder_becomes_a_word_that_the_server_draws(
    served: LearningServer, images: Path, capsys: Output
) -> None:
    await oneword(served, "create", images, "--placeholder-token", "<cat>", "--steps", "7")
    out = capsys.readouterr().out
    assert "  with masks: a.png\n  with captions: b.png\n" in out
    stored = served.store.get("<cat>")
    assert f"the server has <cat> as concept {stored.concept_id[:12]}" in out
    assert f"oneword generate 'a photo of <cat>' --server {served.address}" in out
    training = await served.get(id_in(out))
    assert (training.num_images, training.num_masks, training.num_captioned_images) == (3, 1, 1)
    options = training.spec.options
    assert options.steps == 7 and not options.HasField("batch_size")  # the default is the server's
    assert training.spec.preview_every_steps == 0


async def test_what_was_left_is_watched_listed_and_cancelled_by_its_id(
    served: LearningServer, images: Path, capsys: Output, tmp_path: Path
) -> None:
    words = ("--placeholder-token", "<cat>", "--initializer-token", "hold", "--detach")
    await oneword(served, "create", images, *words)
    out = capsys.readouterr().out
    training_id = id_in(out)
    assert f"oneword trainings watch {training_id} --server {served.address}" in out
    await served.progressed(training_id)
    await oneword(served, "export", training_id, "--output", tmp_path / "x", expect=1)
    assert "is running and has no concept" in capsys.readouterr().err
    await oneword(served, "list")
    assert f"{training_id} running            1/5 " in capsys.readouterr().out
    served.release(training_id)
    await oneword(served, "watch", training_id)
    assert "as concept" in capsys.readouterr().out
    await oneword(served, "export", training_id, "--output", tmp_path / "x.safetensors")
    assert read_concept(tmp_path / "x.safetensors").placeholder_token == "<cat>"
    await oneword(served, "cancel", training_id)  # too late, and no error
    await oneword(served, "delete", training_id)
    capsys.readouterr()
    await oneword(served, "list")
    assert capsys.readouterr().out == ""
    await oneword(served, "watch", training_id, expect=1)
    assert "no training has the id" in capsys.readouterr().err


async def test_previews_are_written_by_their_steps(
    served: LearningServer, images: Path, tmp_path: Path
) -> None:
    words = ("--placeholder-token", "<cat>", "--initializer-token", "floods")
    await oneword(served, "create", images, *words, "--previews", tmp_path / "new" / "drawn")
    drawn = sorted((tmp_path / "new" / "drawn").iterdir())
    assert drawn and all(path.stat().st_size == PREVIEW_BYTES for path in drawn)
    assert all(path.name.startswith("step-") and path.suffix == ".png" for path in drawn)
    (training_id,) = (path.name for path in (served.folder / "jobs").iterdir())
    assert (await served.get(training_id)).spec.preview_every_steps == 50


async def test_a_training_that_fails_is_told_with_its_reason(
    served: LearningServer, images: Path, capsys: Output
) -> None:
    words = ("create", images, "--placeholder-token", "<cat>", "--initializer-token", "refuses")
    await oneword(served, *words, expect=1)
    assert "has failed: the loss is NaN; lower it" in capsys.readouterr().err


async def test_a_word_that_could_not_be_stored_is_offered_as_a_file(
    served: LearningServer, images: Path, capsys: Output
) -> None:
    words = ("--placeholder-token", "<cat>", "--initializer-token", "hold", "--detach")
    await oneword(served, "create", images, *words)
    training_id = id_in(capsys.readouterr().out)
    vectors = np.ones((1, DIM), np.float32)
    served.store.import_concept(Concept(placeholder_token="<cat>", learned_embeddings=vectors))
    served.release(training_id)
    await oneword(served, "watch", training_id, expect=1)
    assert f"oneword trainings export {training_id} --output FILE" in capsys.readouterr().err


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.mark.parametrize(("answer", "state"), [("y\n", CANCELLED), ("\n", RUNNING), ("", RUNNING)])
async def test_ctrl_c_asks_whether_to_cancel(
    served: LearningServer, monkeypatch: pytest.MonkeyPatch, answer: str, state: int
) -> None:
    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    training_id = (await served.create(initializer="hold")).training_id
    await served.progressed(training_id)
    monkeypatch.setattr(training_display, "_show", interrupted)
    monkeypatch.setattr("sys.stdin", Terminal(answer))
    monkeypatch.setattr("sys.stderr", shown := Terminal())
    await oneword(served, "watch", training_id, expect=130)
    assert "cancel the training?" in shown.getvalue()
    if state == CANCELLED:
        assert (await served.ended(training_id)).state == CANCELLED
    else:
        assert (await served.get(training_id)).state == RUNNING
        assert f"oneword trainings watch {training_id} --server" in shown.getvalue()


async def test_a_server_that_stops_leaves_word_how_to_go_on(
    served: LearningServer, capsys: Output
) -> None:
    training_id = (await served.create(initializer="hold")).training_id
    await served.progressed(training_id)
    watching = asyncio.create_task(oneword(served, "watch", training_id, expect=1))
    job = TrainingFolder(served.folder / "jobs" / training_id)
    await asyncio.sleep(0.2)
    await served.server.stop()
    await watching
    assert f"watch it: oneword trainings watch {training_id}" in capsys.readouterr().err
    assert job.read_state().status == "running"


# The folder


def test_a_folder_is_read_by_the_rules_of_learning(images: Path) -> None:
    (images / ".hidden").write_text("x")
    (images / "sub").mkdir()
    (images / "notes.txt").write_text("x")
    (images / "broken.png").write_bytes(b"\x89PNG")
    Image.new("RGB", (8, 8)).save(images / "old.bmp")
    (images / "none.mask.png").write_bytes(png(8))
    (images / "a-masklabel.png").write_bytes(png(8))
    (images / "d.png").write_bytes(png(4))
    (images / "d.txt").write_text("no word here")
    (images / "e.png").write_bytes(png(5))
    (images / "e.mask.png").write_text("no picture")
    folder = read_image_folder(images, "<cat>")
    assert list(folder.images) == ["a.png", "b.png", "c.png"]
    assert folder.images["a.png"] == png(0)
    assert list(folder.masks) == ["a.png"]
    assert folder.captions == {"b.png": "a {} on grass\n"}
    beginnings = {name: reason[:30] for name, reason in folder.skipped.items()}
    assert beginnings == {
        ".hidden": "hidden file",
        "a.mask.png": "'a' has the mask a-masklabel.p",
        "broken.png": "it is not a PNG or JPEG or WEB",
        "d.png": "its caption file d.txt: line 1",
        "e.png": "its mask e.mask.png: it is not",
        "none.mask.png": "no image is named 'none', whos",
        "notes.txt": "it is not a PNG or JPEG or WEB",
        "old.bmp": "it is not a PNG or JPEG or WEB",
        "sub": "not a regular file (only the f",
    }


@pytest.mark.parametrize("content", [None, {}, {"a.png": b"x"}])
def test_a_folder_of_nothing_usable_is_refused(
    tmp_path: Path, content: dict[str, bytes] | None
) -> None:
    folder = tmp_path / "images"
    if content is not None:
        folder.mkdir()
        for name, data in content.items():
            (folder / name).write_bytes(data)
    with pytest.raises(NoUsableImages, match=r"cannot read the image folder|no usable image"):
        read_image_folder(folder, "<cat>")


_WITHOUT = """
import sys
sys.modules.update(dict.fromkeys(("torch", "transformers", "diffusers", "onnxruntime")))
from oneword.cli import main
sys.exit(main(sys.argv[1:]))
"""


def test_the_command_needs_neither_pytorch_nor_onnx_runtime(images: Path) -> None:
    words = ["trainings", "create", str(images), "--placeholder-token", "<cat>"]
    done = subprocess.run(
        [sys.executable, "-c", _WITHOUT, *words, "--server", "127.0.0.1:1"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 1
    assert done.stderr == "oneword: no server at 127.0.0.1:1; start one with `oneword serve`\n"
