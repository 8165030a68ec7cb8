"""The training step against its alternatives in the same run, as the tables of `RESULTS.md`.

    python tests/benchmarks/training.py [--only SECTION …] [--peer CHECKOUT] [--batch 8] [--rounds 7] …
    uv run --with omegaconf --with termcolor --with lightly python tests/benchmarks/training.py --peer CHECKOUT

Sections: auxiliary (the step with and without it, beside its share of the FLOPs), ranks (1, 2 and 4 gloo processes on the same global
batch), peers (a checkout of facebookresearch/dinov3, where --peer gives one, and lightly's DINO, where it is installed). Without a GPU:
CPU time of one core, float32 unless --precision says otherwise. With one: time on its clock, bfloat16; only one process. Variants are
measured in turn, round after round; the medians are shown. Augmentation is not part of a step, but shown for ours.

What is equal: ViT-S/16 (--backbone is for the other sections), batch, crops, precision, heads of 2048, 2048, 256 and 8192 prototypes,
AdamW, clipping, EMA. What is not: dinov3 has rotary positions instead of learned ones, two heads, KoLeo and Sinkhorn, and lets its
teacher's head see the masked patches only, where iBOT's centre is the mean over all patches; lightly's DINO has no masked patches
(ours without masks stands beside it).

dinov3's code and recipe are its own. On a CPU `Tensor.cuda` returns the tensor, the model is not sharded, and what is compiled
whatever the config says runs eagerly; bfloat16 comes from autocast around its forward and backward pass. A second row has it with
positions in float32 and without LayerScale, as ours: fewer operations.
"""

from __future__ import annotations

import argparse
import dataclasses
import gc
import importlib.util
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

ROOT = Path(__file__).parent.parent.parent
sys.path.insert(0, str(ROOT))

from equissl import distributed  # noqa: E402
from equissl.bench import Trainer  # noqa: E402
from equissl.config import BACKBONES, PretrainConfig  # noqa: E402
from equissl.data.loader import Batch  # noqa: E402
from equissl.data.synthetic import Synthetic  # noqa: E402
from equissl.distributed import World  # noqa: E402
from equissl.estimates import pretraining_flops  # noqa: E402

HIDDEN, BOTTLENECK, PROTOTYPES = 2048, 256, 8192
ON_GPU = torch.cuda.is_available()
MILLISECONDS = "ms per step, " + ("GPU" if ON_GPU else "CPU")


def our_config(arguments: argparse.Namespace, **changes: Any) -> PretrainConfig:
    method = {
        "name": "ibot",
        "head_hidden": HIDDEN,
        "head_bottleneck": BOTTLENECK,
        "prototypes": PROTOTYPES,
        "views": {"num_local": arguments.num_local, "local_size": arguments.local_side},
    }
    values: dict[str, Any] = {
        "data": "synthetic",
        "backbone": {"name": arguments.backbone, "drop_path": arguments.drop_path, "drop_path_mode": "batch"},
        "image_size": arguments.side,
        "method": method,
        "batch": arguments.batch,
        "group_size": min(8, arguments.batch),
        "num_steps": 10**6,
        "compile": arguments.compile,
        "precision": arguments.precision,
    }
    values["method"] |= changes.pop("method", {})
    return PretrainConfig.model_validate(values | changes)


WITH_AUXILIARY = {"transformation": "se2", "auxiliary": {"name": "reconstruction", "num_images": 2}}


class Ours:
    """Steps of the trainer on the same noise, under masks and drop path of their own."""

    def __init__(self, config: PretrainConfig, world: World, batch: Batch | None = None) -> None:
        self.trainer = Trainer(config, dataclasses.replace(world, units=[]))
        self.batch = batch or next(Synthetic(config, world.device).loader(0, 1, 0, 1))
        self.views = self.trainer.make_views(self.batch)
        self.num_steps = 0

    def step(self) -> None:
        self.last = self.trainer.update(self.num_steps, self.views, lambda _: None)
        self.num_steps += 1

    def augment(self) -> None:
        self.trainer.make_views(self.batch)


def interleaved(variants: dict[str, Callable[[], None]], rounds: int) -> dict[str, float]:
    """Milliseconds of each variant: the median over the rounds after the first."""
    taken: dict[str, list[float]] = {name: [] for name in variants}
    for number in range(rounds + 1):
        for name, variant in variants.items():
            gc.collect()
            begin = now()
            variant()
            if number:
                taken[name].append(1000 * (now() - begin))
            print(f"\r{number}/{rounds} {name}\033[K", end="", file=sys.stderr, flush=True)
    print("\r\033[K", end="", file=sys.stderr)
    return {name: statistics.median(values) for name, values in taken.items()}


def now() -> float:
    if ON_GPU:
        torch.cuda.synchronize()
        return time.perf_counter()
    return time.process_time()


def counted_gflops(step: Callable[[], None]) -> float:
    """Of matrix products, convolutions and attention."""
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):  # the CPU's fused attention is not counted
        step()
    return counter.get_total_flops() / 1e9


def table(title: str, head: list[str], rows: list[list[str]]) -> None:
    print(f"\n{title}\n\n| {' | '.join(head)} |\n|{'---|' * len(head)}")
    for row in rows:
        print(f"| {' | '.join(row)} |", flush=True)


# --- the auxiliary -----------------------------------------------------------------------------------------------------------


def auxiliary_section(arguments: argparse.Namespace, world: World) -> None:
    configs = {"iBOT": our_config(arguments), "iBOT and reconstruction": our_config(arguments, **WITH_AUXILIARY)}
    runs = {name: Ours(config, world) for name, config in configs.items()}
    times = interleaved({name: run.step for name, run in runs.items()}, arguments.rounds)
    views = interleaved({name: run.augment for name, run in runs.items()}, arguments.rounds)
    flops = {name: sum(a * b for a, b in zip((3, 1), pretraining_flops(config), strict=True)) for name, config in configs.items()}
    (base, *_), rows = configs, []
    for name in configs:
        more = [f"{each[name] / each[base] - 1:+.1%}" for each in (times, flops)]
        row = [f"{times[name]:.0f}", more[0], f"{flops[name] / 1e9:.1f}", more[1], f"{views[name]:.0f}"]
        rows.append([name, *row])
    table(f"The auxiliary, {described(arguments)}", ["what", MILLISECONDS, "more", "GFLOP per image", "more", "ms for views"], rows)


# --- ranks -------------------------------------------------------------------------------------------------------------------


def ranks_section(arguments: argparse.Namespace) -> None:
    """Each number of processes in turn, twice."""
    found: dict[int, list[dict[str, Any]]] = {1: [], 2: [], 4: []}
    for _ in range(2):
        for num, results in found.items():
            command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={num}", __file__, *sys.argv[1:]]
            environment = {**os.environ, "OMP_NUM_THREADS": "1"}
            done = subprocess.run([*command, "--rank"], env=environment, capture_output=True, text=True)
            if done.returncode:
                raise RuntimeError(done.stderr[-2000:])
            results.append(json.loads(done.stdout.splitlines()[-1]))
    rows = []
    times = {num: statistics.median(each["cpu_ms"] for each in results) for num, results in found.items()}
    for num, results in found.items():
        terms, expected = results[0]["terms"], found[1][0]["terms"]
        apart = max(abs(terms[name] / expected[name] - 1) for name in expected)
        wall = statistics.median(each["wall_ms"] for each in results)
        rows.append([str(num), f"{times[num]:.0f}", f"{times[num] / times[1] - 1:+.1%}", f"{wall:.0f}", f"{apart:.1e}"])
    head = ["processes", "CPU ms per step, all together", "more", "ms per step", "terms of the last step apart from one process"]
    table(f"Sharding over gloo on {os.cpu_count()} cores, {described(arguments)}", head, rows)


def one_rank(arguments: argparse.Namespace, world: World) -> None:
    """A process of the ranks section: its share of a batch that is the same on any number of ranks."""
    config = our_config(arguments, group_size=max(1, arguments.batch // 4), **WITH_AUXILIARY)
    whole = next(Synthetic(config, world.device).loader(0, 1, 0, 1))
    size = config.batch // world.world_size
    mine = slice(world.rank * size, (world.rank + 1) * size)
    cut = {name: getattr(whole, name)[mine] for name in ("index", "position", "label", "view1", "source2")}
    run = Ours(config, world, dataclasses.replace(whole, **cut, local=whole.local[:, mine]))
    run.step()
    distributed.barrier(world)
    begin, began = time.process_time(), time.perf_counter()
    for _ in range(arguments.rounds):
        run.step()
    terms = run.last.read().terms
    distributed.barrier(world)
    wall = time.perf_counter() - began
    cpu = torch.tensor([time.process_time() - begin])
    dist.all_reduce(cpu, group=world.cpu_group)
    if world.rank == 0:
        result = {"cpu_ms": 1000 * cpu.item() / arguments.rounds, "wall_ms": 1000 * wall / arguments.rounds, "terms": terms}
        print(json.dumps(result), flush=True)


# --- peers -------------------------------------------------------------------------------------------------------------------


def peers_section(arguments: argparse.Namespace, world: World) -> None:
    variants: dict[str, Any] = {"ours: iBOT": Ours(our_config(arguments), world)}
    if arguments.peer:
        variants["dinov3: SSLMetaArch"] = Dinov3(arguments, world.device)
        variants["dinov3: float32 positions, no LayerScale"] = Dinov3(arguments, world.device, plainer=True)
    if importlib.util.find_spec("lightly"):
        variants["ours: iBOT without masks"] = Ours(our_config(arguments, method={"mask_probability": 0.0}), world)
        variants["lightly: DINO"] = Lightly(arguments, world.device)
    else:
        print("lightly is not installed: its row is left out", file=sys.stderr)
    gflops = {} if arguments.compile else {name: counted_gflops(variant.step) for name, variant in variants.items()}
    times = interleaved({name: variant.step for name, variant in variants.items()}, arguments.rounds)
    ours = times["ours: iBOT"]
    rows = [[name, f"{each:.0f}", f"{each / ours:.2f}×", f"{gflops[name]:.0f}" if gflops else "–"] for name, each in times.items()]
    table(f"Peers, {described(arguments)}", ["what", MILLISECONDS, "against ours", "GFLOP counted"], rows)


class Dinov3:
    """facebookresearch/dinov3's training step: what its `do_train` does with a batch, without logging."""

    def __init__(self, arguments: argparse.Namespace, device: torch.device, plainer: bool = False) -> None:
        sys.path.insert(0, str(arguments.peer))
        if not ON_GPU:
            Tensor.cuda = lambda self, *_, **__: self  # type: ignore[assignment,method-assign]
        if not arguments.compile:
            torch.compiler.set_stance("force_eager")
        from dinov3.configs import get_default_config
        from dinov3.data import MaskingGenerator, collate_data_and_cast
        from dinov3.train.ssl_meta_arch import SSLMetaArch

        config = get_default_config()
        config.student.arch, config.student.drop_path_rate = "vit_small", arguments.drop_path
        if plainer:
            config.student.layerscale = None
        config.crops.global_crops_size, config.crops.local_crops_size = arguments.side, arguments.local_side
        config.crops.local_crops_number = arguments.num_local
        config.train.batch_size_per_gpu, config.train.compile = arguments.batch, arguments.compile
        config.compute_precision.param_dtype = "bf16" if arguments.precision == "bfloat16" else "fp32"
        for head in (config.dino, config.ibot):
            head.head_hidden_dim, head.head_bottleneck_dim, head.head_n_prototypes = HIDDEN, BOTTLENECK, PROTOTYPES
        with torch.device("meta"):
            self.model = SSLMetaArch(config)
        if plainer:
            for network in (self.model.student, self.model.teacher):
                network["backbone"].rope_embed.dtype = torch.float32
        if ON_GPU:
            self.model.prepare_for_distributed_training()
        self.model.to_empty(device=device)
        self.model.init_weights()
        self.model.train()
        optim = config.optim
        self.optimizer = torch.optim.AdamW(self.model.get_params_groups(), lr=1e-6, betas=(optim.adamw_beta1, optim.adamw_beta2))
        self.clip = optim.clip_grad
        self.casts = arguments.precision == "bfloat16" and not ON_GPU  # on GPUs its sharding does

        grid = arguments.side // config.student.patch_size
        samples = [
            (
                {
                    "global_crops": list(torch.randn(2, 3, arguments.side, arguments.side)),
                    "local_crops": list(torch.randn(arguments.num_local, 3, arguments.local_side, arguments.local_side)),
                },
                (),
            )
            for _ in range(arguments.batch)
        ]
        self.data = collate_data_and_cast(
            samples,
            mask_ratio_tuple=config.ibot.mask_ratio_min_max,
            mask_probability=config.ibot.mask_sample_probability,
            dtype=getattr(torch, arguments.precision),
            n_tokens=grid**2,
            mask_generator=MaskingGenerator(input_size=(grid, grid), max_num_patches=0.5 * grid * grid),
        )
        self.data["global_batch_size"] = arguments.batch
        self.data = {name: value.to(device) if isinstance(value, Tensor) else value for name, value in self.data.items()}

    def step(self) -> None:
        self.optimizer.zero_grad(set_to_none=True)
        with torch.autocast("cpu", torch.bfloat16, enabled=self.casts):
            self.model.forward_backward(self.data, teacher_temp=0.05, iteration=0)
        for network in self.model.student.values():
            nn.utils.clip_grad_norm_(network.parameters(), max_norm=self.clip)
        self.optimizer.step()
        self.model.update_ema(0.996)


class Lightly:
    """DINO put together from lightly's modules as its own benchmarks do: one pass for the global crops, one for the local."""

    def __init__(self, arguments: argparse.Namespace, device: torch.device) -> None:
        import timm
        from lightly.loss import DINOLoss
        from lightly.models.modules import DINOProjectionHead
        from lightly.models.utils import get_weight_decay_parameters, update_momentum

        self.update_momentum, self.num_local = update_momentum, arguments.num_local
        self.is_mixed = arguments.precision == "bfloat16"

        def network() -> nn.ModuleList:
            backbone = timm.create_model("vit_small_patch16_224", img_size=arguments.side, num_classes=0, dynamic_img_size=True)
            return nn.ModuleList([backbone, DINOProjectionHead(backbone.embed_dim, HIDDEN, BOTTLENECK, PROTOTYPES)]).to(device)

        self.student, self.teacher = network(), network().requires_grad_(False)
        self.teacher.load_state_dict(self.student.state_dict())
        self.criterion = DINOLoss(PROTOTYPES).to(device)
        if arguments.compile:
            for block in (*self.student[0].blocks, *self.teacher[0].blocks):
                block.compile()
        decayed, others = get_weight_decay_parameters(self.student)
        groups = [{"params": decayed, "weight_decay": 0.04}, {"params": others, "weight_decay": 0.0}]
        self.optimizer = torch.optim.AdamW(groups, lr=1e-6, fused=ON_GPU or None)
        b = arguments.batch
        self.large = torch.randn(2 * b, 3, arguments.side, arguments.side, device=device)
        self.small = torch.randn(arguments.num_local * b, 3, arguments.local_side, arguments.local_side, device=device)

    def step(self) -> None:
        with torch.autocast(self.large.device.type, torch.bfloat16, enabled=self.is_mixed):
            for mine, theirs in zip(self.student, self.teacher, strict=True):
                self.update_momentum(mine, theirs, 0.996)
            with torch.no_grad():
                targets = self._through(self.teacher, self.large)
            logits = torch.cat([self._through(self.student, crops) for crops in (self.large, self.small) if len(crops)])
            loss = self.criterion(list(targets.chunk(2)), list(logits.chunk(2 + self.num_local)), epoch=0)
        self.optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(self.student.parameters(), 3.0)
        self.optimizer.step()

    def _through(self, network: nn.ModuleList, images: Tensor) -> Tensor:
        backbone, head = network
        logits: Tensor = head(backbone.forward_features(images)[:, 0])
        return logits


# --- the command ---------------------------------------------------------------------------------------------------------------


def described(arguments: argparse.Namespace) -> str:
    crops = f"2 × {arguments.side} and {arguments.num_local} × {arguments.local_side}"
    how = f"{arguments.precision}, {'compiled' if arguments.compile else 'eager'}, drop path {arguments.drop_path:g}"
    return f"{arguments.backbone}, batch {arguments.batch}, crops {crops}, {how}"


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--only", nargs="+", choices=["auxiliary", "ranks", "peers"], help="sections; default: all")
    parser.add_argument("--peer", type=Path, help="a checkout of facebookresearch/dinov3")
    parser.add_argument("--backbone", choices=BACKBONES, default="vit_small_patch16_224")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--side", type=int, default=224, help="pixels of the global crops")
    parser.add_argument("--num-local", type=int, default=8, help="local crops")
    parser.add_argument("--local-side", type=int, default=96, help="pixels of the local crops")
    parser.add_argument("--drop-path", type=float, default=0.0, help="part of the batch that a branch leaves out")
    parser.add_argument("--precision", choices=["float32", "bfloat16"], default="bfloat16" if ON_GPU else "float32")
    parser.add_argument("--compile", action="store_true", help="what each compiles by its own means")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--rank", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    sections = arguments.only or ["auxiliary", "ranks", "peers"]
    if "peers" in sections and not arguments.rank and (arguments.peer or importlib.util.find_spec("lightly")):
        assert arguments.backbone == "vit_small_patch16_224", "the peers' backbone is ViT-S/16"
    torch.set_num_threads(1)
    torch.manual_seed(0)
    if arguments.rank or {"auxiliary", "peers"} & set(sections):
        world = distributed.init(our_config(arguments))
        if arguments.rank:
            one_rank(arguments, world)
        if "auxiliary" in sections and not arguments.rank:
            auxiliary_section(arguments, world)
        if "peers" in sections and not arguments.rank:
            peers_section(arguments, world)
        distributed.close()
    if "ranks" in sections and not arguments.rank:
        if ON_GPU:
            print("ranks: processes of one GPU would only take turns; left out", file=sys.stderr)
        else:
            ranks_section(arguments)
    sys.stdout.flush()
    os._exit(0)  # torch 2.15 with gloo aborts now and then while the interpreter ends


if __name__ == "__main__":
    main()
