"""What the server counts, as the message that `oneword status` and `oneword top` show."""

from collections.abc import Sequence

from engine.operations.memory import children_resident_bytes, resident_bytes
from engine.operations.metrics import Metrics
from engine.operations.observed_batcher import Observation, Watched
from engine.security.callers import Scope, current_caller
from protos.oneword.v1 import server_info_pb2

MAX_TENANTS = 20


def load_to_proto(observation: Observation, load: tuple[int, int]) -> server_info_pb2.Load:
    """`load` is (images in flight, images queued)."""
    running = observation.running()
    return server_info_pb2.Load(
        images_in_flight=load[0],
        images_queued=load[1],
        requests_running=len(running),
        backlog_row_steps=sum(watched.row_steps_left for watched in running),
        uptime_s=observation.metrics.uptime_s,
        totals=_totals(observation.metrics),
        resident_bytes=resident_bytes(),
        children_resident_bytes=children_resident_bytes(),
        tenants=_tenants(running) if Scope.ADMIN in current_caller().scopes else [],
    )


def _totals(metrics: Metrics) -> server_info_pb2.Totals:
    steps = metrics.step_seconds.of()
    return server_info_pb2.Totals(
        images=round(metrics.images.total),
        requests=metrics.requests.by_label(),
        shed=metrics.shed.by_label(),
        cancelled=metrics.cancelled.by_label(),
        deadline_missed=round(metrics.deadline_missed.total),
        steps=steps.count,
        step_rows=round(metrics.batch_rows.of().sum),
        step_s=steps.sum,
        queue_wait_s=metrics.queue_wait_seconds.of().sum,
        stage_s={labels[0]: spent.sum for labels, spent in metrics.stage_seconds.read().items()},
        cache_hits=metrics.cache_hits.by_label(),
        worker_restarts=round(metrics.worker_restarts.total),
    )


def _tenants(running: Sequence[Watched]) -> list[server_info_pb2.TenantLoad]:
    by_tenant = dict[str, server_info_pb2.TenantLoad]()
    for watched in running:
        load = by_tenant.setdefault(
            watched.tenant, server_info_pb2.TenantLoad(tenant=watched.tenant)
        )
        load.requests_running += 1
        load.images_left += watched.images_left
        load.backlog_row_steps += watched.row_steps_left
    largest = sorted(by_tenant.values(), key=lambda load: load.backlog_row_steps, reverse=True)
    return largest[:MAX_TENANTS]
