"""What is counted as Prometheus reads it. The package is imported only when it is asked for."""

from collections.abc import Callable, Iterable
from typing import Any

from engine.errors import ConfigError
from engine.operations.metrics import Counter, Gauge, Histogram, Metrics


def make_exposition(metrics: Metrics) -> Callable[[str], tuple[bytes, str]]:
    """A function from an Accept header to the text and its type; raises `ConfigError`."""
    try:
        from prometheus_client import CollectorRegistry, ProcessCollector
        from prometheus_client.exposition import choose_encoder
    except ModuleNotFoundError as error:
        raise ConfigError(
            "metrics_listen needs prometheus-client; install it with: "
            "pip install 'oneword[metrics]'"
        ) from error
    # Its own registry: what other packages of the process count is none of ours.
    registry = CollectorRegistry()
    registry.register(_Collector(metrics))
    ProcessCollector(registry=registry)  # memory, CPU time and open files of this process

    def expose(accept: str) -> tuple[bytes, str]:
        encode, content_type = choose_encoder(accept)
        return encode(registry), content_type

    return expose


class _Collector:
    def __init__(self, metrics: Metrics) -> None:
        self._metrics = metrics

    def collect(self) -> Iterable[Any]:
        yield from map(_counter, self._metrics.counters)
        yield from map(_histogram, self._metrics.histograms)
        yield from map(_gauge, self._metrics.gauges)


def _counter(counter: Counter) -> Any:
    from prometheus_client.core import CounterMetricFamily

    family = CounterMetricFamily(counter.name, counter.summary, labels=counter.labels)
    for labels, value in counter.read().items():
        family.add_metric(labels, value)
    return family


def _histogram(histogram: Histogram) -> Any:
    from prometheus_client.core import HistogramMetricFamily
    from prometheus_client.utils import floatToGoString

    family = HistogramMetricFamily(histogram.name, histogram.summary, labels=histogram.labels)
    bounds = (*histogram.bounds, float("inf"))
    for labels, distribution in histogram.read().items():
        buckets, seen = list[tuple[str, float]](), 0
        for bound, count in zip(bounds, distribution.counts, strict=True):
            seen += count
            buckets.append((floatToGoString(bound), seen))
        family.add_metric(labels, buckets, distribution.sum)
    return family


def _gauge(gauge: Gauge) -> Any:
    from prometheus_client.core import GaugeMetricFamily

    family = GaugeMetricFamily(gauge.name, gauge.summary, labels=gauge.labels)
    for labels, value in gauge.read().items():
        family.add_metric(labels, value)
    return family
