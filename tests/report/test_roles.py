"""What layers do, as tables and figures: made-up records whose answers are plain to see."""

import pandas as pd
import pytest

from hybridlib.records.ledger import Record
from hybridlib.report import roles


def record(**metrics):
    points = [{"layer": l, "other": 3 - l, "open": is_open, "gate": gate, "kl": kl}
              for l, is_open, kls in ((1, False, (0.8, 0.6, 0.7)), (1, True, (0.9, 0.5, 0.2)),
                                      (2, False, (0.8, 0.7, 0.9)), (2, True, (0.7, 0.4, 0.2)))
              for gate, kl in zip((0.0, 0.5, 1.0), kls)]
    own = {"distance": [[4.0, 2.0], [1.0, 1.0], [8.0, 0.0]], "previous": [[0.1, 0.2], [0.9, 0.0], [0.1, 0.1]],
           "induction": [[0.0, 0.0], [0.1, 0.0], [0.2, 0.7]], "intact": 0.9, "silenced": [0.1, 0.2, 0.9],
           "replaced": [0.9, 0.3, 0.4], "pair": [1, 2], "gates": points} | metrics
    return Record(**dict.fromkeys(Record.__dataclass_fields__, None) | {"metrics": own, "kind": "roles"})


def test_a_layer_can_be_needed_and_yet_replaceable():
    table = roles.role_table(record())
    assert table["distance"].tolist() == [3, 1, 4] and table["previous"].tolist() == [0.2, 0.9, 0.1]
    assert table["induction"].tolist() == [0, 0.1, 0.7]
    assert table["silenced"].tolist() == pytest.approx([0.8, 0.7, 0]) and table["replaced"][0] == 0


def test_gates_say_where_kl_falls_first_and_ends_higher():
    table = roles.gate_table(record()).set_index(["layer", "other is"])
    alone = table.loc[2, "linear"]
    assert alone["slope"] == pytest.approx(-0.2) and alone["open"] > alone["closed"] and alone["at gate"] == 0.5
    assert table.loc[2, "softmax"]["lowest"] == table.loc[2, "softmax"]["open"] == 0.2


def test_hybrids_are_told_by_which_of_two_layers_they_keep_each_run_once():
    rows = [((1, 2), 0, 0.1, 0.9), ((1, 2), 0, 0.1, 0.9), ((2, 5), 0, 0.3, 0.2), ((2, 5), 1, 0.5, 0.4),
            ((0, 3), 0, 0.2, 0.0)]
    frame = pd.DataFrame([{"layers": layers, "seed": seed, "mixer": "gdn", "match_tokens": 10, "end": True, "kl": kl,
                           "recall_exact": recall} for layers, seed, kl, recall in rows])
    table = roles.pair_table(frame, (2, 1)).set_index("softmax")
    assert table["hybrids"].to_dict() == {"both": 1, "2 alone": 2, "1 alone": 0, "neither": 1}
    assert table.loc["2 alone", "kl"] == pytest.approx(0.4) and table.loc["2 alone", "highest recall"] == 0.4


def test_figures_have_a_cell_a_layer_and_a_line_a_way():
    strip, gates = roles.role_strip(roles.role_table(record()), (1,)), roles.gate_figure(record())
    assert len(strip.axes[0].collections) == len(roles.ROLES) and len(strip.axes[0].lines) == 1
    assert [len(axes.lines) for axes in gates.axes] == [2, 2]
    assert list(gates.axes[1].lines[0].get_ydata()) == [0.8, 0.7, 0.9]
