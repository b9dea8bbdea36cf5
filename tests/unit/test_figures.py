"""The figures show the numbers that they were given: lines, cells, labels and thresholds are read back."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
from matplotlib.colors import to_hex
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Rectangle, StepPatch
from matplotlib.text import Text
from PIL import Image

from lce_dist.errors import RunError
from lce_dist.evaluation import figures
from lce_dist.evaluation.matrix import PAIRS, build_matrix, cells_of, report_entries
from lce_dist.evaluation.metrics import HISTOGRAM_EDGES, EmbeddingSet, PairResult

FAR = 0.01


def model(name: str, seed: int, noise: float) -> EmbeddingSet:
    labels = np.arange(100) % 10
    vectors = np.random.default_rng(0).normal(size=(10, 12))[labels]
    vectors = vectors + noise * np.random.default_rng(seed).normal(size=vectors.shape)
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    return EmbeddingSet(name, vectors.astype(np.float32), labels, np.arange(100))


@pytest.fixture(scope="module")
def matrix() -> dict[str, PairResult]:
    cells = cells_of(model("old", 1, 1.0), model("new", 2, 0.5), model("independent", 3, 0.4))
    return build_matrix(cells, (0.1, FAR))


def named_lines(figure: Figure) -> dict[str, Line2D]:
    return {str(line.get_label()): line for line in figure.axes[0].lines if not str(line.get_label()).startswith("_")}


def no_text_overlaps(figure: Figure) -> bool:
    """Whether no two texts of the drawn figure cover each other and none leaves the picture."""
    figure.canvas.draw()
    not_drawn = set()
    for axis in (axis for axes in figure.axes for axis in (axes.xaxis, axes.yaxis)):
        low, high = sorted(axis.get_view_interval())
        for tick in (*axis.get_major_ticks(), *axis.get_minor_ticks()):
            if not low - 1e-9 <= tick.get_loc() <= high + 1e-9:
                not_drawn |= {tick.label1, tick.label2}
    boxes = [
        text.get_window_extent()
        for text in figure.findobj(Text)
        if isinstance(text, Text) and text.get_visible() and text.get_text().strip() and text not in not_drawn
    ]
    width, height = figure.canvas.get_width_height()
    inside = all(b.x0 >= -1 and b.y0 >= -1 and b.x1 <= width + 1 and b.y1 <= height + 1 for b in boxes)
    apart = not any(a.overlaps(b) for i, a in enumerate(boxes) for b in boxes[:i])
    return inside and apart and len(boxes) > 4


def test_the_overlap_check_sees_an_overlap() -> None:
    figure = figures.training_curves({"a": [(0, 0.0), (1, 1.0)]}, "Title", "loss")
    assert no_text_overlaps(figure)
    figure.axes[0].text(0.5, 0.5, "one")
    figure.axes[0].text(0.5, 0.5, "two")
    assert not no_text_overlaps(figure)


class TestHeatMap:
    def test_cells_hold_their_values(self, matrix: dict[str, PairResult]) -> None:
        entries = report_entries(matrix)
        axes = figures.matrix_heat_map(entries, FAR).axes[0]
        models = ["old", "new", "independent"]
        assert [label.get_text() for label in axes.get_xticklabels()] == models
        assert [label.get_text() for label in axes.get_yticklabels()] == models
        texts = {text.get_text(): text.get_position() for text in axes.texts}
        shown: npt.NDArray[np.float64] = np.ma.filled(np.ma.asarray(axes.images[0].get_array(), dtype=float), np.nan)
        for key, (query, gallery) in PAIRS.items():
            tar = entries[key]["tar_at_far"]["0.01"]
            column, row = (models.index(gallery), models.index(query))
            assert shown[row, column] == tar
            x, y = texts[f"{tar:.4f}"]
            assert (round(x), round(y)) == (column, row)
        assert np.isnan(shown).sum() == 4
        hatched = [patch for patch in axes.patches if patch.get_hatch()]
        assert {(round(p.get_x() + 0.5), round(p.get_y() + 0.5)) for p in hatched if isinstance(p, Rectangle)} == {
            (1, 0),
            (2, 0),
            (2, 1),
            (1, 2),
        }

    @pytest.mark.parametrize(
        ("new_old", "text", "green"),
        [
            (0.61, "criterion met: new/old > old/old", True),
            (0.60, "criterion not met: new/old ≤ old/old", False),
            (0.59, "criterion not met: new/old ≤ old/old", False),
        ],
    )
    def test_criterion_is_marked_on_its_cell(self, new_old: float, text: str, green: bool) -> None:
        tars = {"old_old": 0.60, "new_old": new_old, "new_new": 0.8}
        figure = figures.matrix_heat_map({k: {"tar_at_far": {"0.01": v}, "rank1": 0.9} for k, v in tars.items()}, FAR)
        assert text in {label.get_text() for label in figure.findobj() if hasattr(label, "get_text")}
        frame = [patch for patch in figure.axes[0].patches if not patch.get_hatch()][-1]
        assert isinstance(frame, Rectangle)
        assert (round(frame.get_x() + 0.5), round(frame.get_y() + 0.5)) == (0, 1)
        red, green_part, _ = (int(to_hex(frame.get_edgecolor())[i : i + 2], 16) for i in (1, 3, 5))
        assert (green_part > red) == green

    def test_no_overlap(self, matrix: dict[str, PairResult]) -> None:
        entries = report_entries(matrix)
        assert no_text_overlaps(figures.matrix_heat_map(entries, FAR))
        assert no_text_overlaps(
            figures.matrix_heat_map({k: entries[k] for k in ("old_old", "new_old", "new_new")}, FAR)
        )

    def test_far_that_was_not_measured(self, matrix: dict[str, PairResult]) -> None:
        with pytest.raises(RunError, match=r"FAR 0\.5 was not measured for old_old; must be one of 0\.1, 0\.01"):
            figures.matrix_heat_map(report_entries(matrix), 0.5)


class TestCurvesOfPairs:
    def test_roc(self, matrix: dict[str, PairResult]) -> None:
        figure = figures.roc(matrix)
        lines = named_lines(figure)
        assert list(lines) == [" / ".join(pair) for pair in PAIRS.values()]
        for line, result in zip(lines.values(), matrix.values(), strict=True):
            np.testing.assert_array_equal(line.get_xdata(), result.roc[0])
            np.testing.assert_array_equal(line.get_ydata(), result.roc[1])
        assert figure.axes[0].get_xscale() == "log"
        assert no_text_overlaps(figure)

    def test_histograms(self, matrix: dict[str, PairResult]) -> None:
        figure = figures.similarity_histograms(matrix, FAR)
        assert len(figure.axes) == len(matrix)
        for axes, (key, result) in zip(figure.axes, matrix.items(), strict=True):
            assert f"{result.tar_at_far['0.01']:.4f}" in axes.get_title(loc="left")
            (threshold,) = axes.lines
            assert set(threshold.get_xdata()) == {result.threshold_at_far["0.01"]}  # type: ignore[arg-type]
            named = {str(p.get_label()): p for p in axes.patches if isinstance(p, StepPatch)}
            for label, counts in (("genuine", result.genuine_histogram), ("impostor", result.impostor_histogram)):
                values, edges, _ = named[label].get_data()
                np.testing.assert_array_equal(edges, HISTOGRAM_EDGES)
                assert np.sum(values * np.diff(edges)) == pytest.approx(1.0)
                np.testing.assert_allclose(values, counts / counts.sum() * 100, rtol=1e-9)
            low, high = axes.get_xlim()
            assert low < result.threshold_at_far["0.01"] < high, key
        assert no_text_overlaps(figure)

    def test_a_pair_keeps_its_colour(self, matrix: dict[str, PairResult]) -> None:
        roc = [to_hex(line.get_color()) for line in named_lines(figures.roc(matrix)).values()]
        histograms = [
            to_hex(patch.get_edgecolor())
            for axes in figures.similarity_histograms(matrix, FAR).axes
            for patch in axes.patches
            if patch.get_label() == "genuine"
        ]
        assert roc == histograms
        assert len(set(roc)) == len(PAIRS)


class TestCurvesOverSteps:
    steps = range(0, 1000, 10)

    def test_raw_and_smoothed_lines(self) -> None:
        noise = np.random.default_rng(0).normal(size=100)
        figure = figures.training_curves({"loss": list(zip(self.steps, noise.tolist(), strict=True))}, "Loss", "nats")
        raw, smooth = figure.axes[0].lines
        np.testing.assert_array_equal(raw.get_xdata(), self.steps)
        np.testing.assert_array_equal(raw.get_ydata(), noise)
        # 100 points: two on either side, fewer at the ends
        expected = [noise[max(0, i - 2) : i + 3].mean() for i in range(100)]
        np.testing.assert_allclose(np.asarray(smooth.get_ydata(), dtype=float), expected, atol=1e-12)
        assert raw.get_alpha() is not None
        assert raw.get_alpha() < 0.5  # type: ignore[operator]
        assert (figure.axes[0].get_title(), figure.axes[0].get_ylabel()) == ("Loss", "nats")
        assert figure.axes[0].get_xlabel() == "optimizer step"
        assert figure.axes[0].get_legend() is None

    def test_one_line_a_series_and_a_legend(self) -> None:
        series = {
            name: [(step, float(step)) for step in self.steps] for name in ("total", "classification", "alignment")
        }
        figure = figures.training_curves(series, "Loss terms", "loss")
        assert list(named_lines(figure)) == list(series)
        assert no_text_overlaps(figure)

    def test_short_series_are_not_smoothed_and_bad_values_are_left_out(self) -> None:
        points = [(1, 3.0), (2, float("nan")), (3, 1.0), (4, float("inf"))]
        (line,) = named_lines(figures.training_curves({"loss": points}, "Loss", "loss")).values()
        np.testing.assert_array_equal(line.get_xdata(), [1, 3])
        np.testing.assert_array_equal(line.get_ydata(), [3.0, 1.0])

    def test_overlay_tells_where_each_run_ends(self) -> None:
        curves = {
            "1 rank": [(step, 5.0) for step in self.steps],
            "2 ranks, killed and resumed at step 500": [(step, 4.25) for step in self.steps],
            "no report yet": [],
        }
        figure = figures.loss_overlay(curves, "One run on different numbers of ranks")
        assert list(named_lines(figure)) == [
            "1 rank\nends at 5",
            "2 ranks, killed and\nresumed at step 500\nends at 4.25",
            "no report yet\nno points",
        ]
        assert no_text_overlaps(figure)

    def test_more_runs_than_colours_stay_apart(self) -> None:
        curves = {f"run {i}": [(0, 1.0), (1, 0.5)] for i in range(20)}
        lines = named_lines(figures.loss_overlay(curves, "Many")).values()
        assert len({(to_hex(line.get_color()), line.get_linestyle()) for line in lines}) == 20


def test_all_save_as_png_at_150_dpi(matrix: dict[str, PairResult], tmp_path: Path) -> None:
    points = [(step, 1.0 / (step + 1)) for step in range(50)]
    drawn = {
        "heat_map": figures.matrix_heat_map(report_entries(matrix), FAR),
        "roc": figures.roc(matrix),
        "histograms": figures.similarity_histograms(matrix, FAR),
        "curves": figures.training_curves({"loss": points}, "Loss", "loss"),
        "empty": figures.training_curves({}, "Nothing", "loss"),
        "overlay": figures.loss_overlay({"a": points, "b": points}, "Loss"),
    }
    for name, figure in drawn.items():
        path = tmp_path / f"{name}.png"
        figure.savefig(path)
        with Image.open(path) as image:
            assert image.size == figure.canvas.get_width_height()
            assert image.info["dpi"] == pytest.approx((150, 150), abs=0.1)
            assert len(image.convert("RGB").getcolors(1 << 24) or []) > 20, "a blank picture"


def test_no_global_pyplot_state() -> None:
    source = Path(figures.__file__).read_text(encoding="utf-8")
    assert "pyplot" not in source.replace("No pyplot", "")
