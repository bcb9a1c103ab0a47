"""How good are the default learning rates? Sweep each method's rate around its default and print the regret.

    python benchmarks/learning_rates.py --data ../shared/data/sst2 --train-rows 2000 --epochs 1 --output runs/rates-sst2

Heads keep their ratio to the rate. Regret is the best mean in the sweep minus the default's mean: what a user loses by
not sweeping. The rows are those of `compare`, appended to `rows.jsonl` in the output folder, so the sweep can be
interrupted.
"""

import argparse
import statistics

from lora_kit import METHODS, compare

FACTORS = (0.25, 0.5, 1.0, 2.0, 4.0)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model")
    parser.add_argument("--data")
    parser.add_argument("--train-rows", type=int)
    parser.add_argument("--test-rows", type=int)
    parser.add_argument("--epochs", type=float, default=3.0)
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--parameters", type=int, default=22_714_371, help="of the model, for the default rate")
    parser.add_argument("--task", default="classification", help="of the data, for the default rate")
    parser.add_argument("--methods", nargs="+", default=list(METHODS))
    parser.add_argument("--factors", nargs="+", type=float, default=list(FACTORS))
    parser.add_argument("--output", default="runs/learning-rates")
    arguments = parser.parse_args()

    print(f"{'method':8} {'rate':>9} {'factor':>7} {'mean':>7}  seeds")
    for word in arguments.methods:
        default = METHODS[word].learning_rate(arguments.parameters, arguments.task)
        means = {}
        for factor in arguments.factors:
            found = compare(
                arguments.model,
                arguments.data,
                methods=[word],
                quantizations=["16bit"],
                seeds=arguments.seeds,
                epochs=arguments.epochs,
                train_rows=arguments.train_rows,
                test_rows=arguments.test_rows,
                learning_rate=default * factor,
                output=arguments.output,
            )
            values = [row["after"][row["metric"]] for row in found.rows if row["status"] == "ok"]
            if not values:
                print(f"{word:8} {default * factor:9.2g} {factor:7g}  did not finish: {found.rows[0]['reason']}")
                continue
            lower_is_better = found.rows[0]["metric"] == "loss"
            means[factor] = statistics.fmean(values)
            listed = " ".join(f"{value:.3f}" for value in values)
            print(f"{word:8} {default * factor:9.2g} {factor:7g} {means[factor]:7.4f}  {listed}", flush=True)
        if 1.0 in means:
            best = min(means.values()) if lower_is_better else max(means.values())
            print(f"{word:8} default regret {abs(best - means[1.0]):.4f}\n", flush=True)


if __name__ == "__main__":
    main()
