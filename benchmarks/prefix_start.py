"""What a prefix gains by where it starts: a text's own keys and values, random ones, or zeros, at equal steps.

    python benchmarks/prefix_start.py --model ../shared/models/stories260k \\
        --data ../shared/data/shakespeare/tiny_shakespeare.txt --output benchmarks/results/prefix_start

The rows are those of `compare`, the defaults but for `init`; gain is what training takes off the held-out loss of the
base, or adds to its accuracy.
"""

import argparse
import statistics

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
    arguments = parser.parse_args()

    for epochs in arguments.epochs:
        show(arguments, epochs)


def show(arguments: argparse.Namespace, epochs: float) -> None:
    gains = {}
    print(f"{epochs:g} epochs\n{'start':8} {'steps':>6} {'before':>8} {'after':>8} {'gain':>7}  of random's")
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
        rows = [row for row in found.rows if row["status"] == "ok"]
        if not rows:
            raise SystemExit(f"{start}: {found.rows[0]['reason']}")
        name = rows[0]["metric"]
        before = statistics.fmean(row["before"][name] for row in rows)
        after = statistics.fmean(row["after"][name] for row in rows)
        gains[start] = before - after if name == "loss" else after - before
        share = gains[start] / gains[arguments.starts[0]]
        print(f"{start:8} {rows[0]['steps']:6} {before:8.4f} {after:8.4f} {gains[start]:7.4f}  {share:.2f}", flush=True)


if __name__ == "__main__":
    main()
