"""A killed run goes on where it was, and takes nothing from a run that was another."""

from dataclasses import replace

import numpy as np
import onnx_ir as ir
import pytest

from fourfold.compiler import finished, notes
from fourfold.compiler.capability import Capability
from fourfold.compiler.contract import Context
from fourfold.compiler.feeds import Feeds, input_specs
from fourfold.compiler.finished import Finished
from fourfold.compiler.formats import Format, PerAxis
from fourfold.passes import round_weights
from fourfold.passes.round_weights import RoundWeights

ARRAYS = {"codes": np.arange(6, dtype=np.int8), "delta": np.ones(2)}
WEIGHTS = {"w1": 1, "w2": 1, "w3": 0}  # of the MLP: name -> axis of the output channels


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("FOURFOLD_CACHE", str(tmp_path / "cache"))


def planned(zoo, dtype="int4:3"):
    """Return the MLP with every weight planned."""
    model = zoo["mlp"]()
    for name, axis in WEIGHTS.items():
        plan = Format.parse(f"{dtype} per_axis({axis})")
        notes.write(model.graph.initializers[name], format=plan, mode="static")
    return model


def fed(model, tmp_path, seed=0, batch=8, count=24):
    x = np.random.default_rng(seed).normal(0.5, 1, (count, 16)).astype(np.float32)
    feeds = Feeds.read({"x": x}, input_specs(model), batch=batch)
    return Context(Capability("any", (21, 25), ()), tmp_path, feeds=feeds)


def stored(model):
    return {n: v.const_value.numpy().tolist() for n, v in model.graph.initializers.items()}


@pytest.fixture
def count(monkeypatch):
    """`count(stop=0)`: names of the layers that get rounded from now on, up to a kill."""
    plain = round_weights.rounded_layer

    def counting(stop=0):
        names = []

        def rounded_layer(met, *rest):
            names.append(met.layer.name)
            if len(names) == stop:
                raise KeyboardInterrupt
            return plain(met, *rest)

        monkeypatch.setattr(round_weights, "rounded_layer", rounded_layer)
        return names

    return counting


def killed(zoo, tmp_path, count, **options):
    """Run the pass up to its third layer."""
    model = planned(zoo)
    names = count(stop=3)
    with pytest.raises(KeyboardInterrupt):
        RoundWeights(method="gptq", **options).run(model, fed(model, tmp_path))
    assert names == ["w1", "w2", "w3"]


def resumed(zoo, tmp_path, count, context=None, dtype="int4:3", **options):
    """Run the pass to its end; return (layers that were rounded, the weights)."""
    model = planned(zoo, dtype)
    names = count()
    one = RoundWeights(method="gptq", **options)
    assert one.run(model, context or fed(model, tmp_path)) == 3
    return names, stored(model)


def test_a_killed_run_goes_on_where_it_was(zoo, tmp_path, count):
    names, whole = resumed(zoo, tmp_path, count, resume=False)
    assert names == ["w1", "w2", "w3"]
    killed(zoo, tmp_path, count)
    assert resumed(zoo, tmp_path, count) == (["w3"], whole)
    assert resumed(zoo, tmp_path, count) == ([], whole)
    assert resumed(zoo, tmp_path, count, resume=False) == (["w1", "w2", "w3"], whole)


def test_without_resume_nothing_is_kept(zoo, tmp_path, count):
    killed(zoo, tmp_path, count, resume=False)
    assert not (tmp_path / "cache").exists()
    assert resumed(zoo, tmp_path, count)[0] == ["w1", "w2", "w3"]


def test_another_run_takes_nothing(zoo, tmp_path, count):
    killed(zoo, tmp_path, count)
    context = fed(zoo["mlp"](), tmp_path)
    others = [
        {"context": replace(context, seed=1, floats=[])},
        {"least_attention": 0.5},
    ]
    for other in others:
        assert resumed(zoo, tmp_path, count, **other)[0] == ["w1", "w2", "w3"], other
    assert resumed(zoo, tmp_path, count)[0] == ["w3"]


@pytest.mark.parametrize("content", [None, b"PK\x03\x04"])
def test_a_damaged_file_is_rounded_anew(zoo, tmp_path, count, content):
    _, whole = resumed(zoo, tmp_path, count)
    kept = sorted((tmp_path / "cache").rglob("*.npz"))
    assert len(kept) == 3
    for path in kept[:2]:
        if content is None:
            path.unlink()
        else:
            path.write_bytes(content)
    names, again = resumed(zoo, tmp_path, count)
    assert len(names) == 2
    assert again == whole
    assert resumed(zoo, tmp_path, count) == ([], whole)


def test_a_cache_that_cannot_be_written_to_stops_no_run(zoo, tmp_path, count):
    (tmp_path / "cache").write_text("in the way")
    assert resumed(zoo, tmp_path, count)[0] == ["w1", "w2", "w3"]


# The key.


def of(model, context, rounds=1, floats=None):
    options = {"rounds": rounds, "clip": "mse"}
    return Finished.of(model, floats or model, context.feeds, options, context)


def test_what_is_put_is_got_by_its_layer(zoo, tmp_path):
    model = planned(zoo)
    of(model, fed(model, tmp_path)).put("w1", ARRAYS)
    again = of(planned(zoo), fed(model, tmp_path))
    found = again.get("w1")
    assert found.keys() == ARRAYS.keys()
    for name, array in ARRAYS.items():
        np.testing.assert_array_equal(found[name], array)
        assert found[name].dtype == array.dtype
    assert again.get("w2") is None


def test_everything_that_a_result_depends_on_is_in_the_key(zoo, tmp_path, monkeypatch):
    model, context = planned(zoo), fed(zoo["mlp"](), tmp_path)
    of(model, context).put("w1", ARRAYS)
    changed = planned(zoo)
    weight = changed.graph.initializers["w3"]
    array = weight.const_value.numpy().copy()
    array[0, 0] += 1
    weight.const_value = ir.tensor(array, name="w3")
    renoted = planned(zoo)
    other = Format("int8", PerAxis(0))
    notes.write(renoted.graph.initializers["w3"], format=other, mode="static")
    others = [
        of(model, context, rounds=2),
        of(model, replace(context, seed=1)),
        of(model, fed(model, tmp_path, seed=1)),
        of(model, fed(model, tmp_path, batch=4)),
        of(model, fed(model, tmp_path, count=16)),
        of(changed, context, floats=model),
        of(model, context, floats=changed),
        of(renoted, context, floats=model),
    ]
    assert [one.get("w1") for one in others] == [None] * len(others)
    assert of(model, context).get("w1") is not None
    monkeypatch.setattr(finished, "REVISION", finished.REVISION + 1)
    assert of(model, context).get("w1") is None


def test_the_models_stay_as_they_are(zoo, tmp_path):
    model = planned(zoo)
    before = ir.to_proto(model).SerializeToString(deterministic=True)
    of(model, fed(model, tmp_path))
    assert ir.to_proto(model).SerializeToString(deterministic=True) == before
    assert [path.name for path in tmp_path.iterdir()] == []  # nothing is left behind
