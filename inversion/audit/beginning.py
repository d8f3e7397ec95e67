"""What decides a run: written down when it begins, compared when it goes on. Needs no torch.

Nothing in a saved state supplies a flag or a path. To go on the same command is given again with
`--resume FOLDER`; what decides the run is compared with what it began with.
"""

import hashlib
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from utils.errors import InputError
from utils.files import printable, write_json

#: Of run.json in a state: raised by one whenever a reader of the number before could misread it.
STATE_FORMAT = 1
#: Name of the state's folder in the folder of a run, and of the file that says what decides it.
STATE, RUN_FILE = "state", "run.json"
#: Flags that may change when a run goes on: what they decide is where and how fast it computes,
#: what it prints, and where results go. Names as in `vars(args)`.
SAFE = frozenset({
    "resume", "save_every", "print_freq", "id", "root", "nproc", "gpu",
    "multiprocessing_distributed", "world_size", "rank", "dist_url", "dist_backend", "workers",
    "shard", "offload_seeds", "dry_run", "traceback", "detect_anomaly", "verbose",
    "sweep_workers", "max_concurrent", "cpus_per_trial", "ngpus_per_trial", "ray_address",
    "search_resume", "cuda_graph",
})  # fmt: skip
#: Flags that name files of which the content decides; the file may have moved.
FILES = ("checkpoint", "truth", "labels", "model", "lpips_weights", "simulation_checkpoint")


@dataclass(frozen=True)
class Beginning:
    """Says what decides a run: it is written when the run begins and compared when it goes on."""

    #: Every flag with its value, but those in SAFE and FILES.
    settings: Mapping[str, Any]
    #: Flag in FILES → SHA-256 of every file that it names.
    inputs: Mapping[str, list[str]]


def beginning_of(record: Mapping[str, object]) -> Beginning:
    """Return what decides a run of these flags; reads the files that they name.

    record: every flag with its value, as in `Settings.record`.
    """
    settings = {name: v for name, v in record.items() if name not in SAFE and name not in FILES}
    inputs = {}
    for flag in FILES:
        given = record.get(flag)
        names = given if isinstance(given, list | tuple) else [given]
        digests = [_digest(str(name)) for name in names if name is not None]
        if digests:
            inputs[flag] = digests
    return Beginning(json.loads(json.dumps(settings, default=str)), inputs)


def _digest(name: str) -> str:
    """Return the SHA-256 of a file; of the text itself where no such file exists."""
    name = name.rpartition(":")[0] if not os.path.isfile(name) and ".py:" in name else name
    try:
        with open(name, "rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError:
        return hashlib.sha256(name.encode(errors="surrogateescape")).hexdigest()


def check_resumable(record: Mapping[str, object]) -> None:
    """Refuse to go on with a run that these flags do not continue; do nothing without --resume.

    Needs no torch. Raises InputError, naming the flag that changed or what is wrong.
    """
    if record.get("resume") is None:
        return
    if record.get("save_every") == 0:
        raise InputError("--save-every 0: a run that goes on is saved on; leave it out")
    folder = str(record["resume"])
    state = Path(folder, STATE)
    if not Path(folder).is_dir():
        raise InputError(f"--resume {folder}: no such folder; give the folder of a run's results")
    if not state.is_dir():
        raise InputError(
            f"--resume {folder}: holds no saved state: the run ended whole, or it was begun with "
            "--save-every 0; start it anew"
        )
    before, now = _read(state / RUN_FILE, folder), beginning_of(record)
    for flag in [*before.inputs, *now.inputs]:
        if before.inputs.get(flag) != now.inputs.get(flag):
            raise InputError(
                f"--{_flag(flag)} {_shown(record.get(flag))}: is not the file that the run in "
                f"{folder} began with; give that file, or start the run anew"
            )
    for name in [*before.settings, *now.settings]:
        old, new = before.settings.get(name), now.settings.get(name)
        if old != new:
            given = (
                f"--{_flag(name)}"
                if new is True or new is False
                else f"--{_flag(name)} {_shown(new)}"
            )
            began = f"with {_shown(old)}"
            if old is True or old is False:
                began = "with it" if old else "without it"
            raise InputError(
                f"{given}: the run in {folder} began {began}; give the same, or start the run anew"
            )


def _flag(name: str) -> str:
    return printable(name.replace("_", "-"))[:60]


def _shown(value: object) -> str:
    return printable(str(value))[:120]


def _read(path: Path, folder: str) -> Beginning:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        right = content["format"] == STATE_FORMAT
        settings, inputs = content["settings"], content["inputs"]
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise InputError(
            f"--resume {folder}: {path.name} of its state is missing or damaged; start the run anew"
        ) from error
    if not right or not isinstance(settings, dict) or not isinstance(inputs, dict):
        raise InputError(
            f"--resume {folder}: its state was saved by another version; start the run anew"
        )
    return Beginning(settings, inputs)


def write_beginning(state: Path, record: Mapping[str, object]) -> None:
    """Write down in the folder `state` what decides a run of these flags."""
    write_json({"format": STATE_FORMAT, **vars(beginning_of(record))}, state / RUN_FILE)
