from __future__ import annotations

import hashlib
import json
import re
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from hpc import forecast
from hpc.cluster import Cluster, Gpu
from hpc.errors import UserError
from hpc.plan import Array, Plan, arrays, expand
from hpc.spec import load

SITE = Cluster(
    scheduler="slurm", processes_per_node=4, cores_per_node=8, partition="p", partitions={"p": {"max_hours": 24, "max_nodes": 16}}
)  # type: ignore[dict-item]
WHOLE = SITE.model_copy(update={"whole_nodes": True})


def plan_of(folder: Path, job: dict[str, Any], cluster: Cluster = SITE, name: str = "job.yaml", sets: tuple[str, ...] = ()) -> Plan:
    path = folder / name
    path.write_text(yaml.safe_dump(job, sort_keys=False))
    return expand(load(path, sets), cluster)


def stage(**config: Any) -> dict[str, Any]:
    return {"entry": "toy", "resources": {"gpus": 1}, "config": config}


def test_a_dependent_stage_multiplies_its_upstream(toy: Path) -> None:
    job = {
        "stages": {
            "a": {**stage(), "sweep": {"grid": {"value": [1, 2, 3]}}},
            "b": {**stage(upstream="${a}"), "after": "a", "sweep": {"list": [{"steps": 1}, {"steps": 2}]}},
            "c": {**stage(upstream="${b}"), "after": ["a", "b"]},
        }
    }
    plan = plan_of(toy, job)
    by_stage = {name: [run for run in plan.runs if run.stage == name] for name in "abc"}
    assert [len(runs) for runs in by_stage.values()] == [3, 6, 6]
    for run in by_stage["c"]:  # both upstreams belong together
        assert run.upstream["b"].upstream["a"] is run.upstream["a"]
        assert set(run.after) == {run.upstream["a"].id, run.upstream["b"].id}
    assert by_stage["b"][1].params == {"a.value": 1, "b.steps": 2}
    assert len({run.id for run in plan.runs}) == 15


def test_seeds_multiply_root_stages_only(toy: Path) -> None:
    job = {"seeds": [0, 1, 2], "stages": {"a": stage(), "b": {**stage(upstream="${a}"), "after": "a"}}}
    plan = plan_of(toy, job)
    assert [run.config["seed"] for run in plan.runs] == [0, 1, 2, 0, 0, 0]
    assert [run.params for run in plan.runs if run.stage == "b"] == [{"a.seed": 0}, {"a.seed": 1}, {"a.seed": 2}]


# --- identity ----------------------------------------------------------------------------------------------------------


def hash_of(folder: Path, sets: tuple[str, ...] = (), **config: Any) -> str:
    return plan_of(folder, {"stages": {"a": stage(**config)}}, sets=sets).runs[0].hash


def test_identity_is_what_is_learnt(toy: Path) -> None:
    base = hash_of(toy)
    assert hash_of(toy, steps=5) == base  # a default written down
    assert hash_of(toy, seconds=3.0) == base  # operational
    assert hash_of(toy, later=7) == base  # a later field at its neutral value
    assert hash_of(toy, later=8) != base
    assert hash_of(toy, steps=6) != base
    assert hash_of(toy, sets=("a.steps=6",)) == hash_of(toy, steps=6)
    resources = plan_of(toy, {"stages": {"a": {"entry": "toy", "resources": {"nodes": 4, "hours": 2}}}}).runs[0].hash
    assert resources == base  # a run may move to other hardware


def test_identity_is_stable_over_versions(toy: Path) -> None:
    """The hash is a promise to every folder on disk: this one was computed by hand from the rule in DESIGN."""
    fields = {"steps": 5, "value": 1.0, "seed": 0, "upstream": None, "fail_at": None, "kill_at": None, "hang_at": None}
    fields |= {"silent_seconds": 0.0, "data": None}
    text = json.dumps({"entry": "toy", "config": fields}, sort_keys=True, separators=(",", ":"))
    assert hash_of(toy) == hashlib.sha256(text.encode()).hexdigest()[:12]


def test_a_reference_enters_by_the_other_runs_hash(toy: Path) -> None:
    def second(value: float, **job: Any) -> str:
        stages = {"a": stage(value=value), "b": {**stage(upstream="${a}"), "after": "a"}}
        return plan_of(toy, {"stages": stages, **job}).runs[1].hash

    assert second(1) == second(1)
    assert second(1) != second(2)


def shards(folder: Path, content: bytes) -> Path:
    folder.mkdir(parents=True)
    (folder / "train-000000.tar").write_bytes(content)
    entry = {"name": "train-000000.tar", "bytes": len(content), "sha256": hashlib.sha256(content).hexdigest(), "num_images": 1}
    (folder / "manifest.json").write_text(json.dumps({"name": "x", "splits": {"train": {"num_images": 1, "shards": [entry]}}}))
    return folder


def test_data_enter_by_their_manifest_and_never_by_path(toy: Path) -> None:
    here, there, other = shards(toy / "here", b"abc"), shards(toy / "far" / "there", b"abc"), shards(toy / "other", b"abcd")
    assert hash_of(toy, data=str(here)) == hash_of(toy, data=str(there)) == hash_of(toy, data="./here")
    assert hash_of(toy, data=str(here)) != hash_of(toy, data=str(other))


def with_fields(toy: Path, *fields: str) -> None:
    """More fields in the toy's config class."""
    code = (toy / "toy.py").read_text()
    (toy / "toy.py").write_text(code.replace("    later: int", "".join(f"    {field}\n" for field in fields) + "    later: int"))


def test_a_file_enters_by_its_content_and_never_by_path(toy: Path) -> None:
    with_fields(toy, 'file: str | None = Field(None, json_schema_extra={"file": True})')
    for name, content in {"here": b"abc", "there": b"abc", "other": b"abcd"}.items():
        (toy / name).write_bytes(content)
    (toy / "folder").mkdir()
    (toy / "folder" / "model.safetensors").write_bytes(b"abc")
    here = hash_of(toy, file=str(toy / "here"))
    assert hash_of(toy, file=str(toy / "there")) == here
    assert hash_of(toy, file=str(toy / "folder")) == here, "the file of weights in it"
    assert hash_of(toy, file=str(toy / "other")) != here
    (toy / "here").write_bytes(b"abcd")
    assert hash_of(toy, file=str(toy / "here")) == hash_of(toy, file=str(toy / "other")), "what is there now"


def test_a_file_that_is_not_there_blocks_the_runs_that_need_it(toy: Path) -> None:
    with_fields(toy, 'file: str | None = Field(None, json_schema_extra={"file": True})')
    (toy / "here").write_bytes(b"abc")
    files = [str(toy / name) for name in ("here", "nowhere", "neither")]
    plan = plan_of(toy, {"stages": {"a": {**stage(), "sweep": {"grid": {"file": files}}}}})
    assert [bool(run.blocked) for run in plan.runs] == [False, True, True]
    assert re.fullmatch(r"file .*/nowhere' cannot be read \(No such file or directory\), and its content names .*", plan.runs[1].blocked)


def test_a_file_of_another_stage_enters_by_its_run(toy: Path) -> None:
    with_fields(
        toy,
        'file: str | None = Field(None, json_schema_extra={"file": True})',
        'sha256: str | None = Field(None, json_schema_extra={"operational": True, "sha256_of": "file"})',
    )

    def second(steps: int) -> Any:
        return plan_of(toy, {"stages": {"a": stage(steps=steps), "b": {**stage(file="${a}"), "after": "a"}}}).runs[1]

    assert second(1).hash == second(1).hash != second(2).hash
    assert not second(1).blocked
    assert second(1).config["sha256"] is None, "it is not there yet"


def test_the_entry_is_told_which_file_named_its_run(toy: Path) -> None:
    with_fields(
        toy,
        'file: str | None = Field(None, json_schema_extra={"file": True})',
        'sha256: str | None = Field(None, json_schema_extra={"operational": True, "sha256_of": "file"})',
    )
    (toy / "here").write_bytes(b"abc")
    digest = hashlib.sha256(b"abc").hexdigest()
    run = plan_of(toy, {"stages": {"a": stage(file=str(toy / "here"))}}).runs[0]
    assert run.config["sha256"] == digest
    assert hash_of(toy, file=str(toy / "here"), sha256=digest) == run.hash
    with pytest.raises(UserError, match=f"file .*/here has the sha256 {digest}, but sha256 is {'0' * 64}: it is another file"):
        hash_of(toy, file=str(toy / "here"), sha256="0" * 64)
    assert plan_of(toy, {"stages": {"a": stage(file=str(toy / "nowhere"))}}).runs[0].config["sha256"] is None


def test_the_folder_of_a_run_enters_by_its_weights_and_never_by_path(toy: Path) -> None:
    with_fields(toy, 'run: str | None = Field(None, json_schema_extra={"reference": True})')

    def folder(name: str, **files: str) -> str:
        for file, content in files.items():
            path = toy / name / file.replace("__", "/")
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(content)
        return hash_of(toy, run=str(toy / name))

    complete = folder("run", **{"result.json": '{"weights_sha256": "a"}', "COMPLETE": ""})
    assert folder("moved", **{"result.json": '{"weights_sha256": "a"}', "COMPLETE": "", "config.json": "{}"}) == complete
    assert folder("other", **{"result.json": '{"weights_sha256": "b"}', "COMPLETE": ""}) != complete
    three = folder("unfinished", **{"checkpoints__step_3__checksums.json": "x"})
    six = folder("unfinished", **{"checkpoints__step_6__checksums.json": "y"})
    assert len({complete, three, six}) == 3, "what it has learnt since is another encoder"
    export = folder("export", **{"model.safetensors": "m", "config.json": "{}", "README.md": "1"})
    assert folder("copy", **{"model.safetensors": "m", "config.json": "{}", "README.md": "2"}) == export
    assert folder("copy", **{"split.safetensors": "s"}) != export
    for name, message in {"nowhere": "does not exist", "empty": "has no weights: no run and no export"}.items():
        (toy / "empty").mkdir(exist_ok=True)
        blocked = plan_of(toy, {"stages": {"a": stage(run=str(toy / name))}}).runs[0].blocked
        assert re.fullmatch(f"folder .*/{name}' {message}, and the weights in it name the run: is the path right.", blocked)


def test_missing_or_cut_shards_are_said(toy: Path) -> None:
    folder = shards(toy / "data", b"abc")
    (folder / "train-000000.tar").write_bytes(b"ab")
    job = {"stages": {"a": stage(data=str(folder))}}
    whole = plan_of(toy, job).runs[0]
    assert re.search(r"shard .*train-000000.tar has 2 bytes, the manifest says 3", whole.blocked)
    (folder / "train-000000.tar").unlink()
    missing = plan_of(toy, job).runs[0]
    assert re.search(r"shard .*train-000000.tar is missing", missing.blocked)
    (folder / "train-000000.tar").write_bytes(b"abc")
    assert missing.hash == whole.hash == hash_of(toy, data=str(folder)), "the manifest alone identifies the data"
    with pytest.raises(UserError, match=r"nowhere/manifest.json does not exist"):
        hash_of(toy, data="./nowhere")


def test_a_named_data_set_is_placed_by_the_profile(toy: Path) -> None:
    folder = shards(toy / "data", b"abc")
    cluster = SITE.model_copy(update={"datasets": {"known": str(folder)}})
    job = {"stages": {"a": stage(data="known")}}
    placed = plan_of(toy, job, cluster)
    assert placed.runs[0].config["data"] == str(folder)
    assert not placed.warnings
    elsewhere = plan_of(toy, job)
    assert elsewhere.runs[0].hash == placed.runs[0].hash
    assert "the profile knows no place for it" in elsewhere.runs[0].blocked


# --- memory and traffic ------------------------------------------------------------------------------------------------


GPU = Gpu(name="A100", tflops=312, memory_gib=40, node_gb_s=300, network_gb_s=25)
LARGE = {"data": "imagenet1k", "backbone": "vit_large_patch16_224", "epochs": 100, "batch": 512, "transformation": "se2"}


def large(nodes: int, **config: Any) -> dict[str, Any]:
    return {"stages": {"a": {"entry": "equissl.pretrain", "resources": {"nodes": nodes}, "config": {**LARGE, **config}}}}


def test_a_plan_says_how_a_run_is_spread_and_what_it_needs(tmp_path: Path) -> None:
    cluster = SITE.model_copy(update={"gpu": GPU})
    how, traffic, scaling = forecast.parallelism(plan_of(tmp_path, large(4), cluster))
    assert re.match(
        r"a: sharding hybrid \(.* of a GPU's memory, .*\); about [\d.]+ of 40 GiB per GPU: parameters 0\.\d+, .*activations", how
    )
    assert re.match(
        r"a: a step brings each process [\d.]+ GB inside a node, [\d.]+ GB between nodes, \d+ ms beside \d+ ms of computing", traffic
    )
    assert re.match(r"a: at 1 / 4 / 16 / 64 / 256 nodes of 4: replicate .*; shard .*; hybrid .* ms, at the links' peak", scaling)
    plan = plan_of(tmp_path, large(1, batch=32, sharding="shard"), cluster)
    assert "sharding shard (as asked)" in forecast.parallelism(plan)[0]
    unknown = cluster.model_copy(update={"gpu": GPU.model_copy(update={"node_gb_s": None, "network_gb_s": None})})
    lines = forecast.parallelism(plan_of(tmp_path, large(4), unknown))
    assert len(lines) == 2
    assert re.search(r"GB between nodes beside \d+ ms of computing$", lines[1])
    (line, _) = forecast.parallelism(plan_of(tmp_path, large(4)))
    assert re.search(r"sharding shard \(on CPUs, .* GiB per process: parameters", line)


def test_what_will_not_fit_is_said(toy: Path) -> None:
    cluster = SITE.model_copy(update={"gpu": GPU})

    def notes(job: dict[str, Any]) -> list[str]:
        plan = plan_of(toy, job, cluster)
        return forecast.notes(plan, arrays(plan.runs, cluster), [], [], [], 0.0)

    assert not any("may not fit" in note for note in notes(large(4)))
    (note,) = (note for note in notes(large(4, batch=1024)) if "may not fit" in note)
    assert re.match(r"stages\.a needs about [\d.]+ GiB of the 40 GiB of a GPU, for example ", note)
    for saved in ({"activation_checkpointing": "selective"}, {"accumulate": 2}):
        assert not any("may not fit" in note for note in notes(large(4, batch=1024, **saved)))
    assert forecast.parallelism(plan_of(toy, {"stages": {"a": stage()}}, cluster)) == [], "an entry that tells nothing"


def test_settings_of_the_engine_are_not_identity(tmp_path: Path) -> None:
    base = plan_of(tmp_path, large(4)).runs[0].hash
    for name, value in {"sharding": "shard", "activation_checkpointing": "full", "accumulate": 2}.items():
        assert plan_of(tmp_path, large(4, **{name: value})).runs[0].hash == base
    assert plan_of(tmp_path, large(4, precision="float32")).runs[0].hash != base, "it changes what is learnt"


# --- messages ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"stpes": 3}, r"job.yaml:7: stages.a.config.stpes: unknown key 'stpes'.*did you mean 'steps'"),
        ({"steps": "many"}, r"job.yaml:7: stages.a.config.steps: 'many' is not allowed: it must be a valid integer"),
        ({"steps": 0}, r"stages.a.config.steps: 0 is not allowed: it must be greater than or equal to 1"),
        ({"steps": 1003}, r"stages.a.config: steps 1003 is not a multiple of 4 processes"),
        ({"value": "five"}, r"stages.a.config.value: 'five' is not allowed: it must be a valid number"),
        ({"upstream": "${b}"}, r"stages.a.config.upstream: \$\{b\} is not a stage that a comes after"),
    ],
)
def test_a_wrong_config_names_file_line_field_value_and_choices(toy: Path, change: dict[str, Any], words: str) -> None:
    job = {"stages": {"a": {"entry": "toy", "resources": {"nodes": 1}, "config": change}}}
    with pytest.raises(UserError, match=words):
        plan_of(toy, job)


def test_a_wrong_sweep_names_the_point(toy: Path) -> None:
    job = {"stages": {"a": {**stage(), "sweep": {"grid": {"value": [1, 2], "stps": [1]}}}}}
    with pytest.raises(UserError, match=r"job.yaml:12: stages.a.config.stps: unknown key.*in the sweep at \{value: 1, stps: 1\}"):
        plan_of(toy, job)


@pytest.mark.parametrize(
    ("resources", "words"),
    [
        ({"nodes": 17}, "17 nodes are asked for, but partition p allows 16"),
        ({"hours": 25}, "25 hours per segment are asked for, but partition p allows 24"),
        ({"gpus": 5}, "5 processes per node are asked for, but the profile's nodes have 4"),
        ({"nodes": 2, "gpus_per_node": 8}, "8 processes per node"),
    ],
)
def test_requests_above_the_limits_are_refused(toy: Path, resources: dict[str, Any], words: str) -> None:
    with pytest.raises(UserError, match=words):
        plan_of(toy, {"stages": {"a": {"entry": "toy", "resources": resources}}})


@pytest.mark.parametrize(
    ("entry", "words"),
    [
        ("equissl.pretrian", "unknown entry 'equissl.pretrian'.*did you mean 'pretrain'"),
        ("os", "has no function main"),
        ("nowhere.at.all", "no module 'nowhere'"),
        ("; rm -rf /", "is not a module's name"),
    ],
)
def test_unknown_entries(toy: Path, entry: str, words: str) -> None:
    with pytest.raises(UserError, match=words):
        plan_of(toy, {"stages": {"a": {"entry": entry}}})


def test_the_same_run_twice_is_said(toy: Path) -> None:
    with pytest.raises(UserError, match="stands twice"):
        plan_of(toy, {"stages": {"a": {**stage(), "sweep": {"grid": {"value": [1, 1.0]}}}}})
    with pytest.raises(UserError, match="are the same run"):
        plan_of(toy, {"stages": {"a": {**stage(), "sweep": {"list": [{"value": 1.0}, {"steps": 5}]}}}})


# --- arrays ------------------------------------------------------------------------------------------------------------


def chain(pretrainings: int, tasks: int) -> dict[str, Any]:
    return {
        "stages": {
            "a": {"entry": "toy", "resources": {"nodes": 1}, "sweep": {"grid": {"value": list(range(pretrainings))}}},
            "b": {**stage(upstream="${a}"), "after": "a", "sweep": {"grid": {"value": list(range(tasks))}}},
        }
    }


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 7), st.integers(1, 6), st.sets(st.integers(0, 60)), st.booleans(), st.sampled_from([3, 5, 1001]))
def test_arrays_hold_every_run_once_after_its_upstream(
    tmp_path_factory: pytest.TempPathFactory, pretrainings: int, tasks: int, complete: set[int], whole: bool, max_size: int
) -> None:
    import sys

    from tests.conftest import TOY

    folder = tmp_path_factory.getbasetemp() / "arrays"
    folder.mkdir(exist_ok=True)
    (folder / "toy.py").write_text(TOY)
    if str(folder) not in sys.path:
        sys.path.insert(0, str(folder))
    cluster = (WHOLE if whole else SITE).model_copy(update={"max_array_size": max_size})
    plan = plan_of(folder, chain(pretrainings, tasks), cluster)
    done = {run.hash for index, run in enumerate(plan.runs) if index in complete and run.stage == "a"}
    todo = [run for run in plan.runs if run.hash not in done]
    planned = arrays(todo, cluster)
    assert sorted(run.id for array in planned for run in array.runs) == sorted(run.id for run in todo)
    place: dict[str, tuple[Array, int]] = {}
    for array in planned:
        assert len(array.elements) <= max_size
        for index, element in enumerate(array.elements):
            assert len(element) <= (4 if whole and array.stage == "b" else 1)
            for run in element:
                for upstream in run.after:
                    if upstream in place:
                        before, at = place[upstream]
                        assert before in array.waits_for
                        assert array.mirrors is None or (array.mirrors is before and at == index)
                        assert not array.indices or (array.waits_for == [before] and at in array.indices)
                    else:
                        assert array.mirrors is None
                place[run.id] = (array, index)


def test_small_runs_share_whole_nodes(toy: Path) -> None:
    packed = arrays(plan_of(toy, chain(2, 6), WHOLE).runs, WHOLE)
    assert [[len(element) for element in array.elements] for array in packed] == [[1, 1], [4, 4, 4]]
    many = arrays(plan_of(toy, chain(9, 2), WHOLE).runs, WHOLE)
    assert [array.indices for array in many] == [(), (0, 1, 2, 3), (4, 5, 6, 7), (8,)]
    assert [[len(element) for element in array.elements] for array in many] == [[1] * 9, [4, 4], [4, 4], [2]]
    alone = arrays(plan_of(toy, chain(2, 6), SITE).runs, SITE)
    assert all(len(element) == 1 for array in alone for element in array.elements)


# --- data sets in their authors' format ----------------------------------------------------------------------------------------


def test_a_folder_in_its_own_format_enters_by_what_is_in_it(toy: Path, tmp_path: Path) -> None:
    from equissl.data.fake import fake

    for name in ("food101", "cifar10"):
        fake(name, tmp_path / "sets" / name)

    def evaluated(data: str, data_set: str | None = "food101", site: Cluster = SITE) -> Plan:
        config = {"checkpoint": "elsewhere", "task": "knn", "data": data, "data_set": data_set}
        return plan_of(toy, {"stages": {"evaluate": {"entry": "equissl.evaluate", "resources": {"gpus": 1}, "config": config}}}, site)

    def hash_of_evaluation(data: Path, **more: Any) -> str:
        return evaluated(str(data), **more).runs[0].hash

    first = hash_of_evaluation(tmp_path / "sets")
    plan = evaluated(str(tmp_path / "sets"))
    assert (plan.runs[0].config["data"], plan.runs[0].blocked, plan.data_problems) == (str(tmp_path / "sets"), "", {})
    assert hash_of_evaluation(tmp_path / "sets/food101") == first, "not by its path"
    assert hash_of_evaluation(tmp_path / "sets", data_set="cifar10") != first
    (tmp_path / "sets/food101").rename(tmp_path / "moved")
    assert hash_of_evaluation(tmp_path / "moved") == first
    listed = tmp_path / "moved/food-101/meta/test.json"
    content = json.loads(listed.read_text())
    images = content["fake_dish_000"]
    images[0], images[1] = images[1], images[0]
    listed.write_text(json.dumps(content))
    assert hash_of_evaluation(tmp_path / "moved") != first, "the order is another"
    for data, message in (
        (tmp_path / "nowhere", r"data set 'food101 in .*nowhere': there is no .*nowhere: give the folder of food101"),
        (tmp_path / "sets", r"holds nothing of food101: neither food-101/ nor manifest.json; equihpc data check food101"),
    ):
        with pytest.raises(UserError, match=message):
            evaluated(str(data))
    listed.unlink()
    with pytest.raises(UserError, match=r"moved does not fit food101: .* has no meta/test.json, which food101 needs"):
        evaluated(str(tmp_path / "moved"))
    with pytest.raises(UserError, match=r"cifar10/manifest.json does not exist"):
        evaluated(str(tmp_path / "sets/cifar10"), data_set=None)
    site = SITE.model_copy(update={"datasets": {"cifar10": str(tmp_path / "sets"), "food101": str(tmp_path / "sets")}})
    named = evaluated("cifar10", "cifar10", site).runs[0]
    assert (named.config["data"], named.blocked, named.data) == (str(tmp_path / "sets"), "", ("cifar10",))
    missing = evaluated("food101", "food101", site).runs[0]
    assert re.search(r"data set 'food101': .*sets holds nothing of food101", missing.blocked)
