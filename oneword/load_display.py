"""What a server says of its load, as lines for a terminal."""

from collections.abc import Mapping
from dataclasses import dataclass, field

from engine.printing import printable
from protos.oneword.v1 import server_info_pb2

Info = server_info_pb2.GetServerInfoResponse
_BARS = "▁▂▃▄▅▆▇█"
_PLAIN_BARS = "_.-:=+*#"  # where the terminal has no others


@dataclass(frozen=True, slots=True, kw_only=True)
class Rates:
    """What was done between two answers; None where nothing was, or no time has passed."""

    seconds: float
    images_per_s: float | None = None
    steps_per_s: float | None = None
    step_ms: float | None = None
    mean_rows: float | None = None
    busy: float | None = None  # share of the time in denoiser calls
    shed_per_s: float | None = None
    cancelled_per_s: float | None = None

    @classmethod
    def between(cls, before: server_info_pb2.Load, after: server_info_pb2.Load) -> "Rates":
        seconds = after.uptime_s - before.uptime_s
        if seconds <= 0.0:  # the same answer, or a server that was started again
            return cls(seconds=0.0)
        old, new = before.totals, after.totals
        steps = new.steps - old.steps
        return cls(
            seconds=seconds,
            images_per_s=(new.images - old.images) / seconds,
            steps_per_s=steps / seconds,
            step_ms=1e3 * (new.step_s - old.step_s) / steps if steps else None,
            mean_rows=(new.step_rows - old.step_rows) / steps if steps else None,
            busy=(new.step_s - old.step_s) / seconds,
            shed_per_s=(_sum(new.shed) - _sum(old.shed)) / seconds,
            cancelled_per_s=(_sum(new.cancelled) - _sum(old.cancelled)) / seconds,
        )


@dataclass(slots=True)
class History:
    """The last values of something, as a line of bars."""

    most: int = 40
    values: list[float] = field(default_factory=list[float])

    def add(self, value: float) -> None:
        self.values = [*self.values, value][-self.most :]

    def bars(self) -> str:
        bars = _BARS if printable(_BARS) == _BARS else _PLAIN_BARS
        top = max(self.values, default=0.0) or 1.0
        return "".join(bars[round(value / top * (len(bars) - 1))] for value in self.values)


def is_serving(info: Info) -> bool:
    """What the server says of itself as a whole."""
    return info.serving.get("", False)


def status_lines(info: Info, address: str) -> list[str]:
    """One screen about a server."""
    load, totals, model = info.load, info.load.totals, info.model
    mean = Rates.between(server_info_pb2.Load(), load)
    rows = {
        "model": f"{printable(model.name)} ({printable(model.precision)}), {model.default_size} px",
        "worker": f"{totals.worker_restarts} restarts",
        "load": load_text(load),
        "limits": limits_text(info.limits),
        "done": done_text(load),
        "steps": f"{number(mean.step_ms)} ms and {number(mean.mean_rows)} rows on average",
        "stages": counts({name: f"{spent_s:.1f} s" for name, spent_s in totals.stage_s.items()}),
        "refused": counts(totals.shed),
        "given up": counts(totals.cancelled),
        "memory": memory_text(load),
    }
    services = [
        f"  {_state(info.serving[name]):<12} {printable(name) or '(all)'}"
        for name in sorted(info.serving)
    ]
    head = f"OneWord {printable(info.versions.get('oneword', '?'))}, up {duration(load.uptime_s)}"
    return [
        f"{printable(address)}: {_state(is_serving(info))}, {head}",
        *(f"{name:<11} {text}" for name, text in rows.items()),
        "services",
        *services,
    ]


def top_lines(info: Info, address: str, rates: Rates, history: History) -> list[str]:
    """The moving view: what is going on now."""
    load, totals = info.load, info.load.totals
    rows = {
        "images/s": (rates.images_per_s, history.bars()),
        "step ms": (rates.step_ms, f"{percent(rates.busy)} of the time in steps"),
        "rows": (rates.mean_rows, f"in a step; {number(rates.steps_per_s)} steps/s"),
        "refused/s": (rates.shed_per_s, counts(totals.shed)),
        "given up/s": (rates.cancelled_per_s, counts(totals.cancelled)),
    }
    down = [name or "server" for name in sorted(info.serving) if not info.serving[name]]
    state, name = _state(is_serving(info)), printable(info.model.name)
    return [
        f"oneword top  {printable(address)}  {name}  {state}  up {duration(load.uptime_s)}",
        "",
        f"{'load':<11} {load_text(load)}",
        *(f"{title:<11} {number(value):>8}  {text}" for title, (value, text) in rows.items()),
        f"{'done':<11} {done_text(load)}",
        f"{'memory':<11} {memory_text(load)}",
        f"not serving: {printable(', '.join(down)) or 'nothing'}",
        *_tenant_lines(load),
    ]


def _tenant_lines(load: server_info_pb2.Load) -> list[str]:
    if not load.tenants:
        return []
    rows = [
        f"{printable(tenant.tenant)[:24]:<24} {tenant.requests_running:>8} "
        f"{tenant.images_left:>8} {tenant.backlog_row_steps:>10}"
        for tenant in load.tenants
    ]
    return ["", f"{'tenant':<24} {'requests':>8} {'images':>8} {'row-steps':>10}", *rows]


def load_text(load: server_info_pb2.Load) -> str:
    return (
        f"{load.requests_running} requests, {load.images_in_flight} images in flight, "
        f"{load.images_queued} queued, {load.backlog_row_steps} row-steps to do"
    )


def limits_text(limits: server_info_pb2.RequestLimits) -> str:
    return (
        f"{limits.max_images_per_request} images a request, {limits.max_pixels} px an image, "
        f"{limits.max_queued_images} images queued"
    )


def done_text(load: server_info_pb2.Load) -> str:
    requests = counts(load.totals.requests)
    return f"{load.totals.images} images; requests: {requests}"


def memory_text(load: server_info_pb2.Load) -> str:
    return (
        f"{load.resident_bytes / 2**20:.0f} MiB, "
        f"{load.children_resident_bytes / 2**20:.0f} MiB in processes below"
    )


def counts(values: Mapping[str, object]) -> str:
    found = ", ".join(f"{values[name]} {printable(name)}" for name in sorted(values))
    return found or "none"


def number(value: float | None) -> str:
    return "-" if value is None else f"{value:.3g}" if value < 100 else f"{value:.0f}"


def percent(value: float | None) -> str:
    return "-" if value is None else f"{100 * value:.0f} %"


def duration(seconds: float) -> str:
    minutes, rest = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    days, hours = divmod(hours, 24)
    if days:
        return f"{days} d {hours} h"
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {rest} s"


def _state(serves: bool) -> str:
    return "serving" if serves else "NOT SERVING"


def _sum(values: Mapping[str, int]) -> int:
    return sum(values.values())
