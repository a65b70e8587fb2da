"""Averages the training steps since the last line of metrics."""

import time


class Window:
    """Consecutive training steps, and how long they take.

    The time starts with the first metrics that arrive, so it does not include compilation.
    """

    def __init__(self):
        self._last_arrival: float | None = None
        self._begin()

    def _begin(self) -> None:
        self._metrics: list[dict[str, float]] = []
        self._images_timed = 0
        self._seconds = self._data_seconds = 0.0

    def __len__(self) -> int:
        return len(self._metrics)

    def add(self, metrics: dict[str, float], data_seconds: float, images: int) -> None:
        """Adds the metrics of a step, which have just arrived.

        Args:
          metrics: its metrics.
          data_seconds: how long the devices may have waited for its batch.
          images: in its batch.
        """
        now = time.perf_counter()
        if self._last_arrival is not None:
            passed = now - self._last_arrival
            self._images_timed += images
            self._seconds += passed
            # Steps are dispatched ahead: part of the wait may lie before the last arrival.
            self._data_seconds += min(data_seconds, passed)
        self._last_arrival = now
        self._metrics.append(metrics)

    def pause(self) -> None:
        """Excludes the time until the next step."""
        self._last_arrival = None

    def means(self) -> dict[str, float]:
        """Returns the mean of each metric.

        Once a step has been timed, also `images_per_second`, and `data_wait`: the share of the
        time in which the devices had nothing to do.
        """
        means = {
            key: sum(metrics[key] for metrics in self._metrics) / len(self._metrics)
            for key in self._metrics[0]
        }
        if self._images_timed:
            means["images_per_second"] = self._images_timed / self._seconds
            means["data_wait"] = self._data_seconds / self._seconds
        return means

    def end(self) -> dict[str, float]:
        """Returns the means; the next step begins a new window."""
        means = self.means()
        self._begin()
        return means
