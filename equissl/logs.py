"""What a run tells while it runs: `metrics.jsonl`, `progress.json`, `tensorboard/`, `pictures/views.png`. Rank 0 writes.

Numbers are read from the device one step late, pictures too. After a resume, files and curves are those of a run that nobody
interrupted, but for what is measured by the clock (`MEASURED`).
"""

from __future__ import annotations

import contextlib
import json
import logging
import math
import resource
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor
from torch.utils.tensorboard import SummaryWriter
from torch.utils.tensorboard.summary import hparams

from equissl.config import PretrainConfig
from equissl.data.loader import Batch
from equissl.distributed import World
from equissl.estimates import pretraining_flops
from equissl.files import append_line, sync, told_when_full, write_atomic, write_json
from equissl.guards import FEWEST, Watch
from equissl.methods import Timeline
from equissl.monitor import Observed, is_due
from equissl.optim import Fetch, Numbers, Report
from equissl.photometry import denormalise
from equissl.progress import ProgressFile
from equissl.views import Views

log = logging.getLogger(__name__)

MEASURED = ("images_per_s", "mfu", "data_wait_s", "memory_gb", "checkpoint_wait_s")
PICTURE_ROWS = 8
PICTURE_PIXELS = 96  # smaller views are enlarged to about this side
QUEUE = 1000  # records for the board's thread: the step does not wait while the file system does
PEAK_TFLOPS = {  # dense bf16, by what is in the device's name; the first that fits
    "H200": 989,  # and the GH200
    "H100 PCIe": 756,
    "H100 NVL": 835,
    "H100": 989,
    "B200": 2250,
    "A100": 312,
    "MI250X": 191.5,  # of one die, which is a device
    "MI300X": 1307,
}


class Logs:
    """The logs from step `start` on; what an earlier attempt wrote of later steps is removed. Steps count finished updates.

    All methods raise DiskFull.
    """

    def __init__(
        self, run_dir: Path, start: int, timeline: Timeline, config: PretrainConfig, world: World, waited_s: Callable[[], float]
    ) -> None:
        """`waited_s`: seconds that the steps have waited for data so far."""
        self._metrics, self._board_dir, self._progress = run_dir / "metrics.jsonl", run_dir / "tensorboard", ProgressFile(run_dir)
        self.timeline, self.config, self.world, self._waited_s = timeline, config, world, waited_s
        records = truncate(self._metrics, start)
        self.last: dict[str, Any] = records[-1] if records else {}  # the last logged record
        part_steps = config.progress_part and max(config.progress_part * timeline.num_steps, FEWEST * config.log_every)
        self._watch = Watch(config.spike_factor, part_steps, timeline.steps(config.method.optimizer.warmup_epochs))
        for record in records:
            self._watch.see(record["step"], record)
        (student, teacher), peak = pretraining_flops(config), peak_flops(world.device)
        self._images_per_s_at_peak = peak and world.world_size * peak / (3 * student + teacher)
        with self._told():
            earlier = set(self._board_dir.glob("*"))
            self._board = SummaryWriter(str(self._board_dir), purge_step=start + 1, max_queue=QUEUE)
            self._files = [self._metrics, *set(self._board_dir.iterdir()) - earlier]  # of this attempt
            self._session_end = self._tell_hparams()
        self._first: tuple[int, float] | None = None  # the first step of this attempt and when it was through: start-up is no speed
        self._logged: tuple[int, float] | None = None
        self._waited_before = 0.0
        self._picture: tuple[int, Fetch] | None = None

    def step(self, step: int, values: Mapping[str, float]) -> None:
        """`step` is through; its `values` go to the metrics where it is one that is logged."""
        now = time.monotonic()
        if self._first is None:
            self._first = self._logged = step, now
            self._waited_before = self._waited_s()
        epoch, is_last = round(step / self.timeline.steps_per_epoch, 4), step == self.timeline.num_steps
        if is_due(step, self.config.log_every, self.timeline.num_steps):
            for warning in self._watch.see(step, values):
                log.warning(warning)
            spikes = {} if self.config.spike_factor is None else {"loss_spikes": self._watch.loss_spikes}
            self.last = {"step": step, "epoch": epoch, **values, **spikes, **self._measured(step, now)}
            append_line(self._metrics, self.last)
            with self._told():
                for name, value in self.last.items():
                    if name != "step" and value is not None:
                        self._board.add_scalar(f"pretrain/{name}", value, step)
                if is_last:
                    self._board._get_file_writer().add_summary(self._session_end)
        if self._picture is not None:
            (at, picture), self._picture = self._picture, None
            with self._told():
                self._board.add_image("views", picture.read(), at)
            self._keep(picture.read())
        if self._progress.is_due(is_last):
            speed = self._speed(self._first, step, now)
            eta = (self.timeline.num_steps - step) * self.config.batch / speed if speed else None
            progress = {"step": step, "num_steps": self.timeline.num_steps, "epoch": epoch, "loss": values["loss"]}
            self._progress.write({**progress, "images_per_s": speed, "eta_s": eta and round(eta, 1)})

    def pictures(self, step: int, views: Views, reconstructions: Sequence[Tensor]) -> None:
        """One row per sample: the first view, each reconstruction beside its target, the second view. Written when `step` is."""
        pairs = zip(reconstructions, views.targets, strict=True) if views.targets is not None else ()
        columns = [views.global1, *(image for pair in pairs for image in pair), views.global2]
        images = [denormalise(column[:PICTURE_ROWS].detach().float()).clamp(0, 1) for column in columns]
        grid = F.pad(torch.stack(images, dim=1), (0, 1, 0, 1), value=1.0)  # (rows, columns, 3, S + 1, S + 1)
        picture = grid.permute(2, 0, 3, 1, 4).flatten(3, 4).flatten(1, 2)
        times = max(1, round(PICTURE_PIXELS / grid.shape[-1]))
        self._picture = step, Fetch(picture.repeat_interleave(times, 1).repeat_interleave(times, 2))

    def _keep(self, picture: Tensor) -> None:
        """The newest picture (3, H, W) as a file: the report shows a run's `pictures/*.png`. Not synced, for no step is to wait for it."""
        path = self._metrics.with_name("pictures") / "views.png"
        temporary = path.with_name(".views.png")
        with told_when_full(path, None):
            path.parent.mkdir(exist_ok=True)
            pixels = picture.mul(255).round().to(torch.uint8).permute(1, 2, 0)
            Image.fromarray(pixels.numpy()).save(temporary, "PNG", compress_level=1)
            temporary.replace(path)

    def flush(self) -> None:
        """What is told is on the disk: a run that goes on from a checkpoint of now misses nothing, even if the node goes down."""
        with self._told():
            self._board.flush()
            for path in self._files:
                if path.exists():
                    sync(path)

    def images_per_s(self) -> float | None:
        """Over all steps of this attempt but the first; None where there were no more."""
        return None if self._first is None or self._logged is None else self._speed(self._first, *self._logged)

    def close(self) -> None:
        with contextlib.suppress(OSError) if sys.exception() else self._told():  # the error on its way out is the one to be told
            self._board.close()

    def _measured(self, step: int, now: float) -> dict[str, float | None]:
        """`MEASURED`, of the steps since the last record."""
        speed, waited = self._speed(self._logged, step, now), self._waited_s()
        num_steps = step - self._logged[0] if self._logged else 0
        wait = round((waited - self._waited_before) / num_steps, 6) if num_steps else None
        self._logged, self._waited_before = (step, now), waited
        mfu = {"mfu": speed and round(speed / self._images_per_s_at_peak, 4)} if self._images_per_s_at_peak else {}
        return {"images_per_s": speed, **mfu, "data_wait_s": wait, "memory_gb": round(memory_bytes(self.world.device) / 1e9, 3)}

    def _tell_hparams(self) -> Any:
        """For TensorBoard's table of runs: every setting. Returns what says that the run is complete.

        Without the description of an experiment, which in a sweep would be that of whichever run is read first: TensorBoard then
        gathers the columns from all runs, and the figures are the curves' last points.
        """
        _, begin, end = hparams(_flat(self.config.model_dump(mode="json", by_alias=True)), {})
        self._board._get_file_writer().add_summary(begin)
        return end

    @contextlib.contextmanager
    def _told(self) -> Iterator[None]:
        """The board writes in a thread of its own: its errors arrive at a later call."""
        with told_when_full(self._board_dir, None):
            yield

    def _speed(self, since: tuple[int, float] | None, step: int, now: float) -> float | None:
        if since is None or step == since[0]:
            return None
        return round((step - since[0]) * self.config.batch / max(1e-9, now - since[1]), 2)


class _Samples(NamedTuple):
    """Which images a batch has, without the images."""

    epoch: int
    positions: Tensor
    images: Tensor


class Late:
    """Reads each step's numbers one step late, when the device has them ready: on every rank, to stop at what was refused."""

    def __init__(
        self, logs: Logs | None, weights: Mapping[str, float], run_dir: Path, rank: int, keys: Callable[[Tensor], list[str]]
    ) -> None:
        """`weights` of terms in the loss, where not 1; `keys` of images, by their index."""
        self._logs, self._weights, self._folder, self._rank, self._keys = logs, weights, run_dir / "refused", rank, keys
        self._unread: tuple[int, _Samples, Report, dict[str, float], Observed | None] | None = None

    def put(self, step: int, batch: Batch, report: Report, scheduled: dict[str, float], observed: Observed | None) -> None:
        """Keep this step's report and read the one before. Raises FloatingPointError where its update was refused."""
        self.read()
        self._unread = step, _Samples(batch.epoch, batch.position, batch.index), report, scheduled, observed

    def flush(self) -> None:
        """Have on the disk what was read."""
        if self._logs:
            self._logs.flush()

    def read(self) -> None:
        """What is unread, waiting for the device. Raises FloatingPointError where the update was refused."""
        if self._unread is None:
            return
        (step, samples, report, scheduled, observed), self._unread = self._unread, None
        numbers = report.read()
        if numbers.refused:
            raise FloatingPointError(f"step {step}: {numbers.refused}; the update was not applied; {self._dump(step, samples, numbers)}")
        if self._logs:
            loss = sum(self._weights.get(name, 1.0) * term for name, term in numbers.terms.items())
            norms = {"grad_norm": numbers.grad_norm} | {f"grad_norm/{module}": norm for module, norm in numbers.grad_norms.items()}
            seen = observed.read() if observed else {}
            self._logs.step(step, {"loss": loss, **numbers.terms, **scheduled, **norms, **seen})

    def _dump(self, step: int, samples: _Samples, numbers: Numbers) -> str:
        """Write which samples this rank had; returns a sentence that says where. Nothing may hide the refusal itself."""
        bad = [rank for rank, values in enumerate(numbers.by_rank) if not all(map(math.isfinite, values.values()))]
        if bad and self._rank not in bad:
            return f"rank {bad[0]} lists its samples in {self._folder}"
        path = self._folder / f"step_{step}_rank_{self._rank}.json"
        terms = {name: value if abs(value) < float("inf") else str(value) for name, value in numbers.by_rank[self._rank].items()}
        told = {"step": step, "rank": self._rank, "reason": numbers.refused, "terms": terms, "epoch": samples.epoch}
        try:
            self._folder.mkdir(exist_ok=True)
            write_json(path, {**told, "positions": samples.positions.tolist(), "keys": self._keys(samples.images)})
        except Exception as error:
            return f"the list of this rank's samples could not be written: {error}"
        return f"{path} lists this rank's samples"


def truncate(path: Path, start: int) -> list[dict[str, Any]]:
    """Remove records of steps after `start` and a last line that is not whole; returns the records left."""
    if not path.exists():
        return []
    lines = path.read_text().splitlines(keepends=True)
    records = [(line, json.loads(line)) for line in lines if line.endswith("\n")]
    kept = [(line, record) for line, record in records if record["step"] <= start]
    if len(kept) < len(lines):
        write_atomic(path, "".join(line for line, _ in kept))
    return [record for _, record in kept]


def peak_flops(device: torch.device) -> float | None:
    """Of a GPU in bfloat16, per second; None for CPUs and for GPUs that `PEAK_TFLOPS` does not know."""
    if device.type != "cuda":
        return None
    name = torch.cuda.get_device_name(device)
    return next((tflops * 1e12 for part, tflops in PEAK_TFLOPS.items() if part in name), None)


def memory_bytes(device: torch.device) -> float:
    """The most so far: of the tensors on a GPU, of the process on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def forget_peak(device: torch.device) -> None:
    """`memory_bytes` of a GPU begins anew. Of a process it cannot."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)


def _flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """`{"a": {"b": 1}}` -> `{"a.b": 1}`; lists and nulls as text. A section that has a name is under its own one too."""
    found: dict[str, Any] = {}
    for name, value in values.items():
        if isinstance(value, dict):
            if "name" in value:
                found[prefix + name] = value["name"]
            found |= _flat(value, f"{prefix}{name}.")
        else:
            found[prefix + name] = value if isinstance(value, (str, int, float)) else json.dumps(value)
    return found
