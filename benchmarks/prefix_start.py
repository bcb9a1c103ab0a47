"""What a prefix gains by where it starts: a text's own keys and values, random ones, or zeros, at equal steps.

    python benchmarks/prefix_start.py --model ../shared/models/stories260k \\
        --data ../shared/data/shakespeare/tiny_shakespeare.txt --epochs 0.1 0.25 0.5 1 3 --results results/prefix_start

The runs are those of `compare`, the defaults but for `init`, and resumed where they stopped. Gain is what training
takes off the base's held-out loss, or adds to its accuracy. `--results`: a folder for the rows and the table.
"""

import argparse
import json
import statistics
from pathlib import Path
from typing import Any

from lora_kit import Prefix, compare

STARTS = ("random", "text", "zero")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model")
    parser.add_argument("--data")
    parser.add_argument("--train-rows", type=int)
    parser.add_argument("--epochs", nargs="+", type=float, default=[3.0], help="each is a run of its own")
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--starts", nargs="+", default=list(STARTS), help="random first: the others are set against it")
    parser.add_argument("--output", default="runs/prefix-start")
    parser.add_argument("--results")
    arguments = parser.parse_args()

    rows: list[dict[str, Any]] = []
    for epochs in arguments.epochs:
        for start in arguments.starts:
            found = compare(
                arguments.model,
                arguments.data,
                methods=[Prefix(init=start)],
                quantizations=["16bit"],
                seeds=arguments.seeds,
                epochs=epochs,
                train_rows=arguments.train_rows,
                output=arguments.output,
            )
            rows += [row for row in found.rows if row["status"] == "ok"]
        print(report(rows), flush=True)
    if arguments.results:
        folder = Path(arguments.results)
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "starts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        (folder / "report.md").write_text(report(rows))


def report(rows: list[dict[str, Any]]) -> str:
    """The table: steps × starts; gains beside the first start's at equal steps."""
    groups: dict[tuple[int, str], list[dict[str, Any]]] = {}
    for row in rows:
        groups.setdefault((row["steps"], row["options"]["init"]), []).append(row)
    name = rows[0]["metric"]
    lines = [f"| steps | start | {name} before | {name} after | gain | of {rows[0]['options']['init']}'s |"]
    lines.append("|---" * 6 + "|")
    gains: dict[tuple[int, str], float] = {}
    for (steps, start), group in groups.items():
        before = statistics.fmean(row["before"][name] for row in group)
        after = statistics.fmean(row["after"][name] for row in group)
        gains[steps, start] = before - after if name == "loss" else after - before
        share = gains[steps, start] / gains[steps, rows[0]["options"]["init"]]
        lines.append(f"| {steps} | {start} | {before:.3f} | {after:.3f} | {gains[steps, start]:.3f} | {share:.2f} |")
    first = rows[0]
    versions = ", ".join(f"{package} {version}" for package, version in first["versions"].items())
    count = len({row["seed"] for row in rows})
    seeds = "one seed" if count == 1 else f"{count} seeds"
    about = (
        f"Model {first['model']}, data {first['data']}; {first['size']}, learning rate {first['learning_rate']:g}, "
        f"{seeds}; {first['machine']['device']}; {versions}; commit {first['commit']}."
    )
    return "# What a prefix gains by where it starts\n\n" + "\n".join(lines) + f"\n\n{about}\n"


if __name__ == "__main__":
    main()
