"""Rows to text and a plot. Nothing here runs or measures anything."""

from pathlib import Path
from typing import Any

from lora_kit.comparison.statistics import Row, Summary, summarize

COLORS = {"full": "#4c4c4c", "lora": "#0072b2", "prefix": "#d55e00"}
MARKERS = {"16bit": "o", "8bit": "s", "4bit": "^"}


def columns(rows: list[Row]) -> tuple[list[str], list[list[str]]]:
    """Headings and cells of the table, one line a method and base."""
    summaries = summarize(rows)
    if not summaries:
        return [], []
    metric = summaries[0].metric
    headings = ["method", "base", "trained", f"{metric} before", f"{metric} after"]
    if metric == "loss" and summaries[0].share is not None:
        headings.append("of full's gain")
    headings += ["peak MB", "step ms", "tokens/s", "train s", "saved MB"]
    return headings, [_line(summary, headings) for summary in summaries]


def _line(one: Summary, headings: list[str]) -> list[str]:
    after = f"{one.after:.3f}" + (f" ± {one.spread:.3f}" if one.spread is not None else "")
    line = [
        f"{one.method} ({one.size})" if one.method != "full" else "full",
        one.quantization.replace("bit", " bit"),
        f"{100 * one.trainable_parameters / one.total_parameters:.2f} %",
        f"{one.before:.3f}",
        after,
    ]
    if "of full's gain" in headings:
        line.append("–" if one.share is None else f"{100 * one.share:.0f} %")
    return [
        *line,
        f"{one.peak_bytes / 1e6:.1f}",
        f"{1000 * one.step_seconds:.0f}",
        f"{one.tokens_per_second:,.0f}",
        f"{one.train_seconds:.1f}",
        f"{one.saved_bytes / 1e6:.2f}",
    ]


def failures(rows: list[Row]) -> list[str]:
    """One line for each run that did not finish."""
    return [
        f"{row['method']} {row['quantization']} seed {row['seed']}: {row['status']}: {row['reason']}"
        for row in rows
        if row["status"] != "ok"
    ]


def notes(rows: list[Row]) -> list[str]:
    """What was run on what: read off the rows."""
    done = [row for row in rows if row["status"] == "ok"]
    if not done:
        return []
    one = done[0]
    seeds = sorted({row["seed"] for row in done})
    versions = ", ".join(f"{name} {version}" for name, version in one["versions"].items())
    device = one["machine"]
    spread = "± is the standard deviation over them" if len(seeds) > 1 else "differences of a few points may be chance"
    rates = {f"{row['method']} {row['learning_rate']:.2g}": None for row in done}
    lines = [
        f"Model {one['model']}, data {one['data']}: {one['train_rows_used']:,} rows to train on, "
        f"{one['test_rows_used']:,} held out; {one['epochs']:g} epochs, batches of {one['batch_size']}, "
        f"at most {one['max_length']} tokens; base in {one['dtype']}; learning rates: {', '.join(rates)}.",
        f"{len(seeds)} seed{'s' if len(seeds) > 1 else ''}; {spread}.",
        f"Peak MB: {one['peak_of']} at the peak of a training step on the longest rows (weights, gradients, optimizer "
        "states and activations), 1 MB = 10⁶ bytes. Step ms: median after the first two steps.",
        f"{device['device']}, {device['threads']} of {device['cores']} cores, Python {device['python']}; {versions}; "
        f"{_commits(done)}.",
    ]
    if one["metric"] == "loss":
        lines.insert(1, "Loss is the mean over held-out tokens; lower is better. Of full's gain: how much of what full "
                        "fine-tuning takes off the loss the method takes off.")  # fmt: skip
    return lines


def markdown(rows: list[Row], plot: str | None) -> str:
    """The report as Markdown."""
    headings, lines = columns(rows)
    text = ["# Comparison of fine-tuning methods", ""]
    if headings:
        text += ["| " + " | ".join(headings) + " |", "|" + "---|" * len(headings)]
        text += ["| " + " | ".join(line) + " |" for line in lines]
        text.append("")
    failed = failures(rows)
    if failed:
        text += ["Runs that did not finish:", "", *[f"* {line}" for line in failed], ""]
    if plot:
        text += [f"![memory and {rows[0].get('metric', 'accuracy')}]({plot})", ""]
    return "\n".join(text + [f"{line}\n" for line in notes(rows)])


def terminal(rows: list[Row], console: Any) -> None:
    """Print the table and the notes."""
    from rich.table import Table

    headings, lines = columns(rows)
    shown = _fitting(headings, lines, console.width)
    table = Table(box=None, header_style="bold", pad_edge=False)
    for i in shown:
        table.add_column(headings[i], justify="left" if i < 2 else "right", no_wrap=True)
    for cells in lines:
        table.add_row(*[cells[i] for i in shown])
    console.print()
    if lines:
        console.print(table)
    for line in failures(rows):
        console.print(f"[red]did not finish:[/red] {line}", highlight=False)
    console.print()
    if len(shown) < len(headings):
        console.print("More columns are in report.md.", style="dim", highlight=False)
    for line in notes(rows):
        console.print(line, style="dim", highlight=False)


def _fitting(headings: list[str], lines: list[list[str]], width: int) -> list[int]:
    """Indices of the columns to show on a terminal of so many characters; report.md has them all."""
    shown = list(range(len(headings)))
    expendable = [
        heading for heading in ("train s", "saved MB", "trained", "tokens/s", "step ms") if heading in headings
    ]
    widths = [
        max(len(cell) for cell in (heading, *column)) + 2 for heading, *column in zip(headings, *lines, strict=True)
    ]
    while sum(widths[i] for i in shown) > width and expendable:
        shown.remove(headings.index(expendable.pop(0)))
    return shown


def plot(rows: list[Row], file: Path) -> bool:
    """Draw memory against the metric; False where matplotlib is missing or nothing finished."""
    summaries = summarize(rows)
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError:
        return False
    if not summaries:
        return False
    figure = Figure(figsize=(7.5, 5), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    for one in summaries:
        axes.errorbar(
            one.peak_bytes / 1e6,
            one.after,
            yerr=one.spread,
            label=f"{one.method} {one.quantization.replace('bit', ' bit')}",
            color=COLORS.get(one.method, "#009e73"),
            marker=MARKERS.get(one.quantization, "D"),
            markersize=9,
            capsize=3,
            linestyle="none",
        )
    metric = summaries[0].metric
    axes.set_xlabel("peak memory of a training step, MB")
    axes.set_ylabel(f"held-out {metric}" + (" (lower is better)" if metric == "loss" else ""))
    axes.set_title("Memory and quality of fine-tuning methods")
    axes.margins(x=0.15, y=0.12)
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(file, dpi=150)
    return True


def _commits(rows: list[Row]) -> str:
    """`"commit 1f2e"`, or which methods' rows come from which commit."""
    of: dict[str, list[str]] = {}
    for row in rows:
        methods = of.setdefault(row["commit"], [])
        if row["method"] not in methods:
            methods.append(row["method"])
    if len(of) == 1:
        return f"commit {next(iter(of))}"
    return "commits " + ", ".join(f"{commit} ({' and '.join(methods)})" for commit, methods in of.items())
