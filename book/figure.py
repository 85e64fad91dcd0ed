"""Draw the README's figures, book/images/oracle.png and cost.png, from the records in data/results/h100.

Usage: python book/figure.py
"""

from __future__ import annotations

from pathlib import Path

import hybridlib as hl
from hybridlib.report.oracle import landscape
from hybridlib.report.selector_plots import quality_and_cost
from hybridlib.study import contest, oracle

SELECTORS = ("ga-s2", "gate-gradient", "ga-s1", "uniform", "first")


def main():
    ledger, folder = hl.Ledger(hl.results_folder("h100")), Path(__file__).resolve().parent / "images"
    records, choices = oracle.recorded_oracle(ledger, "gdn")
    contests = contest.recorded_contests(ledger)
    if not records or not contests:
        raise SystemExit("data/results/h100 has no record of the oracle or of a contest; run notebooks/oracle.ipynb "
                         "and notebooks/selectors.ipynb on a GPU first")
    folder.mkdir(exist_ok=True)
    table = oracle.oracle_table(records)
    landscape(table, oracle.judge(table, choices), selectors=SELECTORS).savefig(folder / "oracle.png")
    quality_and_cost(contests[0], "kl", log=True).savefig(folder / "cost.png")


if __name__ == "__main__":
    main()
