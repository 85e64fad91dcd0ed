"""Tables of scoring loops, from made-up records and from the committed ones."""

import pandas as pd
import pytest

import hybridlib as hl
from hybridlib.bench.scoring import recorded_scoring_speed
from hybridlib.report import scoring


def frame(values, seconds, tokens=(8000, 2000), reached=500):
    common = {"aligned": {"teacher": "lab"}, "device": "a GPU", "num_tokens": 1000, "heldout_tokens": 64, "group": 1,
              "reason": None, "peak_bytes": None, "settings": {"attention_learning_rate": 1e-3}}
    plain = common | {"loop": "plain", "early_stop": None, "seconds": 60.0, "tokens": tokens[0],
                      "values": [8, 7, 6, 5, 4, 3, 2, 1], "history_tokens": [1000]}
    return pd.DataFrame([plain, common | {"loop": "engine", "seconds": seconds, "tokens": tokens[1], "values": values,
                                          "history_tokens": [250, reached], "early_stop": {"budget": 0.25}}])


@pytest.mark.parametrize(("values", "jaccards"), [
    ([9, 7, 6, 5, 4, 3, 2, 1], ["1.00", "1.00", "1.00"]), ([7, 8, 6, 5, 4, 3, 2, 1], ["0.00", "1.00", "1.00"]),
    ([8, 5, 6, 7, 4, 3, 2, 1], ["1.00", "0.33", "1.00"])])
def test_every_loop_is_compared_with_the_plain_one(values, jaccards):
    both = frame(values, 10.0)
    plain = both.iloc[0].to_dict()
    rows = pd.DataFrame([*both.to_dict("records"), plain | {"loop": "shared", "seconds": 12.0},
                         plain | {"loop": "together", "reason": "no memory left"}])
    table = scoring.engine_table([rows])
    assert list(table.index.get_level_values("loop")) == [scoring.ENGINES[loop] for loop in rows["loop"]]
    assert table["seconds"].tolist() == ["60.0", "10.0", "12.0", "could not run: no memory left"]
    assert table["times as fast"].tolist() == ["1.00", "6.00", "5.00", "\u2013"]
    assert table[[f"Jaccard at {share}%" for share in ("12.5", "25", "50")]].iloc[1].tolist() == jaccards
    assert table["last measured after"].tolist() == ["1,000", "500", "1,000", "\u2013"]
    assert scoring.engine_table([both[1:], both])["times as fast"].tolist() == ["\u2013", "1.00", "6.00"]
    assert scoring.engine_table([pd.DataFrame()]).empty


def test_workers_are_compared_with_one_process():
    plain = frame([8, 7, 6, 5, 4, 3, 2, 1], 10.0).iloc[0].to_dict()
    rows = [plain | {"loop": "shared", "seconds": 30.0},
            plain | {"loop": "workers", "seconds": 20.0, "start_seconds": 1.0, "workers": 2,
                     "values": [8.5, 7, 6, 5, 4, 3, 2, 1]}]
    table = scoring.worker_table([pd.DataFrame(rows), pd.DataFrame(rows[:1])])
    assert table.loc["lab"].tolist() == ["1,000", "0.001", 2, "20.0", "1.0", "30.0", "1.50", "1.00", "1.00", "1.00",
                                         "1.00", "0.5"]
    assert scoring.worker_table([]).empty


@pytest.mark.parametrize(("points", "tokens", "expected"), [
    ([100, 200, 300], 2400, ["20%", "70%", "1,000", "0.001", "30%", "0.33"]),
    ([500, 1000], 8000, ["not before the end", "0%", "1,000", "0.001", "100%", "0.33"])])
def test_early_stopping_is_set_beside_what_was_reported_of_it(points, tokens, expected):
    rows = frame([8, 5, 7, 6, 4, 3, 2, 1], 10.0, (8000, tokens))
    rows["history_tokens"] = [[1000], points]
    rows["early_stop"] = [None, {"budget": 0.25, "window": 2}]
    table = scoring.early_stop_table([rows, rows[:1]])
    assert table.loc["reported", ["settled", "tokens saved"]].tolist() == ["25% to 40%", "58% to 74%"]
    assert len(table) == 2 and table.loc["lab"].tolist() == expected


def test_the_committed_comparisons_are_read_and_shown():
    frames = recorded_scoring_speed(hl.Ledger(hl.results_folder("h100")))
    assert len(frames) >= 3 and len(scoring.engine_table(frames)) == sum(map(len, frames))
    assert len(scoring.early_stop_table(frames)) == 1 + len(frames)
    assert len(scoring.worker_table(recorded_scoring_speed(hl.Ledger(hl.results_folder("two_h100"))))) == 2
