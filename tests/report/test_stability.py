"""How far rankings repeat themselves: made-up records of candidates with known correlations."""

import numpy as np
import pytest

from hybridlib.records.ledger import Record
from hybridlib.report import stability, stability_plots
from hybridlib.selection.agreement import chance_jaccard

UP = np.arange(1.0, 11.0)
SWAPPED = UP.copy()
SWAPPED[[0, 5]] = SWAPPED[[5, 0]]  # ranks of two layers differ by 5: 1 - 6 x 50 / 990
RHO = 1 - 6 * 50 / 990


class Records(list):
    """Records in memory."""

    def add(self, kind, parameters, metrics, device="A"):
        self.append(Record(kind, parameters, metrics, parameters["seed"], {}, device, None, "", 1.0, None, ""))

    def add_run(self, kl, seed=0, direction="add", rate=1e-3, curve=None, device="A", rose=None, rows=None, **settings):
        """The candidates of one seed, (layers,), with curves {tokens: kl}."""
        aligned = {"teacher": "tiny", "num_tokens": 256, "mixer": "gdn", "seed": seed, "data": f"d{seed}"}
        regime = settings or {"attention_learning_rate": rate, "grouping": "attention"}
        for layer, value in enumerate(kl):
            metrics = {"kl": float(value), "tokens": 64, "curve": [
                {"tokens": tokens, "kl": float(values[layer])} for tokens, values in (curve or {}).items()]}
            metrics |= {} if rose is None else {"rose": bool(rose[layer])}
            metrics |= {} if rows is None else {"kl_rows": [float(row[layer]) for row in rows]}
            self.add("candidate", {"aligned": aligned, "mixer": "gdn", "seed": seed, "heldout_tokens": 64,
                                   "direction": direction, "metric": "kl", "num_tokens": 64, "layer": layer,
                                   "settings": {"learning_rate": 1e-5, **regime}}, metrics, device)


@pytest.fixture
def ledger():
    return Records()


def of(frame, **index):
    return frame.reset_index().query(" and ".join(f"{name} == {value!r}" for name, value in index.items())).iloc[0]


def test_repetition_is_the_agreement_of_seeds_in_rank_and_best_layers(ledger):
    ledger.add_run(UP, curve={0: UP[::-1]})
    ledger.add_run(SWAPPED, seed=1, curve={0: UP[::-1]})
    ledger.add_run(UP, direction="remove")  # one seed repeats nothing
    table = stability.repetition(stability.candidate_points(ledger), 2)
    assert len(table) == 2 and set(table["seeds"]) == {2}
    start, end = of(table, tokens=0), of(table, tokens=64)
    assert start["spearman"] == start["jaccard"] == 1 and end["spearman"] == pytest.approx(RHO)
    assert end["jaccard"] == 1 / 3 and end["chance"] == chance_jaccard(10, 2)  # {0, 1} and {1, 5}
    assert end["spearman_low"] < RHO < end["spearman_high"] and end["end"] and not start["end"]


def test_devices_regimes_and_older_records_are_never_mixed(ledger):
    ledger.add_run(UP)
    ledger.add_run(SWAPPED, seed=1, device="B")
    ledger.add_run(UP, seed=1, rate=1e-4)
    ledger.add_run(UP, seed=1, mixer_learning_rate=1e-3)
    points = stability.candidate_points(ledger)
    assert stability.repetition(points, 2).empty
    assert points["setting"].nunique() == 2 and set(points["grouping"]) == {"attention", "mixers"}
    with pytest.raises(ValueError, match="2 of setting; a figure shows one"):
        stability_plots.token_curves(stability.risen(points), "candidates", "candidates")


def test_settling_tells_noise_from_a_ranking_that_misleads(ledger):
    for seed, end in enumerate((UP, SWAPPED)):
        ledger.add_run(end, seed=seed, curve={16: UP, 32: UP[::-1]})
    table = stability.settling(stability.candidate_points(ledger), 2)
    early, late = of(table, tokens=16), of(table, tokens=32)
    assert early["spearman"] == pytest.approx((1 + RHO) / 2) and early["share"] == (1 + 1 / 2) / 2
    assert early["other_seed"] == pytest.approx((1 + RHO) / 2)
    assert early["corrected"] == pytest.approx((1 + RHO) / 2 / RHO ** 0.5)
    assert late["spearman"] < -0.6 and late["share"] == 0 and late["corrected"] < -0.6


def test_candidates_above_their_start_are_counted_where_records_allow(ledger):
    half = np.arange(10) < 5
    ledger.add_run(UP, curve={0: np.where(half, UP / 2, UP * 2)}, rose=half)
    ledger.add_run(UP * 4, rate=1e-2)  # its untrained KL is that of the other rate
    ledger.add_run(UP[:3], direction="remove")
    table = stability.risen(stability.candidate_points(ledger))
    slow, fast, removed = (of(table, selector=name, rate=rate) for name, rate in (
        ("GA-S2", 1e-3), ("GA-S2", 1e-2), ("GR-S2", 1e-3)))
    assert list(slow[["candidates", "rose", "compared", "above", "above_share"]]) == [10, 5, 10, 5, 0.5]
    assert fast["above"] == 10 and np.isnan(fast["rose"]) and fast["change"] == pytest.approx(4)  # 8 and 2, halfway
    assert removed["candidates"] == 3 and removed["compared"] == 0 and np.isnan(removed["above"])
    missing = of(stability.coverage(stability.candidate_points(ledger)), selector="GR-S2")
    assert missing["layers"] == 3 and missing["tokens"] == (64,)


def test_early_figures_on_fewer_rows_are_compared_on_these(ledger):
    rows = np.array([UP, 3 * UP])
    ledger.add_run(rows.mean(0), rows=rows, curve={0: UP * 1.5})
    for record in ledger:  # on the first row, where it is above
        record.metrics["curve"][0]["kl_rows"] = [record.metrics["curve"][0]["kl"]]
    table = stability.risen(stability.candidate_points(ledger))
    assert of(table, tokens=64)["above"] == 0 and of(table, tokens=64)["change"] == pytest.approx(1 / 1.5 - 1)


def test_noise_and_spread_are_recovered_and_foretell_the_agreement(ledger):
    draw, layers = np.random.default_rng(0), 400
    truth = draw.normal(0, 0.2, layers)
    for seed in range(3):
        kl = np.exp(seed + truth + draw.normal(0, 0.1, layers))
        rows = kl * (1 + draw.normal(0, 0.3, (1, layers)) * np.array([[1.0], [-1.0]]))
        ledger.add_run(kl, seed=seed, rows=rows)
    table = stability.noise(stability.candidate_points(ledger))
    seeds, text = of(table, source="seeds"), of(table, source="text")
    assert seeds["noise"] == pytest.approx(0.1, rel=0.1) and seeds["spread"] == pytest.approx(0.2, rel=0.1)
    assert seeds["reliability"] == pytest.approx(0.8, abs=0.04) and seeds["seeds_for"] == 3
    assert seeds["predicted"] == pytest.approx(seeds["observed"], abs=0.04)
    assert text["noise"] == pytest.approx(0.3, rel=0.1) and np.isnan(text["observed"])


def test_all_tables_and_figures_are_made_of_whatever_is_there(ledger):
    empty = stability.tables_of(stability.candidate_points(ledger), 0.25)
    assert all(stability.readable(frame).empty for frame in empty.values())
    ledger.add_run(UP, curve={0: UP[::-1], 16: UP})
    frames = stability.tables_of(stability.candidate_points(ledger), 2)
    drawn = stability_plots.figures(frames)
    assert {name: len(figures) for name, figures in drawn.items()} == {
        "repetition": 0, "settling": 2, "risen": 1, "noise": 0}
    ledger.add_run(SWAPPED, seed=1, curve={0: UP[::-1], 16: UP})
    ledger.add("score", {"aligned": {"teacher": "tiny", "num_tokens": 256, "mixer": "gdn", "seed": 0, "data": "d0"},
                         "mixer": "gdn", "seed": 0, "heldout_tokens": 64, "selector": "gate-gradient", "at": 0.0,
                         "order": 1, "steps": 1, "share": 0.05, "score_tokens": 64}, {"values": list(UP)})
    frames = stability.tables_of(stability.candidate_points(ledger), 2)
    assert all(stability_plots.figures(frames).values())
    shown = stability.readable(frames["law"])
    assert [key[0] for key in shown.index] == ["GA-S2", "gate gradient"]
    assert shown["Spearman"].iloc[0].startswith("0.70 [") and shown["Spearman"].iloc[1] == "\u2013"
