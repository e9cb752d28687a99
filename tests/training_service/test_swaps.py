"""Words that are learned while another bundle takes over."""

from pathlib import Path

from tests.admin_setup import Loading, make_bundle
from tests.training_harness import FAILED, SUCCEEDED, LearningServer


async def test_a_word_is_stored_if_it_fits_the_bundle_in_service_by_then(
    served: LearningServer, tmp_path: Path
) -> None:
    served.server.deployment._open_model = Loading()
    training = await served.create("<a>", initializer="hold")
    await served.progressed(training.training_id)
    # Start and end, and no place for a word between them.
    await served.server.deploy(make_bundle(tmp_path / "narrow", max_tokens=2))
    served.release(training.training_id)
    ended = await served.ended(training.training_id)
    assert ended.state == FAILED
    assert "model 'narrow' has room for 0 in a chunk" in ended.error
    assert served.server.deployment.wait_retired(60.0)
    await served.server.deploy(make_bundle(tmp_path / "wide"))
    training = await served.create("<b>")
    assert (await served.ended(training.training_id)).state == SUCCEEDED
    assert [concept.placeholder_token for concept in served.store.list(limit=9)] == ["<b>"]
