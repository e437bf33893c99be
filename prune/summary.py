"""report.json: what is made of runs of pruning and of the measurements of their models. No text, no pictures.

    methods   runs of one label together, by the number of layers removed
    runs      each run by itself: what went, in original numbering, and what it cost
    models    each model that was measured
    dense     dense models, and how each method compares with the one nearest in size

A score is the mean of the tasks' means. Its 95 % interval is over the items where a label has one run, and over
the runs where it has several (what differs between these is the training; the items are the same).
Only `machine_bound` changes when the same models are measured again.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from foundation.statistics import Interval, mean_interval, overall_difference, paired_interval, stratified
from prune.history import History

FORMAT = 1
SPEED = "median tokens/s of a forward pass on one fixed batch, on the machine that made this report"
Measured = Mapping[str, dict[str, Any]]


class Point(NamedTuple):
    """One model on the way of one run."""

    removed: int  # layers gone so far
    model: str


def summary(
    title: str, histories: Sequence[History], measured: Measured, dense: Sequence[str]
) -> dict[str, Any]:
    """The content of report.json. `measured` holds "original", "run N, step M" and the names in `dense`."""
    ways = [_way(number, history) for number, history in enumerate(histories, 1)]
    labels = list(dict.fromkeys(history.label for history in histories))
    groups = {label: [n for n, history in enumerate(histories) if history.label == label] for label in labels}
    common = set.intersection(*({point.removed for point in way[1:]} for way in ways))
    original = histories[0].original_layers
    return {
        "format": FORMAT,
        "title": title,
        "layers": original,
        "base": list(histories[0].base),  # those that `model` still has
        "tasks": {name: len(task["scores"]) for name, task in measured["original"]["tasks"].items()},
        "deepest_common": max(common, default=None),
        "models": {name: _model(name, measured) for name in measured},
        "runs": [_run(n, history) for n, history in enumerate(histories, 1)],
        "methods": [_method(label, [ways[n] for n in groups[label]], [histories[n] for n in groups[label]],
                            measured, dense) for label in labels],
        "frequency": [sum(layer in step for h in histories for step in h.order) for layer in range(original)],
        "dense": list(dense),
        "machine_bound": {
            "about": SPEED,
            "models": {name: {key: m[key] for key in ("tokens_per_second", "times_original")}
                       for name, m in measured.items()},
        },
    }  # fmt: skip


def _way(number: int, history: History) -> list[Point]:
    """The run's models from the original on."""
    base = len(history.base)
    steps = [Point(base - len(step.kept), f"run {number}, step {step.step}") for step in history.steps]
    return [Point(0, "original"), *steps]


def _model(name: str, measured: Measured) -> dict[str, Any]:
    """One model by itself, and its difference to the original, item by item."""
    own, original = measured[name], measured["original"]
    paired = own["same_items"] and name != "original"
    tasks = {}
    for task, result in own["tasks"].items():
        interval = _interval(mean_interval(_array(result["scores"])))
        tasks[task] = interval | {"items": len(result["scores"]), "figures": result["figures"]}
    return {
        "content": own["content"],
        "layers": own["layers"],
        "parameters": own["parameters"],
        "gguf_bytes": own["gguf_bytes"],
        "same_items": own["same_items"],
        "score": _interval(stratified(_items(own))),
        "against_original": _interval(overall_difference(_items(own), _items(original))) if paired else None,
        "tasks": tasks,
    }


def _run(number: int, history: History) -> dict[str, Any]:
    """One run's removals in original numbering, with the scores on the tasks that chose them."""
    keys = ("removed", "kept", "importance", "interval", "score_before", "score_cut", "score")
    steps = [step.model_dump(mode="json", include=set(keys)) for step in history.steps]
    return {"number": number, "label": history.label, "order": history.order, "steps": steps}


def _method(
    label: str,
    ways: Sequence[Sequence[Point]],
    histories: Sequence[History],
    measured: Measured,
    dense: Sequence[str],
) -> dict[str, Any]:
    """Runs of one label together, a row for each number of removed layers, the original's first."""
    models: dict[int, list[str]] = {}
    for way in ways:
        for point in way:
            models.setdefault(point.removed, []).append(point.model)
    return {
        "label": label,
        "method": histories[0].method.model_dump(),
        "runs": len(ways),
        "order": [history.order for history in histories],
        "depths": [
            _row(removed, models[removed], measured, dense) | {"layers_left": len(histories[0].base) - removed}
            for removed in sorted(models)
        ],
    }


def _row(removed: int, models: Sequence[str], measured: Measured, dense: Sequence[str]) -> dict[str, Any]:
    """All runs of a method at one depth. Where they hold the same model, that is one model and no spread."""
    distinct = models[:1] if len({measured[name]["content"] for name in models}) == 1 else models
    scores = [_score(measured[name]) for name in models]
    before = _score(measured["original"])
    several = len(distinct) > 1
    sizes = {
        kind: [measured[n]["gguf_bytes"][kind] for n in models] for kind in measured["original"]["gguf_bytes"]
    }
    return {
        "layers_removed": removed,
        "runs": len(models),
        "models": models,
        "score": _interval(
            mean_interval(_array(scores)) if several else stratified(_items(measured[models[0]]))
        ),
        "interval_over": "runs" if several else "items",
        "lowest": min(scores),
        "highest": max(scores),
        "share_of_original": sum(scores) / len(scores) / before if before else None,
        "against_original": _against(distinct, "original", measured) if removed else None,
        "parameters": _mean([measured[name]["parameters"] for name in models]),
        "gguf_bytes": {kind: _mean(found) for kind, found in sizes.items()},
        "tasks": {task: _task(distinct, task, measured) for task in measured["original"]["tasks"]},
        "nearest_dense": _nearest(distinct, measured, dense) if removed and dense else None,
    }


def _task(models: Sequence[str], task: str, measured: Measured) -> dict[str, float | None]:
    """One task's mean: interval over items for one model, over models for several."""
    items = [_array(measured[name]["tasks"][task]["scores"]) for name in models]
    return _interval(
        mean_interval(items[0] if len(items) == 1 else _array([scores.mean() for scores in items]))
    )


def _against(models: Sequence[str], other: str, measured: Measured) -> dict[str, float | None]:
    """Score of `models` less that of one other: paired by item for one model, over models for several.

    No interval where the other has its own tokenizer or context, so that its items may differ.
    """
    if len(models) == 1 and measured[models[0]]["same_items"] and measured[other]["same_items"]:
        return _interval(overall_difference(_items(measured[models[0]]), _items(measured[other])))
    mean = _score(measured[other])
    own = _array([_score(measured[name]) for name in models])
    if len(models) == 1:
        return {"mean": float(own[0]) - mean, "low": None, "high": None}
    return _interval(paired_interval(own, _array([mean] * len(models))))


def _nearest(models: Sequence[str], measured: Measured, dense: Sequence[str]) -> dict[str, Any]:
    """The dense model whose parameters are nearest in ratio; nothing is interpolated between two of them."""
    own = sum(measured[name]["parameters"] for name in models) / len(models)
    name = min(dense, key=lambda other: abs(math.log(measured[other]["parameters"] / own)))
    return {
        "name": name,
        "times_parameters": measured[name]["parameters"] / own,
        "same_items": measured[name]["same_items"],
        "difference": _against(models, name, measured),
    }


def _score(model: Mapping[str, Any]) -> float:
    """Mean of the tasks' means."""
    return float(stratified(_items(model)).mean)


def _items(model: Mapping[str, Any]) -> list[Any]:
    """Scores of the items, one array a task, tasks in one order for all models."""
    return [_array(model["tasks"][task]["scores"]) for task in sorted(model["tasks"])]


def _interval(found: Interval) -> dict[str, float | None]:
    return {"mean": float(found.mean), "low": float(found.low), "high": float(found.high)}


def _array(values: Sequence[float]) -> Any:
    import numpy as np

    return np.asarray(values, dtype=np.float64)


def _mean(values: Sequence[int]) -> float | int:
    return values[0] if len(set(values)) == 1 else sum(values) / len(values)
