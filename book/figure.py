"""Draw the README's figures, book/images/oracle.png and cost.png, from the records in data/results/h100.

Usage: python book/figure.py
"""

from __future__ import annotations

from pathlib import Path

import hybridlib as hl
from hybridlib.report import contest as contest_report, oracle as oracle_report, selector_plots
from hybridlib.study import contest, oracle

SHOWN = ("ga-s2", "gate-gradient", "ga-s1", "uniform", "first")


def main():
    ledger, folder = hl.Ledger(hl.results_folder("h100")), Path(__file__).resolve().parent / "images"
    records, choices = oracle.recorded_oracle(ledger, "gdn")
    found = contest.recorded_contest(ledger)
    if not records or found is None:
        raise SystemExit("data/results/h100 has no record of the oracle or of a contest; run notebooks/oracle.ipynb "
                         "and notebooks/selectors.ipynb on a GPU first")
    judged = oracle.judge(records, choices)
    titles = {name: hl.SELECTORS[name].title for name in SHOWN}
    judged = judged.assign(selector=judged["selector"].replace(titles))
    folder.mkdir(exist_ok=True)
    oracle_report.landscape(oracle.oracle_table(records), judged, selectors=tuple(titles.values())).savefig(
        folder / "oracle.png")
    selector_plots.quality_and_cost(found.chosen, "kl", "flops", contest_report.front(found, "kl"), log=True,
                                    ylabel="held-out KL (nats a token)",
                                    xlabel="FLOPs of choosing (estimated)").savefig(folder / "cost.png")


if __name__ == "__main__":
    main()
