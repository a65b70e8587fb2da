"""The checkpoints of a training run on disk: a directory for each step, with checksums."""

import json

from etils import epath

from slimconv_jax.console import say
from slimconv_jax.errors import InputError, require_integer
from slimconv_jax.files import checksum, is_address, list_files, read_json, verify_files

CHECKPOINTS = "checkpoints"
CHECKSUMS = "checksums.json"


def list_checkpoints(workdir: epath.Path) -> list[epath.Path]:
    """Lists the complete checkpoints of a training run, the oldest first.

    Raises:
      ValueError: if their directory cannot be read.
    """
    directory = workdir / CHECKPOINTS
    try:
        entries = list(directory.iterdir())
    except OSError as error:
        if isinstance(error, FileNotFoundError) or not workdir.is_dir():
            return []
        raise InputError(f"cannot read {directory}: {error.strerror or error}") from None
    complete = [path for path in entries if path.name.isascii() and path.name.isdigit()]
    # While a checkpoint is written, its name is more than a number; in an object store, a file is
    # missing instead.
    if is_address(directory):
        complete = [path for path in complete if (path / "commit_success.txt").exists()]
    return sorted(complete, key=lambda path: int(path.name))


def choose_checkpoints(workdir: epath.Path, step: int | None, count: int) -> list[epath.Path]:
    """Returns the last `count` complete checkpoints, up to that of a step, or to the newest.

    Raises:
      ValueError: if there are not so many.
    """
    there = list_checkpoints(workdir)
    if not there:
        raise InputError(f"{workdir / CHECKPOINTS} holds no checkpoint yet")
    steps = [int(path.name) for path in there]
    listed = ", ".join(map(str, steps))
    if step is not None and step not in steps:
        raise InputError(f"{workdir} has no checkpoint of step {step}; it has those of {listed}")
    end = len(there) if step is None else steps.index(step) + 1
    require_integer("average", count, 1)
    if count > end:
        raise InputError(
            f"{workdir} has no {count} checkpoints up to step {steps[end - 1]} to average; it has "
            f"those of {listed}, and config.checkpoints_to_keep says how many are kept"
        )
    return there[end - count : end]


def write_checksums(checkpoint: epath.Path) -> None:
    """Adds a file with the checksums of all items to a checkpoint that is about to be complete."""
    # Orbax still changes the files beside the items.
    files = {name: checksum(f) for name, f in list_files(checkpoint).items() if "/" in name}
    (checkpoint / CHECKSUMS).write_text(json.dumps(files))


def verify_checksums(checkpoint: epath.Path) -> None:
    """Checks that a checkpoint is as it was written.

    Raises:
      ValueError: if it is damaged, or its checksums are missing.
    """
    file = checkpoint / CHECKSUMS
    files = read_json(file)
    if not isinstance(files, dict):
        raise InputError(f"{file} is damaged: it has no checksums")
    items = [path for path in checkpoint.iterdir() if path.is_dir()]
    verify_files(checkpoint, files, of=items)


def newest_intact(workdir: epath.Path) -> int:
    """Finds the newest checkpoint whose files are as they were written.

    Damaged ones after it are moved out of the way, with a warning.

    Returns:
      Its step, or 0 if there are no checkpoints.

    Raises:
      ValueError: if all are damaged.
    """
    damaged = {}
    intact = 0
    for path in reversed(list_checkpoints(workdir)):
        try:
            verify_checksums(path)
        except InputError as error:
            damaged[path] = error
        else:
            intact = int(path.name)
            break
    if damaged and not intact:
        reasons = "; ".join(map(str, damaged.values()))
        raise InputError(
            f"no checkpoint in {workdir / CHECKPOINTS} can be used: {reasons}; to begin anew, "
            f"delete {workdir} or choose another work directory"
        )
    for path, error in damaged.items():
        aside = workdir / f"damaged-checkpoint-{path.name}"
        try:
            if aside.exists():
                aside.rmtree()
            path.rename(aside)
        except OSError as reason:
            raise InputError(f"cannot write to the work directory {workdir}: {reason}") from None
        say(
            f"warning: {error}; the checkpoint is now {aside}, and the run continues from the one "
            "before"
        )
    return intact
