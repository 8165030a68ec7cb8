"""The model card of an export: what the weights are, the code that loads them, and what they came from. Markdown."""

from __future__ import annotations

import importlib.metadata
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from equissl.config import PretrainConfig

Shapes = Mapping[str, tuple[int, ...]]  # of the tensors in heads.safetensors


def card(config: PretrainConfig, told: Mapping[str, Any], heads: Shapes, about: Mapping[str, Any]) -> str:
    """`told`: what `export` returns; `about`: what it was given."""
    warnings = [f"**{text}**" for text in (about.get("warning"), *told["notes"]) if text]
    parts = [
        "---\nlibrary_name: timm\nlicense: apache-2.0\n---",
        f"# {told['run']}",
        _what(config, told),
        *warnings,
        f"## Use\n\nIn this folder, with timm and safetensors alone:\n\n```python\n{code(config, heads)}```",
        f"## Results\n\n{_losses(told)}\n\n{_evaluations(told, about)}",
        f"## Training\n\n{_training(config, told)}",
        f"## Files\n\n{_files(told, heads)}",
        "Licence: Apache-2.0, that of the code that made it. What the licence of the training images asks for stays with you.",
    ]
    return "\n\n".join(parts) + "\n"


def code(config: PretrainConfig, heads: Shapes) -> str:
    """Loads everything with plain timm; the tests run it."""
    from equissl.photometry import MEAN, STD

    facts, arguments = config.backbone.facts, ", ".join(f"{name}={value}" for name, value in timm_arguments(config).items())
    stem = [
        "model.conv1 = torch.nn.Conv2d(3, 64, kernel_size=3, padding=1, bias=False)  # the stem for small images, without max-pool",
        "model.maxpool = torch.nn.Identity()",
    ]
    lines = [
        "import timm",
        "import torch",
        "import torch.nn.functional as F",
        "from safetensors.torch import load_file",
        "",
        f'model = timm.create_model("{config.backbone.name}", {arguments})',
        *(stem if facts.stem == "cifar" else []),
        'model.load_state_dict(load_file("model.safetensors"))',
        "model.eval()",
        "",
        f"images = torch.rand(2, 3, {config.side}, {config.side})  # RGB in [0, 1]; put yours here",
        f"mean, std = (torch.tensor(values).view(3, 1, 1) for values in ({list(MEAN)}, {list(STD)}))",
        "with torch.inference_mode():",
    ]
    if facts.kind == "resnet":
        lines.append(f"    pooled = model((images - mean) / std)  # (images, {facts.dim})")
        if config.d_equi:
            lines += [
                '    split = load_file("split.safetensors")',
                '    z_inv = F.linear(pooled, split["inv.weight"], split["inv.bias"])  # (images, d_inv)',
                '    z_equi = F.linear(pooled, split["equi.weight"], split["equi.bias"])  # (images, d_equi)',
            ]
        else:
            lines.append("    z_inv = pooled  # there is no split")
        return "\n".join(lines) + "\n"
    lines += [
        f"    tokens = model.forward_features((images - mean) / std)  # (images, 1 + patches, {facts.dim}), normed",
        "    cls, patches = tokens[:, 0], tokens[:, 1:]",
    ]
    if config.d_split:
        lines += [
            '    split = load_file("split.safetensors")',
            '    z_inv = F.linear(cls, split["inv.weight"], split["inv.bias"])  # (images, d_inv)',
            '    z_inv_patches = F.linear(patches, split["inv.weight"], split["inv.bias"])',
            '    z_equi = F.linear(patches, split["equi.weight"], split["equi.bias"])  # (images, patches, d_equi)',
        ]
    else:
        lines.append("    z_inv, z_inv_patches = cls, patches  # there is no split")
    of_heads = _head_code(config, heads)
    if of_heads:
        lines += ['    heads = load_file("heads.safetensors")', "", *of_heads]
    return "\n".join(lines) + "\n"


def _head_code(config: PretrainConfig, heads: Shapes) -> list[str]:
    """Of `heads.PrototypeHead` and `heads.Expander`; other heads are in the file, without code."""
    lines = []
    if "head.prototypes" in heads:
        first, *later = _linear_layers("head", heads)
        lines += [
            "    def unit(x):  # the head up to its last layer",
            f'        x = F.linear(x, heads["head.mlp.{first}.weight"], heads["head.mlp.{first}.bias"])',
            f"        for layer in {tuple(later)}:",
            '            x = F.linear(F.gelu(x), heads[f"head.mlp.{layer}.weight"], heads[f"head.mlp.{layer}.bias"])',
            "        return F.normalize(x, dim=-1)",
            "",
            '    logits = F.linear(unit(z_inv), F.normalize(heads["head.prototypes"], dim=-1))  # (images, prototypes)',
        ]
        if config.d_head:
            equi = 'F.linear(unit(patches), F.normalize(heads["head.equi_prototypes"], dim=-1))'
            lines.append(f"    z_equi = {equi}  # (images, patches, d_equi)")
    expanders = [name for name in ("expander", "inv", "equi") if f"{name}.mlp.1.running_mean" in heads]
    if expanders:
        *hidden, last = _linear_layers(expanders[0], heads)
        lines += [
            "    def hidden(x, name):  # of an expander, with the moving averages of its batch norms",
            f"        for layer in {tuple(hidden)}:",
            '            x = F.linear(x, heads[f"{name}.mlp.{layer}.weight"])',
            '            norm = {of: heads[f"{name}.mlp.{layer + 1}.{of}"] for of in ("running_mean", "running_var", "weight", "bias")}',
            '            x = (x - norm["running_mean"]) * (norm["running_var"] + 1e-5).rsqrt()',
            '            x = F.relu(x * norm["weight"] + norm["bias"])',
            "        return x",
            "",
        ]
        for name in expanders:
            read = 'F.linear(cls, split["equi.weight"], split["equi.bias"])' if name == "equi" else "z_inv"
            lines.append(f'    embedding_{name} = F.linear(hidden({read}, "{name}"), heads["{name}.mlp.{last}.weight"])')
        if config.d_head:
            lines.append('    z_equi = F.linear(hidden(patches, "expander"), heads["expander.equi.weight"])  # (images, patches, d_equi)')
    return lines


def _linear_layers(name: str, heads: Shapes) -> list[int]:
    """Their numbers in the MLP of a head."""
    return sorted(int(key.split(".")[-2]) for key, shape in heads.items() if key.startswith(f"{name}.mlp.") and len(shape) == 2)


def timm_arguments(config: PretrainConfig) -> dict[str, float]:
    facts, scale = config.backbone.facts, config.backbone.layer_scale
    if facts.kind == "resnet":
        return {"num_classes": 0}
    arguments: dict[str, float] = {
        "img_size": config.side,
        "patch_size": facts.patch_size,
        "depth": facts.depth,
        "num_classes": 0,
    }
    return arguments if scale is None else {**arguments, "init_values": scale}


def without_places(config: PretrainConfig) -> dict[str, Any]:
    """The backbone's settings, with the file's name for its path on this machine."""
    settings = config.backbone.model_dump(mode="json", by_alias=True)
    if config.backbone.weights is not None:
        settings["weights"]["file"] = "/" + Path(config.backbone.weights.file).name
    return settings


def _what(config: PretrainConfig, told: Mapping[str, Any]) -> str:
    facts, auxiliary = config.backbone.facts, config.auxiliary
    learnt = f"learnt without labels by {config.method.name}"
    if config.backbone.weights is not None:
        learnt += f", from published weights on ({Path(config.backbone.weights.file).name})"
    if auxiliary is not None:
        along = f" along {config.transformation.name}" if config.transformation else ""
        learnt += f" with {auxiliary.title}{along} (lambda {auxiliary.weight:g})"
    if config.d_head:
        learnt += f": the head has {config.d_head} equivariant outputs of each patch token, z_equi"
    elif config.d_equi:
        learnt += (
            f": of {config.method.representation} linear features of each token {config.d_equi} are equivariant, z_equi, the others z_inv"
        )
    of = "" if told["num_steps"] is None else f" of {told['num_steps']}"
    state = f"The run is complete: {told['step']} steps."
    if not told["is_complete"]:
        state = f"**The run is not finished: these are the weights of its newest checkpoint, after step {told['step']}{of}.**"
    elif told["step"] != told["num_steps"]:
        state = f"**An earlier checkpoint of a complete run: after step {told['step']}{of}.**"
    form = f"as in timm, images of {config.side} pixels in patches of {facts.patch_size}, {facts.depth} blocks"
    if facts.kind == "resnet":
        stem = ", with a first convolution of 3×3 pixels and no max-pool" if facts.stem == "cifar" else ""
        form = f"as in timm{stem}, images of {config.side} pixels"
    return f"The {told['of']} of a pretraining: {config.backbone.name} {form}, {facts.dim} dimensions, {learnt}. {state}"


def _losses(told: Mapping[str, Any]) -> str:
    rows = [(name, f"{value:.6g}") for name, value in told["losses"].items() if name != "step"]
    return _table(("training", f"step {told['losses']['step']}"), rows) if rows else "No losses were logged."


def _evaluations(told: Mapping[str, Any], about: Mapping[str, Any]) -> str:
    if told["of"] == "student" or not told["is_complete"]:
        return "Evaluations are of the teacher of a complete run: there are none of these weights."
    rows = [
        (name, f"{value:.6g}", f"{each['dataset']}, {each['protocol']}, run {each['id']}")
        for each in about.get("evaluations", [])
        for name, value in each["metrics"].items()
    ]
    return _table(("evaluation", "value", "on"), rows) if rows else "No evaluation of it is complete."


def _training(config: PretrainConfig, told: Mapping[str, Any]) -> str:
    data, made_by = told["data"], told["code"]
    made = "not recorded"
    if made_by:
        commit = f"commit {made_by['commit']}" if made_by.get("commit") else "no commit"
        made = f"{commit}{', with uncommitted changes' if made_by.get('dirty') else ''}, hash {made_by['hash']}"
    trained_with = ", ".join(f"{name} {version}" for name, version in told["versions"].items())
    fields = PretrainConfig.model_fields.items()
    identity = [name for name, each in fields if not (isinstance(each.json_schema_extra, dict) and "operational" in each.json_schema_extra)]
    settings = config.model_dump(mode="json", by_alias=True, include=set(identity))
    settings |= {"data": data["name"], "backbone": without_places(config)}
    written_by = ", ".join(f"{name} {importlib.metadata.version(name)}" for name in ("equihpc", "torch", "timm"))
    lines = [
        f"- Images: {data['name']}, sha256 of the manifest {data['manifest_sha256'] or 'not known here'}",
        f"- Code: {made}",
        f"- Trained with {trained_with}",
        f"- This folder was written by {written_by}",
        "- Settings:",
    ]
    return "\n".join(lines) + f"\n\n```json\n{json.dumps(settings, indent=1)}\n```"


def _files(told: Mapping[str, Any], heads: Shapes) -> str:
    contents = {
        "model.safetensors": "the encoder, with timm's keys",
        "split.safetensors": "the linear layers that give z_inv and z_equi of each token",
        "heads.safetensors": ", ".join(f"{name} {shape}" for name, shape in sorted(heads.items())),
        "config.json": "all settings of the run",
    }
    rows = [(name, f"{file['bytes']:,}", file["sha256"], contents[name]) for name, file in told["files"].items()]
    return _table(("file", "bytes", "sha256", "content"), rows)


def _table(heading: tuple[str, ...], rows: Iterable[tuple[str, ...]]) -> str:
    return "\n".join(f"| {' | '.join(cells)} |" for cells in (heading, ("---",) * len(heading), *rows))
