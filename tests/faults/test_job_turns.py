"""A disk that fails at the moment when a job's turn has come."""

import asyncio
from collections.abc import AsyncGenerator
from pathlib import Path
from typing import Any

import pytest

from engine.errors import StoreError
from engine.image_jobs.job import ImageJob, JobLimits
from engine.image_jobs.runner import ImageJobRunner
from engine.image_jobs.store import ImageJobStore
from protos.oneword.v1.generation_pb2 import GenerateRequest, GenerateResponse, Summary


async def test_a_job_whose_turn_failed_does_not_wait_for_another_job(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = ImageJobStore(tmp_path, JobLimits())
    pinned = GenerateRequest(num_images=1).SerializeToString()
    job = store.submit(tenant="a", request_id="", body=b"", shown=b"", pinned=pinned, priority=0)
    begin_next, failures = store.begin_next, [StoreError("the disk"), StoreError("the disk")]

    def failing(running: dict[str, int]) -> Any:
        if failures:
            raise failures.pop()
        return begin_next(running)

    async def follow(_request: GenerateRequest, _job: ImageJob) -> AsyncGenerator[GenerateResponse]:
        yield GenerateResponse(summary=Summary())

    monkeypatch.setattr(store, "begin_next", failing)
    runner = ImageJobRunner(store, follow)
    await runner.start()
    changed = runner.changed(job.job_id)
    async with asyncio.timeout(30.0):  # before, a minute went by
        while store.get(job.job_id, tenant="a").status != "succeeded":
            await changed.wait()
            changed = runner.changed(job.job_id)
    await runner.stop()
    store.close()
