"""Sweeps: points, the front, the plot, and plans that replay."""

import json
from pathlib import Path
from xml.etree import ElementTree

import pytest
from hypothesis import given
from hypothesis import strategies as st

import fourfold
from fourfold.compiler.errors import DataError, RecipeError
from fourfold.compiler.front_plot import draw
from fourfold.compiler.sweep import Front, Point, marked, sweep

DIGITS = Path(fourfold.__path__[0]) / "examples" / "digits"
MODEL, CALIB, CHECK = DIGITS / "digits.onnx", DIGITS / "calib.npz", DIGITS / "check.npz"


@pytest.fixture(scope="module")
def swept(tmp_path_factory):
    """(folder, front) of a sweep over three widths."""
    out = tmp_path_factory.mktemp("sweep") / "out"
    return out, sweep(MODEL, out, CALIB, CHECK, 3, signals=("quantization-error",), jobs=1)


def test_points_run_from_the_source_to_the_narrowest(swept):
    _, front = swept
    assert [p.name for p in front.points] == ["source", "8.00 bits", "5.00 bits", "2.00 bits"]
    assert front.points[0].sqnr_db == float("inf")
    assert front.points[0].bytes == MODEL.stat().st_size
    sizes = [p.bytes for p in front.points]
    assert sizes == sorted(sizes, reverse=True)
    for point, asked in zip(front.points[1:], (8, 5, 2), strict=True):
        assert point.average_bits <= asked + 1e-9
        assert point.metric == "top1"
        assert point.seconds > 0
        assert point.drop == pytest.approx(front.points[0].score - point.score)


def test_the_folder_holds_front_plot_and_plans(swept):
    out, front = swept
    assert Front.model_validate(json.loads((out / "front.json").read_text())) == front
    root = ElementTree.parse(out / "front.svg").getroot()
    assert root.tag.endswith("svg")
    text = "".join(root.itertext())
    assert all(label in text for label in ("8.00", "5.00", "2.00", "source", "MB of all files"))
    assert sorted(p.name for p in (out / "plans").iterdir()) == [
        "2.00.json",
        "5.00.json",
        "8.00.json",
    ]


def test_a_point_is_made_again_from_its_plan(swept, tmp_path):
    out, front = swept
    point = front.points[2]
    artifact = fourfold.compile(MODEL, tmp_path / "out", CALIB, plan=out / point.plan)
    (report,) = artifact.report.targets
    assert report.file_bytes == point.bytes
    assert report.decision.average_bits == pytest.approx(point.average_bits)


def test_the_same_front_draws_the_same_bytes(swept, tmp_path):
    _, front = swept
    for name in ("first", "second"):
        draw(front, tmp_path / f"{name}.svg")
    assert (tmp_path / "first.svg").read_bytes() == (tmp_path / "second.svg").read_bytes()


def test_a_front_without_a_metric_is_drawn_by_decibels(swept, tmp_path):
    _, front = swept
    bare = {"metric": None, "score": None, "drop": None}
    points = tuple(p.model_copy(update=bare) for p in front.points)
    draw(front.model_copy(update={"points": points}), tmp_path / "front.svg")
    assert "SQNR of the outputs" in (tmp_path / "front.svg").read_text()


@pytest.mark.parametrize(
    ("points", "options", "error", "message"),
    [
        (1, {}, RecipeError, "at least 2"),
        (3, {"targets": ("cpu", 'cpu{isa="avx2"}')}, RecipeError, "one target"),
        (3, {"precision": "w8a8"}, RecipeError, "leave out --precision w8a8"),
        (3, {"max_size": 10}, RecipeError, "leave out"),
        (3, {"recipe": "tidy"}, RecipeError, "leave out"),
        (3, {"check": False}, DataError, "leave out --no-check"),
    ],
)
def test_what_a_sweep_cannot_take(points, options, error, message, tmp_path):
    with pytest.raises(error, match=message):
        sweep(MODEL, tmp_path / "out", CALIB, CHECK, points, **options)
    assert not (tmp_path / "out").exists()


def point(size, ratio, drop):
    return Point(
        name="p", average_bits=4.0, bytes=size, seconds=1.0, ratio=ratio, sqnr_db=20.0,
        metric="top1", score=0.0, drop=drop,
    )  # fmt: skip


def test_the_front_by_hand():
    points = [point(10, 1.0, 0.0), point(5, 1.0, 1.0), point(6, 1.0, 1.0), point(6, 2.0, 1.0)]
    assert [p.front for p in marked(points)] == [True, True, False, True]


def test_times_that_are_nearly_the_same_decide_nothing():
    better, worse = point(5, 1.0, 0.0), point(6, 1.01, 0.0)
    assert [p.front for p in marked([better, worse])] == [True, False]


POINTS = st.lists(
    st.builds(
        point,
        st.integers(1, 9),
        st.sampled_from([1.0, 2.0, 4.0]),
        st.sampled_from([0.0, 1.0, 2.0]),
    ),
    min_size=1,
    max_size=12,
)


@given(POINTS)
def test_every_point_off_the_front_is_beaten_by_one_on_it(points):
    found = marked(points)
    front = [p for p in found if p.front]
    assert front
    for one in found:
        beaten = [
            p for p in front
            if p.bytes <= one.bytes and p.ratio >= one.ratio and p.drop <= one.drop
            and (p.bytes, p.ratio, p.drop) != (one.bytes, one.ratio, one.drop)
        ]  # fmt: skip
        assert one.front != bool(beaten)
