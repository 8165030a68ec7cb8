"""Run an entry from the command line, under torchrun or as one process, without a cluster or the orchestrator.

    python -m equissl.pretrain config.json [--run-dir FOLDER] [--profile]
    torchrun --nproc-per-node 2 -m equissl.pretrain config.json [--run-dir FOLDER] [--profile]

SIGTERM or SIGUSR2 asks for an end at the next step boundary; the same command goes on from there. The markers are those of a run
folder: result.json, then COMPLETE. Exit codes: 0 complete, 85 stopped as asked, 2 bad input, 1 anything else; torchrun makes 1 of all
but 0.
"""

from __future__ import annotations

import argparse
import importlib
import json
import logging
import os
import signal
import sys
import time
import traceback
from pathlib import Path
from types import FrameType
from typing import Any, NoReturn

from pydantic import BaseModel, ValidationError

from equissl.data.shards import DataError
from equissl.files import DiskFull, write_atomic, write_json

STOPPED = 85
BAD_INPUT = 2
PROFILED = 5, 7  # steps: the first ones compile


def run(entry: str) -> NoReturn:
    """Parse the arguments, run the entry's `main`, write the markers and end the process."""
    rank = int(os.environ.get("RANK", "0"))
    logging.basicConfig(level=logging.INFO, format=f"%(asctime)s rank {rank} %(levelname)s %(name)s: %(message)s")
    try:
        code = _run(entry, rank)
    except ValidationError as error:
        code = _refuse(rank, "; ".join(f"{'.'.join(map(str, each['loc'])) or 'config'}: {each['msg']}" for each in error.errors()))
    except ValueError as error:
        code = _refuse(rank, str(error))
    except DiskFull as error:
        print(f"error: {error.strerror}", file=sys.stderr)
        code = 1
    except DataError as error:  # of this rank alone, perhaps
        print(f"error on rank {rank}: {error}", file=sys.stderr)
        code = 1
    except SystemExit as end:  # of argparse
        code = end.code if isinstance(end.code, int) else 1
    except BaseException:
        traceback.print_exc()
        code = 1
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)  # torch 2.15 with gloo aborts now and then while the interpreter ends (SPEED, trap 4)


def _run(entry: str, rank: int) -> int:
    module = importlib.import_module(entry)
    parser = argparse.ArgumentParser(prog=f"python -m {entry}", description=(module.__doc__ or "").partition("\n")[0])
    parser.add_argument("config", type=Path, help="JSON file")
    parser.add_argument("--run-dir", type=Path, help="run folder; default: the config file's")
    if "profile_steps" in module.Config.model_fields:
        first, last = PROFILED
        parser.add_argument("--profile", action="store_true", help=f"trace steps {first} to {last} of this attempt into the run folder")
    if "allow_incomplete" in module.Config.model_fields:
        parser.add_argument("--allow-incomplete", action="store_true", help="evaluate a run that is not complete, too")
    arguments = parser.parse_args()
    try:
        raw = json.loads(arguments.config.read_text())
    except FileNotFoundError:
        raise ValueError(f"there is no file {arguments.config}") from None
    except json.JSONDecodeError as error:
        raise ValueError(f"{arguments.config} is not JSON: {error}") from None
    if getattr(arguments, "allow_incomplete", False) and isinstance(raw, dict):
        raw["allow_incomplete"] = True
    config: dict[str, Any] = module.Config.model_validate(raw).model_dump(mode="json", by_alias=True)

    run_dir: Path = arguments.run_dir or arguments.config.absolute().parent
    if (run_dir / "COMPLETE").exists():
        _refuse_another(run_dir, config, module.Config)
        print(f"{run_dir} is complete")
        return 0
    if rank == 0:
        _keep_config(run_dir, config, module.Config)
    if getattr(arguments, "profile", False):
        config = config | {"profile_steps": list(PROFILED)}  # for this attempt: it is not kept

    asked: list[int] = []

    def ask(number: int, frame: FrameType | None) -> None:
        asked.append(number)

    for number in (signal.SIGTERM, signal.SIGUSR2):
        signal.signal(number, ask)
    result = module.main(config, run_dir, lambda: bool(asked))
    if result is None:
        print(f"stopped as asked by signal {asked[0] if asked else 'to another rank'}; the same command goes on")
        return STOPPED
    if rank == 0:
        write_json(run_dir / "result.json", result)
        write_atomic(run_dir / "COMPLETE", json.dumps({"time": time.time(), "config": config}) + "\n")
    return 0


def _keep_config(run_dir: Path, config: dict[str, Any], known: type[BaseModel]) -> None:
    """Write the resolved config. Raises ValueError where the folder holds a run of another one; operational fields may change."""
    run_dir.mkdir(parents=True, exist_ok=True)
    path = run_dir / "config.json"
    if (run_dir / "checkpoints").exists() and path.exists() and (changed := _changed(json.loads(path.read_text()), config, known)):
        raise ValueError(f"{run_dir} holds a run with other values of {', '.join(changed)}: give another --run-dir")
    write_json(path, config)


def _refuse_another(run_dir: Path, config: dict[str, Any], known: type[BaseModel]) -> None:
    """Raises ValueError where what is complete there is of another entry or of other settings: its result would pass for this one's.

    Its marker says of which; `config.json` may be the very file that was changed since. A marker of an earlier version does not say it.
    """
    try:
        before = json.loads((run_dir / "COMPLETE").read_text())["config"]
    except (ValueError, LookupError, TypeError):
        return
    try:
        changed = _changed(before, config, known)
    except ValidationError:
        raise ValueError(f"{run_dir} holds a complete run of something else: give another --run-dir") from None
    if changed:
        raise ValueError(f"{run_dir} is complete, with other values of {', '.join(changed)}: give another --run-dir")


def _changed(before: Any, config: dict[str, Any], known: type[BaseModel]) -> list[str]:
    """Fields that `before` has otherwise, but for operational ones; it may be of a time when later fields were not there."""
    resolved = known.model_validate(before).model_dump(mode="json", by_alias=True)
    operational = {
        field.alias or name
        for name, field in known.model_fields.items()
        if (field.json_schema_extra or {}).get("operational")  # type: ignore[union-attr]
    }
    return [name for name in config if name not in operational and resolved.get(name) != config[name]]


def _refuse(rank: int, message: str) -> int:
    if rank == 0:
        print(f"error: {message}", file=sys.stderr)
    return BAD_INPUT
