"""What keeps a run from going wrong unnoticed; and that no step waits for the device."""

from __future__ import annotations

import gc
import json
import math
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import tiny
import torch
import torch.distributed as dist
from harness import run_ranks
from hypothesis import given
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

from equissl import distributed, guards, pretrain
from equissl.guards import FEWEST, WINDOW, Watch

# --- loss spikes, collapse ---------------------------------------------------------------------------------------------------


def warnings_of(watch: Watch, losses: list[float], first: int = 1) -> list[str]:
    return [warning for step, loss in enumerate(losses, first) for warning in watch.see(step, {"loss": loss})]


def test_a_spike_is_told_once_with_its_values() -> None:
    watch = Watch(3.0)
    assert warnings_of(watch, [2.0] * FEWEST) == []
    assert warnings_of(watch, [5.9, 6.1, 7.0, 9.0], 11) == ["step 12: the loss is 6.1, over 3 times the usual 2"]
    assert warnings_of(watch, [2.0, 8.0], 15) == ["step 16: the loss is 8, over 3 times the usual 2"]
    assert watch.loss_spikes == 2
    assert warnings_of(Watch(None), [1.0] * 20 + [1e9]) == []


def test_the_usual_loss_is_that_of_the_last_steps() -> None:
    """A loss that fell from high is measured by where it is now, one that rose slowly is no spike; losses may be negative."""
    assert warnings_of(Watch(3.0), [100.0] * WINDOW + [1.0] * WINDOW + [4.0]) == ["step 201: the loss is 4, over 3 times the usual 1"]
    assert warnings_of(Watch(3.0), [1.02**step for step in range(300)]) == []
    assert warnings_of(Watch(3.0), [5.0, 50.0] * (FEWEST // 2 - 1)) == [], "nothing is usual yet"
    assert warnings_of(Watch(3.0), [-1.0] * 20 + [-0.9, 0.9]) == []
    assert len(warnings_of(Watch(3.0), [-1.0] * 20 + [1.1])) == 1


@given(st.lists(st.floats(-10, 10) | st.sampled_from([50.0, 200.0]), max_size=60), st.integers(0, 60))
def test_a_resumed_run_that_replays_its_records_warns_of_the_same(losses: list[float], stop: int) -> None:
    whole, first, resumed = Watch(2.0), Watch(2.0), Watch(2.0)
    before, after = losses[:stop], losses[stop:]
    expected = warnings_of(whole, losses)
    told = warnings_of(first, before)
    assert warnings_of(resumed, before) == told  # what the logs replay in silence
    assert told + warnings_of(resumed, after, len(before) + 1) == expected
    assert resumed.loss_spikes == whole.loss_spikes == len(expected)


@pytest.mark.parametrize(
    ("figures", "said"),
    [
        ({"feature_std": 0.01}, "step 7: feature_std is 0.01: all images have nearly the same features; the representation collapses"),
        ({"mean_target_entropy": 0.0}, "nearly all images have the same target"),
        ({"target_entropy": 1.0}, "the targets are nearly uniform"),
    ],
)
def test_collapse_is_told_once(figures: dict[str, float], said: str) -> None:
    watch, healthy = Watch(3.0), {"loss": 1.0, "feature_std": 0.7, "mean_target_entropy": 0.6, "target_entropy": 0.3}
    assert watch.see(6, healthy) == []
    (told,) = watch.see(7, healthy | figures)
    assert said in told
    assert watch.see(8, healthy | figures) == []
    assert watch.see(9, {"loss": 1.0}) == [], "not measured is not over"
    assert watch.see(10, healthy | figures) == []
    assert watch.see(11, healthy) == []
    assert len(watch.see(12, healthy | figures)) == 1


# --- no progress -------------------------------------------------------------------------------------------------------------


def told(losses: list[float], watch: Watch, every: int = 10, **figures: float) -> list[str]:
    return [said for i, loss in enumerate(losses, 1) for said in watch.see(i * every, {"loss": loss, **figures})]


def noise(num: int, seed: int, size: float) -> list[float]:
    return np.random.Generator(np.random.PCG64(seed)).normal(0, size, num).tolist()


ALIKE = {"effective_rank": 1.2, "feature_std": 0.06}
DIFFERENT = {"effective_rank": 3.0, "feature_std": 0.3}


def test_a_loss_that_stands_still_is_told_until_it_moves() -> None:
    """Four parts of 200 steps flat, two of falling, three flat."""
    losses = [5 + x for x in noise(80, 0, 0.1)] + [5 - i / 10 for i in range(40)] + [1 + x for x in noise(60, 1, 0.1)]
    found = told(losses, Watch(None, 200), **ALIKE)
    assert [int(said.split()[1][:-1]) for said in found] == [410, 1610]
    assert "and effective_rank 1.2: the features are nearly alike" in found[0]
    watch = Watch(None, 200)
    assert len(told(losses[:80], watch, feature_std=0.06)) == 1, "without the dearer figure"
    assert told(losses, Watch(None, None), **ALIKE) == []


@given(st.lists(st.floats(-100, 100), max_size=200), st.integers(0, 9))
def test_no_curve_is_suspicious_while_the_features_differ(losses: list[float], seed: int) -> None:
    """Rising, flat or noisy: such are the losses of runs that learn."""
    assert told([*losses, *noise(100, seed, 1.0)], Watch(None, 100), **DIFFERENT) == []
    assert told(losses, Watch(None, 100)) == [], "nor where there are no figures"


@given(
    end=st.floats(-5, 10),
    height=st.floats(0.5, 10),
    part_noise=st.floats(0, 0.01),
    time_constant=st.floats(0.05, 0.5),
    warmup=st.floats(0, 0.3),
    seed=st.integers(0, 2**32),
)
def test_a_loss_that_decays_is_progress_also_where_features_are_alike(
    end: float, height: float, part_noise: float, time_constant: float, warmup: float, seed: int
) -> None:
    """Flat in the first half of the warm-up, then falling under noise; at the flat end the features differ."""
    num = 1000
    at = [max(0.0, i / num - warmup / 2) / time_constant for i in range(num)]
    losses = [end + height * (math.exp(-t) + x) for t, x in zip(at, noise(num, seed, part_noise), strict=True)]
    falls = next((i for i, t in enumerate(at) if t > 1), num) // 50 * 50
    watch = Watch(None, 500, 10 * num * warmup)
    assert told(losses[:falls], watch, **ALIKE) == []
    assert [said for i in range(falls, num) for said in watch.see(10 * i + 10, {"loss": losses[i], **DIFFERENT})] == []


@pytest.mark.parametrize("path", sorted(Path(__file__).parent.parent.glob("golden/*.json")), ids=lambda path: path.stem)
def test_the_recorded_losses_are_progress(path: Path) -> None:
    """Five steps, here five parts of a run."""
    recorded = [sum(step.values()) for step in json.loads(path.read_text())["losses"]]
    losses = [loss + x for loss in recorded for x in noise(20, 0, 0.05)]
    assert told(losses, Watch(None, 200), **DIFFERENT) == []


@given(st.lists(st.sampled_from([1.0, 2.0, 3.0]), max_size=150), st.integers(0, 150))
def test_a_resumed_run_judges_its_parts_alike(losses: list[float], stop: int) -> None:
    resumed = Watch(None, 100)
    before = told(losses[:stop], resumed, **ALIKE)
    after = [said for i, loss in enumerate(losses[stop:], stop + 1) for said in resumed.see(10 * i, {"loss": loss, **ALIKE})]
    assert before + after == told(losses, Watch(None, 100), **ALIKE)


def test_warm_up_and_short_runs_are_not_judged() -> None:
    flat = [1.0] * 100
    assert told(flat, Watch(None, 200, warmup_steps=1000), **ALIKE) == []
    assert len(told(flat, Watch(None, 200, warmup_steps=600), **ALIKE)) == 1
    assert told(flat, Watch(None, 10 * FEWEST - 10), **ALIKE) == [], "too few losses in a part"


# --- waiting for other ranks -------------------------------------------------------------------------------------------------


def test_gpus_collectives_are_nccls_in_all_groups(monkeypatch: pytest.MonkeyPatch) -> None:
    """No NCCL here: stand-ins take what it would be given."""
    given: dict[tuple[str, str], timedelta] = {}

    def group(name: str) -> Any:
        def backend(device: torch.device) -> Any:
            return SimpleNamespace(_set_default_timeout=lambda timeout: given.update({(name, device.type): timeout}))

        return type("Group", (), {"_get_backend": staticmethod(backend)})()

    everybody, shards = group("all"), group("shards")
    mesh = SimpleNamespace(get_all_groups=lambda: [everybody, shards])
    guards.limit_waiting(7.5, SimpleNamespace(device=torch.device("cuda"), group=everybody, mesh=mesh))  # type: ignore[arg-type]
    assert given == {("all", "cuda"): timedelta(seconds=7.5), ("shards", "cuda"): timedelta(seconds=7.5)}


def meet(seconds: float) -> bool:
    world = distributed.init()
    guards.limit_waiting(seconds, world)
    if world.rank:
        time.sleep(2 * seconds)
    dist.all_reduce(torch.ones(1), group=world.group)
    distributed.barrier(world)
    distributed.close()
    return True


def test_cpus_are_not_hurried() -> None:
    """An exception of the rank that waits would be taken for an error of the code, and the run not be tried again."""
    assert run_ranks(meet, 2, 1.5) == [True, True]


@pytest.mark.parametrize(
    ("before", "expected"),
    [
        ({}, "3"),
        ({"TORCHELASTIC_RUN_ID": "none", "TORCH_NCCL_ASYNC_ERROR_HANDLING": "1"}, "3"),
        ({"TORCHELASTIC_RUN_ID": "none", "TORCH_NCCL_ASYNC_ERROR_HANDLING": "2"}, "2"),
        ({"TORCH_NCCL_ASYNC_ERROR_HANDLING": "1"}, "1"),
    ],
)
def test_the_recorder_is_asked_for_unless_something_is_set(
    before: dict[str, str], expected: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(os, "environ", {"TORCH_NCCL_DUMP_ON_TIMEOUT": "0", **before})
    guards.record_collectives(tmp_path)
    assert os.environ["TORCH_NCCL_ASYNC_ERROR_HANDLING"] == expected
    assert os.environ["TORCH_NCCL_DUMP_ON_TIMEOUT"] == "0"
    assert int(os.environ["TORCH_FR_BUFFER_SIZE"]) > 0
    assert os.environ["TORCH_FR_DUMP_TEMP_FILE"] == os.environ["TORCH_NCCL_DEBUG_INFO_TEMP_FILE"] == f"{tmp_path}/flight_"


def test_torchruns_own_default_is_replaced(tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    name = "TORCH_NCCL_ASYNC_ERROR_HANDLING"
    script.write_text(
        f"import os\nfrom pathlib import Path\nfrom equissl import guards\nbefore = os.environ['{name}']\n"
        f"guards.record_collectives(Path('run'))\nprint(before, os.environ['{name}'])\n"
    )
    environment = {key: value for key, value in os.environ.items() if key != name} | {"PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "1", str(script)]
    assert subprocess.run(command, env=environment, capture_output=True, text=True, check=True, timeout=90).stdout.split() == ["1", "3"]


# --- garbage -----------------------------------------------------------------------------------------------------------------


def test_garbage_is_collected_at_the_same_steps_and_the_old_way_is_back_after_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    assert gc.isenabled()
    collected = []

    def failing() -> None:
        with guards.garbage_collected_by_hand() as collect:
            assert not gc.isenabled()
            monkeypatch.setattr(gc, "collect", lambda: collected.append(step))
            for step in range(1, 2501):
                collect(step, step == 1300)
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        failing()
    assert collected == [1000, 1300, 2000]
    assert gc.isenabled()
    assert gc.get_freeze_count() == 0
    gc.disable()
    try:
        with guards.garbage_collected_by_hand():
            pass
        assert not gc.isenabled(), "as it was"
    finally:
        gc.enable()


# --- no step waits for the device --------------------------------------------------------------------------------------------

READS = ("item", "tolist", "cpu", "numpy", "nonzero", "__bool__", "__float__", "__int__", "__index__", "__array__", "__contains__")
SYNCHRONISING = ("_local_scalar_dense", "nonzero", "masked_select", "_unique2", "unique_dim", "unique_consecutive", "equal")
# who may look at a tensor's values: what was drawn or loaded on the host, what has been fetched, what is outside the steps
ON_THE_HOST = {"views.MakeViews._colour", "views.MakeViews.parameters", "distributed.Agreement.finish"}
LATE = {"optim.Report.read", "monitor.Observed.read", "monitor.effective_rank", "logs.Logs.step", "logs.Logs._keep"}
BETWEEN_STEPS = ("checkpoint.", "distributed.init", "data.", "encoder.Backbone.__init__", "export.", "loop._export")


class Reads(TorchDispatchMode):
    """Notes where in our code a tensor's values are asked for: on a GPU all of these wait for it."""

    def __init__(self) -> None:
        super().__init__()
        self.places: dict[str, set[str]] = {}

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = function.overloadpacket.__name__
        masks = args[1] if name in ("index", "index_put", "index_put_", "_index_put_impl_") else ()
        if name in SYNCHRONISING or any(mask is not None and mask.dtype in (torch.bool, torch.uint8) for mask in masks):
            self.note(name)
        return function(*args, **(kwargs or {}))

    def note(self, what: str) -> None:
        frame = sys._getframe(2)
        while frame is not None and "/equissl/" not in frame.f_code.co_filename.replace("/tests/", "|"):
            frame = frame.f_back  # type: ignore[assignment]
        if frame is not None:
            module = frame.f_code.co_filename.rpartition("/equissl/")[2].removesuffix(".py").replace("/", ".")
            self.places.setdefault(f"{module}.{frame.f_code.co_qualname}", set()).add(f"{what} in line {frame.f_lineno}")


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch) -> Iterator[Reads]:
    found = Reads()

    def noting(name: str) -> Any:
        original = getattr(torch.Tensor, name)

        def method(self: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
            found.note(name)
            return original(self, *args, **kwargs)

        return method

    for name in READS:
        monkeypatch.setattr(torch.Tensor, name, noting(name))
    with found:
        yield found


def short_run(photographs: Path) -> dict[str, Any]:
    """Everything that a step can be asked for, in a few of them."""
    settings = tiny.config(str(photographs), num_steps=6, checkpoint_every=100, monitor_every=2, picture_every=2)
    return settings.model_dump(mode="json", by_alias=True)


def test_no_step_reads_a_value_from_the_device(photographs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, reads: Reads) -> None:
    """A whole run; on a CPU nothing would wait, so what is forbidden is to ask."""
    monkeypatch.delenv("RANK", raising=False)
    assert pretrain.main(short_run(photographs), tmp_path, lambda: False)
    places = {place: what for place, what in reads.places.items() if not place.startswith(BETWEEN_STEPS)}
    assert places.keys() - ON_THE_HOST - LATE == set(), places
    assert places.keys() >= {"optim.Report.read", "monitor.Observed.read", "logs.Logs.step"}, "the test sees what there is"


@pytest.mark.parametrize(
    ("expression", "is_read"),
    [(f"x{call}", True) for call in (".sum().item()", ".tolist()", ".cpu()", ".numpy()", "[x > 0]", ".nonzero()", ".masked_select(x > 0)")]
    + [(f"{function}(x.sum())", True) for function in ("bool", "float", "int")]
    + [("torch.equal(x, x)", True), ("torch.unique(x)", True), ("x.index_select(0, torch.arange(2)) * x.sum() + x[:2]", False)],
)
def test_the_test_above_sees_what_would_wait(expression: str, is_read: bool, reads: Reads) -> None:
    step = eval(compile(f"lambda x: {expression}", "/somewhere/equissl/methods/new.py", "eval"), {"torch": torch})
    step(torch.arange(1, 4))
    assert ("methods.new.<lambda>" in reads.places) == is_read


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_no_step_waits_for_the_gpu(photographs: Path, tmp_path: Path) -> None:
    calls = 0

    def stop() -> bool:
        nonlocal calls
        calls += 1
        if calls == 2:  # compiled, cached and allocated
            torch.cuda.set_sync_debug_mode("error")
        if calls == 5:  # the last step saves
            torch.cuda.set_sync_debug_mode("default")
        return False

    try:
        assert pretrain.main(short_run(photographs), tmp_path, stop)
    finally:
        torch.cuda.set_sync_debug_mode("default")
