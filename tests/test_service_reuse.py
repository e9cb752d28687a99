"""The result cache behind the service: whose seed is named gets what was drawn before."""

import numpy as np

from engine.batching.batcher import BatcherConfig
from tests import service_harness
from tests.service_harness import StartServer, images, kinds, pixels

start_server = service_harness.start_server  # a fixture


async def test_an_equal_request_with_a_seed_is_not_drawn_again(start_server: StartServer) -> None:
    served = await start_server(batcher=BatcherConfig(result_cache_bytes=1 << 24))
    calls = list[int]()
    answers = list[np.ndarray]()
    for fields in ({"seed": 3}, {"seed": 3}, {"seed": 4}, {}, {}):
        responses = await served.generate(prompt="a cat", **fields)
        assert kinds(responses)[-1] == "summary"
        answers.append(pixels(images(responses)[0].image))
        calls.append(served.denoiser.num_calls)
    assert calls == [4, 4, 8, 12, 16], "four steps each, but for the second"
    np.testing.assert_array_equal(answers[1], answers[0])
    assert (answers[2] != answers[0]).any()
