"""Rows of several seeds to one line a method and base."""

import statistics
from collections import defaultdict
from dataclasses import dataclass
from typing import Any

Row = dict[str, Any]


@dataclass(frozen=True)
class Summary:
    """The seeds of one method on one base."""

    method: str
    size: str
    quantization: str
    metric: str
    runs: int
    before: float
    after: float
    spread: float | None
    """Sample standard deviation of `after` over the seeds; None for a single one."""
    peak_bytes: float
    step_seconds: float
    tokens_per_second: float
    train_seconds: float
    trainable_parameters: int
    total_parameters: int
    saved_bytes: float
    share: float | None
    """Share of what full fine-tuning gains, from the same start; None where there is no full run to compare with."""


def summarize(rows: list[Row]) -> list[Summary]:
    """One summary a method and base, in the order in which they first appear; failed rows are left out."""
    groups: dict[tuple[str, str, str], list[Row]] = defaultdict(list)
    for row in rows:
        if row["status"] == "ok":
            groups[row["method"], json_key(row.get("options")), row["quantization"]].append(row)
    full = next((group for key, group in groups.items() if key[0] == "full"), None)
    return [_summary(group, full) for group in groups.values()]


def json_key(value: object) -> str:
    """A key for options that may hold lists."""
    import json

    return json.dumps(value, sort_keys=True)


def _mean(rows: list[Row], *path: str) -> float:
    values = []
    for row in rows:
        value: Any = row
        for name in path:
            value = value[name]
        values.append(float(value))
    return statistics.fmean(values)


def _summary(rows: list[Row], full: list[Row] | None) -> Summary:
    first = rows[0]
    metric = first["metric"]
    after = [row["after"][metric] for row in rows]
    return Summary(
        method=first["method"],
        size=first["size"],
        quantization=first["quantization"],
        metric=metric,
        runs=len(rows),
        before=_mean(rows, "before", metric),
        after=statistics.fmean(after),
        spread=statistics.stdev(after) if len(after) > 1 else None,
        peak_bytes=_mean(rows, "peak_bytes"),
        step_seconds=_mean(rows, "step_seconds"),
        tokens_per_second=_mean(rows, "tokens_per_second"),
        train_seconds=_mean(rows, "train_seconds"),
        trainable_parameters=first["trainable_parameters"],
        total_parameters=first["total_parameters"],
        saved_bytes=_mean(rows, "saved_bytes"),
        share=_share(statistics.fmean(after), full, metric),
    )


def _share(after: float, full: list[Row] | None, metric: str) -> float | None:
    if full is None:
        return None
    start, end = _mean(full, "before", metric), _mean(full, "after", metric)
    return (after - start) / (end - start) if end != start else None
