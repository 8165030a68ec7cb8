"""Multinomial logistic regression on frozen features by L-BFGS (Oquab et al., 2023; the protocol for small sets).

Minimises C · Σ cross entropy + ½ ‖W‖², as scikit-learn does; the bias is not penalised. C is chosen, of `num_c` values, by the main
metric on the data set's tuning split, or on held-out training images where it has none (of equal ones the smallest C); then all training
images and these are fitted with it, as in DINOv2's code. Each fit begins at the one before. Features are not scaled; that they are
centred for the solver does not move the optimum. In float64.

`top1`, `mean_per_class` on the reported split. The state is not kept: a stopped evaluation goes on from cached features.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from equissl.board import PrecisionRecall
from equissl.classify import CHUNK, IGNORED, Reader, Tally, Variant, chunks, to_choose_on
from equissl.config import Logistic
from equissl.evals import Context

PROTOCOL = 1
MAIN = "top1"
HIGHER_IS_BETTER = True

HISTORY = 10
TOLERANCE = 1e-7  # of the largest derivative of the mean loss


def run(context: Context) -> dict[str, float]:
    """Raises ValueError for features that the encoder does not have, and for images without a label."""
    settings, task = context.settings, context.settings.task
    assert isinstance(task, Logistic)
    train, test = context.data.train, context.data.test
    reader = Reader(context, task, [Variant(1, task.mean_patch)])
    parts = to_choose_on(context.data, task.held_out, settings.seed)
    x, labels = reader.read(train, np.arange(train.num_images), reader.middle, f"features of {train.split}")
    x_test, truth = reader.read(test, np.arange(test.num_images), reader.middle, f"features of {test.split}")
    if context.world.rank != 0:
        return {}
    variant, num_classes = reader.variants[0], len(train.classes)
    x, x_test = variant.of(x, reader.width).to(context.device), variant.of(x_test, reader.width)
    there = labels != IGNORED
    kept, held = (rows[there[rows]] for rows in (torch.from_numpy(part).to(context.device) for part in parts))
    strengths = np.logspace(*task.log10_c, task.num_c).tolist()
    evaluations = 0

    def tick(stage: str, number: int) -> None:
        nonlocal evaluations
        evaluations += 1
        context.tick(stage, number, task.num_c + 1, evaluations)

    solution: Tensor | None = None
    solutions, tallies, num_unfinished = [], [], 0
    x_kept, x_held, labels_kept, labels_held = x[kept], x[held], labels[kept], labels[held]
    for number, c in enumerate(strengths):

        def beat(number: int = number) -> None:
            tick("logistic regression", number)

        solution, finished = fit(x_kept, labels_kept, num_classes, c, task.max_iterations, solution, beat)
        num_unfinished += not finished
        solutions.append(solution.cpu())
        tallies.append(score(solution, x_held, labels_held).of(context.data.main))
    on_held = torch.cat(tallies)
    best = int(on_held.argmax())  # the first of equal ones
    start = solutions[best].to(context.device)
    solution, finished = fit(
        x[there], labels[there], num_classes, strengths[best], task.max_iterations, start, lambda: tick("logistic regression", task.num_c)
    )
    decisions = PrecisionRecall()
    tally = score(solution, x_test, truth, decisions)
    decisions.write(context.run_dir)
    context.chosen.update(
        c=strengths[best],
        held_out=dict(zip((f"{c:.3g}" for c in strengths), on_held.tolist(), strict=True)),
        fits_not_converged=num_unfinished + (not finished),
    )
    return {"top1": tally.top1().item(), "mean_per_class": tally.mean_per_class().item()}


def fit(
    x: Tensor, labels: Tensor, num_classes: int, c: float, max_iterations: int, start: Tensor | None, beat: Callable[[], None]
) -> tuple[Tensor, bool]:
    """Features `(n, F)`, classes `(n,)` -> float64 `(classes, F + 1)`, the bias last, and whether it converged within the iterations.
    `beat` is called before each evaluation of the loss."""
    mean = x.mean(dim=0, dtype=torch.float64)  # no copy of all of it
    begin = torch.zeros(num_classes, x.shape[1] + 1, dtype=torch.float64, device=x.device) if start is None else start.clone()
    begin[:, -1] += begin[:, :-1] @ mean
    solution = begin.requires_grad_()
    solver = torch.optim.LBFGS(
        [solution],
        max_iter=max_iterations,
        max_eval=2 * max_iterations,
        history_size=HISTORY,
        tolerance_grad=TOLERANCE,
        tolerance_change=1e-13,
        line_search_fn="strong_wolfe",
    )

    def closure() -> Tensor:
        beat()
        penalty = solution[:, :-1].square().sum() / (2 * c * len(x))
        solution.grad = torch.autograd.grad(penalty, solution)[0]
        total = penalty.detach()
        for rows, classes in zip(torch.split(x, CHUNK), torch.split(labels, CHUNK), strict=True):
            logits = F.linear(rows.double() - mean, solution[:, :-1], solution[:, -1])
            loss = F.cross_entropy(logits, classes, reduction="sum") / len(x)
            solution.grad += torch.autograd.grad(loss, solution)[0]
            total = total + loss.detach()
        return total

    solver.step(closure)
    state = solver.state[solution]
    found = solution.detach().clone()
    found[:, -1] -= found[:, :-1] @ mean
    return found, state["n_iter"] < max_iterations and state["func_evals"] < 2 * max_iterations


def score(solution: Tensor, x: Tensor, truth: Tensor, decisions: PrecisionRecall | None = None) -> Tally:
    tally, start = Tally(1, len(solution), solution.device), 0
    for rows in chunks(x, solution.device):
        logits = F.linear(rows.double(), solution[:, :-1], solution[:, -1])
        tally.add(logits.argmax(dim=1, keepdim=True), truth[start : start + len(rows)])
        if decisions is not None:
            decisions.add(logits.softmax(dim=1), truth[start : start + len(rows)])
        start += len(rows)
    return tally
