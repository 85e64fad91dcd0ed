"""The figures: what they show is what was given, they read in grey, and they leave matplotlib as it was."""

import io

import matplotlib as mpl
import numpy as np
import pandas as pd
import pytest
from matplotlib.collections import LineCollection
from matplotlib.colors import same_color, to_rgb
from matplotlib.figure import Figure

from hybridlib.report import plots, style, tables
from hybridlib.selection.agreement import interval, spearman

SCORES = np.random.default_rng(0).normal(-0.5, 0.02, (3, 9))
FRAME = pd.DataFrame([{"selector": s, "mixer": m, "seed": i, "kl": base + 0.01 * i + 0.002 * (m == "gla")}
                      for s, base in (("ga-s2", 0.15), ("uniform", 0.18)) for m in ("gdn", "gla") for i in range(3)])


def texts(figure):
    return [t.get_text() for t in figure.axes[0].texts]


def drawn(figure):
    """Every figure made here is written as a notebook would."""
    assert isinstance(figure, Figure) and figure.get_size_inches()[0] <= 7
    assert figure._repr_png_()[:4] == b"\x89PNG"
    return figure


def test_layer_scores_show_means_and_t_intervals():
    figure = drawn(plots.layer_scores({"GDN": SCORES, "GLA": SCORES[:, ::-1]}, "importance (nats)",
                                      keep={"GDN": [1, 4], "GLA": ()}))
    axes = figure.axes[0]
    kept, hollow = [line for line in axes.lines if line.get_marker() == "o"]
    assert np.allclose(kept.get_ydata(), SCORES.mean(0)[[1, 4]]) and len(hollow.get_xdata()) == 7
    assert same_color(hollow.get_markerfacecolor(), "white") and not same_color(kept.get_markerfacecolor(), "white")
    bars = [c for c in axes.collections if isinstance(c, LineCollection)][0].get_segments()
    assert np.allclose([bar[:, 1] for bar in bars], [interval(column)[1:] for column in SCORES.T])
    one_seed = plots.layer_scores({"GA-S2": SCORES[0]})
    assert np.allclose(one_seed.axes[0].lines[-2].get_ydata(), SCORES[0])


def test_rank_scatter_ranks_the_highest_score_first():
    x, y = np.array([0.1, 0.9, 0.5, 0.3]), np.array([0.2, 0.8, 0.3, 0.9])
    figure = drawn(plots.rank_scatter(x, y, "GDN probe", "GLA probe", k=2))
    axes = figure.axes[0]
    points = [c for c in axes.collections if len(c.get_offsets()) == 4][0]
    assert np.array_equal(points.get_offsets(), [[4, 4], [1, 2], [2, 3], [3, 1]])
    assert [same_color(c, "white") for c in points.get_facecolors()] == [True, False, True, True]  # both keep layer 1
    assert texts(figure)[:4] == ["0", "1", "2", "3"]
    assert texts(figure)[4].startswith(f"Spearman {spearman(x, y):.2f}")


def test_comparison_shows_seeds_mean_interval_and_numbers():
    gdn = FRAME[FRAME["mixer"] == "gdn"]
    figure = drawn(plots.comparison(gdn, "kl", reference=0.1))
    axes = figure.axes[0]
    assert [t.get_text() for t in axes.get_yticklabels()] == ["ga-s2", "uniform"]
    mean, low, high = interval([0.15, 0.16, 0.17])
    assert f"{mean:.3f} [{low:.3f}, {high:.3f}]" in texts(figure) and "teacher 0.100" in texts(figure)
    seeds = [line for line in axes.lines if line.get_marker() == "."]
    assert np.allclose(seeds[0].get_xdata(), [0.15, 0.16, 0.17])
    assert axes.get_xlim()[0] < 0.1 and axes.yaxis_inverted()  # the first label is at the top
    figure = drawn(plots.comparison(FRAME, "kl", group="mixer", log=True))
    assert figure.axes[0].get_xscale() == "log"
    assert len([t for t in texts(figure) if "[" in t]) == 4


def test_layer_map_fills_each_cell_to_its_share_of_seeds():
    figure = drawn(plots.layer_map({"a": [(0, 1), (0, 2)], "b": [(3, 2)]}, 4))
    cells, filled = ([path.get_extents() for path in c.get_paths()] for c in figure.axes[0].collections)
    assert [round(box.height / 0.74, 6) for box in filled] == [1, 0.5, 0.5, 0, 0, 0, 1, 1]
    assert all(round(box.height, 6) == 0.74 for box in cells)
    for boxes in (cells, filled):
        assert [(round(box.y1 - 0.37), round(box.x0 + 0.41)) for box in boxes] == [(row, layer) for row in (0, 1)
                                                                                  for layer in range(4)]
    assert texts(figure) == ["2 of 4", "2 of 4"]


def test_agreement_matrix_prints_numbers_that_can_be_read():
    matrix = [[1, -0.004, np.nan], [0, 1, 0.4], [0.9, 0.4, 1]]
    figure = drawn(plots.agreement_matrix(["GA", "GR", "a long name"], matrix))
    assert texts(figure) == ["1.00", "0.00", "0.00", "1.00", "0.40", "0.90", "0.40", "1.00"]  # none for nan
    hatched = [p for p in figure.axes[0].patches if p.get_hatch()]
    assert len(hatched) == 1 and int(hatched[0].get_x()) == 2 and int(hatched[0].get_y()) == 0
    mesh = figure.axes[0].collections[0]
    for text in figure.axes[0].texts:
        column, row = (int(v) for v in text.get_position())
        cell = mesh.to_rgba(matrix[row][column])[:3]
        assert abs(grey(cell) - grey(to_rgb(text.get_color()))) > 0.35


def grey(colour):
    return float(np.dot(to_rgb(colour), (0.299, 0.587, 0.114)))


def test_labels_differ_without_colour():
    looks = [style.look(i) for i in range(7)]
    assert len({look["marker"] for look in looks}) == len({str(look["linestyle"]) for look in looks}) == 7
    assert all(abs(grey(a["color"]) - grey(b["color"])) > 0.1 for a, b in zip(looks, looks[1:]))


def test_matplotlib_is_left_as_it_was():
    before = {name: mpl.rcParams[name] for name in mpl.rcParams}
    with mpl.rc_context({"font.size": 20.0}):
        figure = plots.layer_map({"a": [[0]]}, 3)
        assert mpl.rcParams["font.size"] == 20.0
        # what a notebook with settings of its own draws is the same figure
        sizes = {t.get_fontsize() for t in figure.axes[0].get_xticklabels()}
        figure.savefig(io.BytesIO(), format="png")
        assert sizes == {t.get_fontsize() for t in figure.axes[0].get_xticklabels()} == {8.0}
    assert {name: mpl.rcParams[name] for name in mpl.rcParams} == before


def test_a_notebook_shows_a_figure_once():
    formatters = pytest.importorskip("IPython.core.formatters")
    import matplotlib.pyplot as plt

    figure = plots.layer_map({"a": [[0]]}, 3)
    bundle, _ = formatters.DisplayFormatter().format(figure)
    assert {"image/svg+xml", "image/png"} <= set(bundle)
    assert bundle["image/svg+xml"] == plots.layer_map({"a": [[0]]}, 3)._repr_svg_()  # drawn again, the same file
    assert plt.get_fignums() == []  # nothing left open for the end of the cell to show again


def test_as_table():
    table = tables.as_table(FRAME.assign(none=np.nan), ["selector", "mixer"], ["kl", "none"], digits=2)
    assert list(table.columns) == ["runs", "held-out KL (nats a token)", "none"] and len(table) == 4
    assert table.loc["ga-s2", "gdn"].tolist() == [3, "0.16 [0.14, 0.18]", "\u2013"]
    assert list(tables.as_table(FRAME[FRAME["seed"] == 0], "selector", ["kl"])["runs"]) == [2, 2]
    one = tables.as_table(FRAME.head(1), "selector", {"kl": "loss"})
    assert one.loc["ga-s2"].tolist() == [1, "0.150"] and list(one.columns) == ["runs", "loss"]
    regrets = pd.DataFrame({"name": "a", "kl_regret": [0.0, 0.1], "recall_exact_regret": [0.0, 0.1]})
    both = tables.as_table(regrets, "name", {"kl_regret": "kl", "recall_exact_regret": "recall"}, digits=2)
    assert both.loc["a"].tolist() == [2, "0.05 [0.00, 0.69]", "0.05 [\u22120.59, 0.69]"]  # 12.7 x 0.05


@pytest.mark.parametrize("draw, error, words", [
    (lambda: plots.comparison(FRAME, "recall"), KeyError, "recall"),
    (lambda: plots.comparison(FRAME.assign(kl=-1.0), "kl", log=True), ValueError, "above 0"),
    (lambda: plots.layer_map({"a": [(0, 6)]}, 6), ValueError, "layers holds 6; .* from 0 to 5"),
    (lambda: plots.loss_curves({"a": ([1, 2], [1.0, 0.0])}), ValueError, "not above 0"),
    (lambda: plots.rank_scatter([1, 2], [3, 4], "a", "b", k=3), ValueError, "k=3"),
    (lambda: tables.as_table(FRAME, "mixer", ["recall"]), KeyError, "recall")])
def test_bad_input_is_refused(draw, error, words):
    with pytest.raises(error, match=words):
        draw()
