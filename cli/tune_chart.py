"""The chart of `millrace tune`: throughput against latency, one line for each budget of tokens."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from protocol.errors import ConfigurationError

if TYPE_CHECKING:
    from worker.engine.tuning import Point


def draw_chart(points: "Sequence[Point]", best: "Point", path: Path, title: str) -> None:
    """Raises ConfigurationError when the file cannot be written."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 5), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    for budget in sorted({point.max_batch_tokens for point in points}):
        line = sorted((p for p in points if p.max_batch_tokens == budget), key=lambda p: p.max_num_seqs)
        axes.plot(
            [p.latency_ms for p in line], [p.output_tokens_per_s for p in line], "o-", label=f"{budget} tokens a step"
        )
        for point in line:
            axes.annotate(
                str(point.max_num_seqs),
                (point.latency_ms, point.output_tokens_per_s),
                xytext=(7, -11),  # beside the marker, not under it
                textcoords="offset points",
                fontsize=8,
            )
    axes.plot([best.latency_ms], [best.output_tokens_per_s], "*", markersize=16, color="black", label="chosen")
    axes.set(
        xlabel="milliseconds between two tokens of a Sequence (median)",
        ylabel="output tokens per second, all together",
        title=f"{title}; numbers are Sequences at once",
    )
    axes.grid(alpha=0.3)
    axes.legend()
    try:
        figure.savefig(path, format="png", dpi=120)
    except OSError as error:
        raise ConfigurationError(f"cannot write the chart {path}: {error.strerror}") from error
