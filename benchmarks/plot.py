"""The growth of a step's cost as a picture: measured points, and the growth that is allowed."""

from pathlib import Path
from typing import Any

from benchmarks.targets import EXPONENTS


def plot(scaling: dict[str, Any], target: Path) -> None:
    """One panel a series, both axes logarithmic; the dashed line has the allowed slope, through the last point."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(12, 4), layout="constrained")
    for axis, (name, series) in zip(figure.subplots(1, len(scaling["series"])), scaling["series"].items(), strict=True):
        points = [
            (p["size"], 1e6 * p["seconds_per_step"]) for p in series["points"] if (p["seconds_per_step"] or 0) > 0
        ]
        if points:
            sizes, microseconds = zip(*points, strict=True)
            allowed = [microseconds[-1] * (size / sizes[-1]) ** EXPONENTS[name] for size in sizes]
            axis.loglog(sizes, microseconds, "o-", label=scaling["contender"])
            axis.loglog(sizes, allowed, "k--", linewidth=1, label=f"{name}^{EXPONENTS[name]:.0f}")
            axis.legend()
            axis.set_xticks(sizes[::2], [str(size) for size in sizes[::2]])
            axis.set_xticks([], minor=True)
        fixed = ", ".join(f"{key} = {value}" for key, value in series["fixed"].items())
        exponents = [series[key] for key in ("exponent", "exponent_upper_half")]
        shown = ["–" if p is None else f"{p:.2f}" for p in exponents]
        axis.set_title(f"{fixed}\nexponent {shown[0]}, larger half {shown[1]}", fontsize=10)
        axis.set_xlabel(name)
        axis.grid(which="both", alpha=0.3)
        axis.set_ylabel("µs a step of the whole batch")
    figure.savefig(target, dpi=120)
