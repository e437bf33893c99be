"""report.md: the page that a person reads, made of report.json alone.

Tables first by depth (all methods where all can be compared), then by method, then what was removed.
"""

from __future__ import annotations

from typing import Any

from foundation.markdown import inline, table

Found = dict[str, Any]


def page(found: Found) -> str:
    """The Markdown of report.json's content. Pictures are named, and lie beside the page."""
    parts = [
        f"# {inline(found['title'])}",
        _about(found),
        "## Score against layers removed",
        _curve(found),
        f"## At the same depth\n\n{_same_depth(found)}",
        f"## Beside a dense model of the same size\n\n{_dense(found)}",
        "## Method by method",
        *(_method(found, method) for method in found["methods"]),
        f"## What was removed\n\n{_removed(found)}",
        f"## How these figures were made\n\n{_made(found)}",
    ]
    return "\n\n".join(parts) + "\n"


def _about(found: Found) -> str:
    original = found["models"]["original"]
    runs, methods = len(found["runs"]), len(found["methods"])
    named = ", ".join(f"{inline(name)} ({items} items)" for name, items in found["tasks"].items())
    return (
        f"{counted(runs, 'run')} of {counted(methods, 'method')} on a model of {original['layers']} layers, "
        f"{sized(original['parameters'])} parameters, {_megabytes(original)} MB as GGUF {_type(found)}. "
        f"A score is the mean of these tasks' means: {named}."
    )


def _curve(found: Found) -> str:
    said = ["Bars are 95 % intervals of one model's score."]
    if any(method["runs"] > 1 for method in found["methods"]):
        said.append("Bands reach from a method's lowest run to its highest.")
    if found["dense"]:
        said.append("Dashed: a dense model; its star stands at the depth whose size is nearest to its own.")
    return "\n\n".join(["![Score against layers removed, a line a method](score.svg)", " ".join(said)])


def _same_depth(found: Found) -> str:
    """The paper's Table 3: every method, the original and the dense models, task by task."""
    depth, original = found["deepest_common"], found["models"]["original"]
    if depth is None:
        return "The runs have no number of removed layers in common."
    tasks, several = list(found["tasks"]), any(method["runs"] > 1 for method in found["methods"])
    rows = []

    def add(name: str, layers: int, runs: int | str, row: Found) -> None:
        each = [f"{row['tasks'][task]['mean']:.3f}" for task in tasks]
        less = _difference(row["against_original"])
        rows.append(
            [name, str(layers), *([str(runs)] if several else []), _interval(row["score"]), less, *each]
        )

    add("original", original["layers"], "", original)
    for method in found["methods"]:
        row = next(row for row in method["depths"] if row["layers_removed"] == depth)
        add(method["label"], row["layers_left"], row["runs"], row)
    for name in found["dense"]:
        model = found["models"][name]
        add(f"{name}, {sized(model['parameters'])}", model["layers"], "", model)
    runs = ["runs"] if several else []
    head = ["model", "layers", *runs, "score (95 % interval)", "less the original's", *tasks]
    about = f"{counted(depth, 'layer')} of {original['layers']} removed, the most that all runs reached."
    return f"{about}\n\n{table(head, rows, left=1)}"


def _dense(found: Found) -> str:
    """One sentence a method, at the same depth: what a dense model of that size scores."""
    if not found["dense"]:
        return (
            "No dense model was given (`dense`), so this page can not say whether pruning beats a model that "
            "was small from the start. Compare with one of the same size before you use a pruned model."
        )
    depth = found["deepest_common"]
    lines = []
    for method in found["methods"]:
        row = next((r for r in method["depths"] if r["layers_removed"] == depth), method["depths"][-1])
        near = row["nearest_dense"]
        model = found["models"][near["name"]]
        lead = near["difference"]["mean"]
        sure = "" if _excludes_zero(near["difference"]) else ", which does not tell them apart"
        line = (
            f"- **{inline(method['label'])}** without {counted(row['layers_removed'], 'layer')}: "
            f"{sized(row['parameters'])} parameters. The nearest dense model is {inline(near['name'])} "
            f"with {sized(model['parameters'])}, {near['times_parameters']:.2f} times as many, "
            f"and scores {model['score']['mean']:.3f}: the pruned one, at {row['score']['mean']:.3f}, is "
            f"{abs(lead):.3f} {'above' if lead > 0 else 'below'} it: {_difference(near['difference'])}{sure}"
        )
        if not 0.9 < near["times_parameters"] < 1.1:
            line += "; that is not the same size, and no nearer one was given"
        if not near["same_items"]:
            line += (
                "; its tokenizer or context is another one, so scores that count tokens are not like for like"
            )
        lines.append(line + ".")
    return "\n".join([*lines, "", "Nothing is interpolated: between two dense models there is no line."])


def _method(found: Found, method: Found) -> str:
    speeds = found["machine_bound"]["models"]
    rows = []
    for row in method["depths"]:
        times = [speeds[name]["times_original"] for name in row["models"]]
        rows.append([
            str(row["layers_removed"]), str(row["layers_left"]), _interval(row["score"]),
            _share(row["share_of_original"]), sized(row["parameters"]),
            f"{sum(times) / len(times):.2f} x", _megabytes(row),
            *([str(row["runs"])] if method["runs"] > 1 else []),
        ])  # fmt: skip
    head = ["layers removed", "layers left", "score (95 % interval)", "of the original's", "parameters",
            "tokens/s *", f"GGUF {_type(found)}, MB", *(["runs"] if method["runs"] > 1 else [])]  # fmt: skip
    how = method["method"]
    chosen = {"task": "task score", "influence": "Block Influence", "angular": "angular distance", "kl": "KL"}
    said = (
        f"Layers chosen by {chosen[how['importance']]}, "
        f"{'measured afresh after each removal' if how['rescore'] else 'measured once'}; "
        f"{'healed after each removal' if how['heals'] else 'not healed'}."
    )
    return f"### {inline(method['label'])}\n\n{said}\n\n{table(head, rows)}"


def _removed(found: Found) -> str:
    """The paper's Figures 9 and 10, in words as well."""
    several = {method["label"] for method in found["methods"] if method["runs"] > 1}
    rows = []
    for run in found["runs"]:
        order = ", ".join("+".join(map(str, step)) for step in run["order"])
        named = f"{run['label']}, run {run['number']}" if run["label"] in several else run["label"]
        rows.append([named, order])
    most = max(found["frequency"])
    often = ", ".join(str(layer) for layer, times in enumerate(found["frequency"]) if times == most)
    never = ", ".join(str(layer) for layer in found["base"] if not found["frequency"][layer])
    runs = len(found["runs"])
    return "\n\n".join([
        f"Layers have the original's numbers, 0 to {found['layers'] - 1}; those joined by + went in one step.",
        table(["run", "first to last"], rows, left=2),
        "![Step at which each layer was removed, a row a run](order.svg)",
        f"Most often removed, in {most} of {counted(runs, 'run')}: {often}. Never: {never or 'none'}.",
        "![How often each layer was removed](frequency.svg)",
    ])  # fmt: skip


def _made(found: Found) -> str:
    lines = [
        f"- \\* Machine-bound: {found['machine_bound']['about']}, as a multiple of the original's, which took "
        "turns with each model. The multiple is the steadier figure; tokens/s themselves are in report.json, "
        "and change with machine and hour.",
        "- Intervals are 95 %, by Student's t: over the items of the tasks for one model, over the runs "
        "where a method has several. Differences of two models are taken item by item.",
        "- A model that several runs have in common was measured once. All figures stand in report.json.",
    ]
    return "\n".join(lines)


# ------------------------------------------------------------------------------------------- in words


def _interval(score: Found) -> str:
    return f"{score['mean']:.3f} ({score['low']:.3f} to {score['high']:.3f})"


def _difference(found: Found | None) -> str:
    if found is None:
        return ""
    if found["low"] is None:
        return f"{found['mean']:+.3f}, not paired"
    return f"{found['mean']:+.3f} ({found['low']:+.3f} to {found['high']:+.3f})"


def _excludes_zero(found: Found) -> bool:
    return found["low"] is not None and (found["low"] > 0 or found["high"] < 0)


def _share(value: float | None) -> str:
    return "none" if value is None else f"{100 * value:.1f} %"


def sized(parameters: float) -> str:
    """Three digits and k, M or B."""
    for size, unit in ((1e9, "B"), (1e6, "M"), (1e3, "k")):
        if parameters >= size:
            return f"{parameters / size:#.3g}".rstrip(".") + f" {unit}"
    return f"{parameters:.0f}"


def _megabytes(row: Found) -> str:
    return f"{max(row['gguf_bytes'].values()) / 1e6:.2f}"  # of the one type there is


def _type(found: Found) -> str:
    return " ".join(found["models"]["original"]["gguf_bytes"])


def counted(number: int, noun: str) -> str:
    """`1 run`, `2 runs`."""
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"
