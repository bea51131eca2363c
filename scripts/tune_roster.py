"""Finds the noise of each layer's router that lowers a roster's loss on a text.

    scripts/tune_roster.py OUT TEXT --samples 8 --to schedule.json [--trials 50] [--max-tau 0.5]
                           [--skip-layers 0] [--passages 40] [--unseen 160]

OUT is a conversion made with `--roster` and a tokenizer. A tree-structured Parzen estimator
(Optuna; `pip install optuna`) proposes, as in the paper (arXiv 2509.17238). The first half of the
text is what it sees; what it found is measured on the second half beside no noise and beside the
same noise in all layers. Write the schedule's name after `generate --roster N --tau-schedule`.
"""

import argparse
import json
from pathlib import Path

import optuna
from measure_roster import losses, paired_t, passages_of

from ane_moe.files import write_text
from ane_moe.loop.roster import RosterOptions
from ane_moe.loop.shards import load_shards


def main() -> None:
    arguments = parse()
    shards = load_shards(arguments.out, "reference")
    text = arguments.text.read_text()
    seen, unseen = (
        passages_of(shards, half, count)
        for half, count in (
            (text[: len(text) // 2], arguments.passages),
            (text[len(text) // 2 :], arguments.unseen),
        )
    )
    samples, skipped = arguments.samples, arguments.skip_layers
    layers = sorted(int(layer) for layer in shards.manifest.moe)
    tuned = layers[skipped : len(layers) - skipped]

    def loss(trial: optuna.Trial) -> float:
        scales = {one: trial.suggest_float(str(one), 0, arguments.max_tau) for one in tuned}
        options = RosterOptions(samples, schedule=scales, seed=0)
        lost, _ = losses(shards, seen, options, (samples,))
        return float(lost.mean())

    study = optuna.create_study(sampler=optuna.samplers.TPESampler(seed=0))
    study.enqueue_trial({str(layer): 0.1 for layer in tuned})
    study.optimize(loss, n_trials=arguments.trials)
    write_text(arguments.to, json.dumps(study.best_params, indent=2) + "\n")
    print(f"{study.best_params}, {study.best_value:.4f} nats a token on what was seen")
    found = {int(layer): scale for layer, scale in study.best_params.items()}
    for name, scales in (("found", found), ("0.1 everywhere", dict.fromkeys(tuned, 0.1))):
        options = RosterOptions(samples, schedule=scales, seed=1)
        lost, _ = losses(shards, unseen, options, (1, samples))
        change = lost[:, 1] - lost[:, 0]
        print(
            f"{name}: {lost[:, 1].mean():.4f} nats a token on the other half, "
            f"{change.mean():+.4f} of one sample's (t {paired_t(change):+.1f})"
        )


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("out", type=Path)
    parser.add_argument("text", type=Path)
    parser.add_argument("--samples", type=int, default=8)
    parser.add_argument("--to", type=Path, required=True)
    parser.add_argument("--trials", type=int, default=50)
    parser.add_argument("--max-tau", type=float, default=0.5)
    parser.add_argument("--skip-layers", type=int, default=0)
    parser.add_argument("--passages", type=int, default=40)
    parser.add_argument("--unseen", type=int, default=160)
    return parser.parse_args()


if __name__ == "__main__":
    main()
