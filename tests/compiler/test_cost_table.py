import json
import math
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from fourfold.compiler import cost_table
from fourfold.compiler.cost_table import FLOAT, CostTable
from fourfold.compiler.costs import Workload, multiply_adds
from fourfold.compiler.errors import DataError

EMPTY = CostTable("a machine", "a runtime 1.0", "vnni")
SAME = Workload("MatMul", (8, 8), (4, 8))

FORMS = (FLOAT, "int8", "int4 per_block(0,32)")
SIZE = st.integers(1, 4096)
SECONDS = st.floats(1e-9, 1e3)


@st.composite
def products(draw):
    inner, outer, rows = draw(SIZE), draw(SIZE), draw(SIZE)
    if draw(st.booleans()):
        return Workload("MatMul", (inner, outer), (1, rows, inner))
    return Workload("Gemm", (outer, inner), (rows, inner), (("transB", 1),))


@st.composite
def convolutions(draw):
    rank = draw(st.integers(1, 2))
    group, inner, outer = (draw(st.integers(1, 3)) for _ in range(3))
    attributes = {"group": group, "strides": (draw(st.integers(1, 3)),) * rank}
    attributes |= draw(st.sampled_from([{}, {"pads": (1,) * 2 * rank}, {"auto_pad": "VALID"}]))
    size = draw(st.integers(1, 9))
    return Workload(
        "Conv",
        (outer * group, inner, *(3,) * rank),
        (draw(SIZE), inner * group, *(size,) * rank),
        tuple(sorted(attributes.items())),
    )


@st.composite
def tables(draw):
    works = draw(st.lists(st.one_of(products(), convolutions()), max_size=6, unique=True))
    entries = {}
    for work in works:
        for form in draw(st.sets(st.sampled_from(FORMS), min_size=1)):
            entries[work, form] = draw(SECONDS)
    return replace(EMPTY, entries=entries)


@given(tables())
def test_a_table_survives_its_text(table):
    text = table.to_json()
    assert CostTable.from_json(text, "here") == table
    turned = replace(table, entries=dict(reversed(table.entries.items())))
    assert turned.to_json() == text


@given(tables())
def test_what_was_measured_is_returned_as_it_is(table):
    for (work, form), seconds in table.entries.items():
        assert table.seconds(work, form) == (seconds, True)


@given(tables(), products(), st.sampled_from(FORMS))
def test_an_estimate_carries_a_ratio_over(table, work, form):
    assume((work, form) not in table.entries)
    found, floats = table.seconds(work, form), table.seconds(work, FLOAT)
    ratios = [
        seconds / table.entries[one, FLOAT]
        for (one, other), seconds in table.entries.items()
        if other == form and one.op_type == work.op_type and (one, FLOAT) in table.entries
    ]
    if not ratios:
        assert found is None
        return
    seconds, exact = found
    assert not exact
    assert any(math.isclose(seconds, floats[0] * ratio) for ratio in ratios)
    assert table.seconds(work, form) == found


@given(products(), st.floats(1e-6, 1), st.floats(0.1, 10))
def test_a_single_neighbour_gives_its_ratio_and_its_speed(work, floats, ratio):
    other = Workload(work.op_type, (64, 64), (3, 64))
    entries = {(other, FLOAT): floats, (other, "int8"): floats * ratio}
    table = EMPTY.with_entries(entries)
    share = multiply_adds(work) / multiply_adds(other)
    assume(work != other)
    assert table.seconds(work, FLOAT) == (pytest.approx(floats * share), False)
    assert table.seconds(work, "int8") == (pytest.approx(floats * share * ratio), False)
    table = table.with_entries({(work, FLOAT): 5.0})
    assert table.seconds(work, "int8") == (pytest.approx(5.0 * ratio), False)


def test_the_nearest_is_taken():
    def product(rows, inner, outer):
        return Workload("MatMul", (inner, outer), (rows, inner))

    entries = {}
    for work, ratio in ((product(1, 512, 512), 0.1), (product(128, 512, 512), 3.0)):
        entries |= {(work, FLOAT): 1e-3, (work, "int8"): ratio * 1e-3}
    table = EMPTY.with_entries(entries)
    for rows, ratio in ((2, 0.1), (8, 0.1), (16, 3.0), (1000, 3.0)):
        work = product(rows, 500, 600)
        seconds = table.seconds(work, "int8")[0]
        assert seconds == pytest.approx(ratio * table.seconds(work, FLOAT)[0])


def test_a_neighbour_is_of_the_same_kind():
    def conv(weight, given, **attributes):
        return Workload("Conv", weight, given, tuple(attributes.items()))

    dense = conv((32, 32, 3, 3), (1, 32, 14, 14))
    depthwise = conv((32, 1, 3, 3), (1, 32, 14, 14), group=32)
    grouped = conv((32, 4, 3, 3), (1, 32, 14, 14), group=8)
    line = conv((32, 32, 3), (1, 32, 14))
    for known in (dense, depthwise, grouped, line):
        table = EMPTY.with_entries({(known, FLOAT): 1e-3, (known, "int8"): 2e-3})
        for other in (dense, depthwise, grouped, line):
            assert (table.seconds(other, "int8") is None) == (other != known)
        wider = replace(known, input=(2, *known.input[1:]))
        assert table.seconds(wider, "int8") == (pytest.approx(4e-3), False)


def test_a_form_without_its_float_time_tells_nothing():
    table = EMPTY.with_entries({(SAME, "int8"): 1.0})
    other = replace(SAME, input=(5, 8))
    assert table.seconds(SAME, "int8") == (1.0, True)
    assert table.seconds(other, "int8") is None
    assert table.seconds(other, FLOAT) is None


def test_shapes_that_do_not_fit_have_no_time():
    table = EMPTY.with_entries({(SAME, FLOAT): 1.0})
    assert table.seconds(replace(SAME, weight=(8,)), FLOAT) is None
    assert table.seconds(replace(SAME, op_type="Gemm", input=(1, 4, 8)), FLOAT) is None


def test_more_entries_replace_older_ones_in_a_new_table():
    first = EMPTY.with_entries({(SAME, FLOAT): 1.0, (SAME, "int8"): 2.0})
    second = first.with_entries({(SAME, FLOAT): 3.0})
    assert (first.seconds(SAME, FLOAT), second.seconds(SAME, FLOAT)) == ((1.0, True), (3.0, True))
    assert second.entries == {(SAME, FLOAT): 3.0, (SAME, "int8"): 2.0}
    assert (second.machine, second.runtime, second.isa) == (
        first.machine,
        first.runtime,
        first.isa,
    )


def row(**changes):
    good = {"op": "MatMul", "weight": [8, 8], "input": [4, 8], "attributes": {}}
    return {**good, "seconds": {"float": 1.0}, **changes}


def content(*rows, **changes):
    head = {"machine": "m", "runtime": "r 1", "isa": "vnni"}
    return json.dumps({**head, "entries": list(rows), **changes})


BAD = {
    "no json": "{",
    "nothing": "",
    "no object": "[]",
    "deep": "[" * 100_000,
    "unknown field": content(row(), author="me"),
    "no machine": content(row(), machine=None),
    "long name": content(row(), machine="m" * 1000),
    "unknown row field": content(row(unit="ms")),
    "zero seconds": content(row(seconds={"float": 0.0})),
    "negative seconds": content(row(seconds={"float": 1.0, "int8": -1e-6})),
    "infinite seconds": content(row(seconds={"float": math.inf})),
    "no number": content(row(seconds={"float": math.nan})),
    "seconds as text": content(row(seconds={"float": "1.0"})),
    "no seconds": content(row(seconds={})),
    "half a channel": content(row(weight=[8, 1.5])),
    "negative size": content(row(weight=[8, -8])),
    "huge size": content(row(weight=[8, 10**30])),
    "high rank": content(row(weight=[1] * 100)),
    "unknown attribute": content(row(attributes={"alpha": 2})),
    "stride of zero": content(row(attributes={"strides": [0, 1]})),
    "shapes that do not fit": content(row(op="Gemm", input=[2, 4, 8])),
    "unknown operator": content(row(op="Softmax")),
    "twice": content(row(), row(seconds={"int8": 1.0})),
}


@pytest.mark.parametrize("name", BAD)
def test_a_bad_file_is_refused_by_name(name, tmp_path):
    path = tmp_path / "costs.json"
    path.write_text(BAD[name])
    with pytest.raises(DataError, match=r"costs\.json: not a table of costs: .*delete the file"):
        CostTable.read(path)


def test_a_good_file_is_read(tmp_path):
    path = tmp_path / "costs.json"
    path.write_text(content(row(), row(input=[5, 8], seconds={"float": 2, "int8": 1e-5})))
    table = CostTable.read(path)
    assert table.seconds(SAME, FLOAT) == (1.0, True)
    assert table.seconds(replace(SAME, input=(5, 8)), "int8") == (1e-5, True)


def test_a_file_that_is_too_big_is_not_read(tmp_path, monkeypatch):
    monkeypatch.setattr(cost_table, "LARGEST", 100)
    path = tmp_path / "costs.json"
    path.write_text(content() + " " * 100)
    with pytest.raises(DataError, match=r"costs\.json: .*exceeds 100 bytes"):
        CostTable.read(path)


def test_a_file_that_is_not_there_is_named(tmp_path):
    with pytest.raises(DataError, match=r"costs\.json: cannot read .*no such file"):
        CostTable.read(tmp_path / "costs.json")


def test_writing_makes_the_folder_and_leaves_nothing_else(tmp_path):
    path = tmp_path / "a" / "b" / "costs.json"
    for entries in ({}, {(SAME, FLOAT): 1.0}):
        table = EMPTY.with_entries(entries)
        table.write(path)
        assert CostTable.read(path) == table
        assert list(path.parent.iterdir()) == [path]


def test_a_table_that_cannot_be_written_is_told(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    with pytest.raises(DataError, match=r"cannot write .*FOURFOLD_CACHE"):
        EMPTY.write(tmp_path / "file" / "costs.json")
    path = tmp_path / "costs.json"
    EMPTY.write(path)
    older = path.read_bytes()

    def full(*args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("pathlib.Path.replace", full)
    with pytest.raises(DataError, match="no space left"):
        EMPTY.with_entries({(SAME, FLOAT): 1.0}).write(path)
    assert path.read_bytes() == older
    assert sorted(p.name for p in tmp_path.iterdir()) == ["costs.json", "file"]


def test_many_writers_leave_a_whole_file(tmp_path):
    path = tmp_path / "costs.json"
    many = {
        index: EMPTY.with_entries(
            {(replace(SAME, input=(n + 1, 8)), FLOAT): 1.0 + index for n in range(50)}
        )
        for index in range(4)
    }
    many[0].write(path)

    def work(index):
        for _ in range(25):
            many[index].write(path)
            assert CostTable.read(path) in many.values()

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(work, many))
    assert [p.name for p in tmp_path.iterdir()] == ["costs.json"]
