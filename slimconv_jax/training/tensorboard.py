"""Writes metrics as events for TensorBoard, in the file format of tensorboardX.

Its `SummaryWriter` is not used: it writes in a thread, and hangs forever when that cannot write.
"""

import os
import sys
import time
import types
from collections.abc import Sequence

from etils import epath


class EventWriter:
    """A writer of scalars, in a new file in a directory.

    Args:
      directory: is created if it does not exist.
      first_step: TensorBoard drops what older files there say about later steps.

    Raises:
      OSError: by all methods, if a file cannot be written.
    """

    def __init__(self, directory: epath.Path, *, first_step: int):
        tensorboardx = import_tensorboardx()
        self._protos = tensorboardx.proto.event_pb2
        self._scalar = tensorboardx.summary.scalar
        directory.mkdir(parents=True, exist_ok=True)
        self._file = tensorboardx.event_file_writer.EventsWriter(
            os.fspath(directory / "events"), filename_suffix=f".{first_step}"
        )
        if first_step:
            start = self._protos.SessionLog(status=self._protos.SessionLog.START)
            self._write(step=first_step + 1, session_log=start)

    def write(self, lines: Sequence[dict]) -> None:
        """Writes the numbers of each line as SPLIT/NAME."""
        for line in lines:
            for name, value in line.items():
                if name not in ("epoch", "step", "split"):
                    scalar = self._scalar(f"{line['split']}/{name}", value)
                    self._write(step=line["step"], summary=scalar)
        self._file.flush()

    def close(self, status: int) -> None:
        """Closes the file, whose format has no place for how the run ended."""
        self._file.close()

    def _write(self, **fields) -> None:
        self._file.write_event(self._protos.Event(wall_time=time.time(), **fields))


def import_tensorboardx() -> types.ModuleType:
    """Imports tensorboardX without PyTorch, which it imports if it can, and which takes seconds."""
    hidden = "torch" not in sys.modules
    if hidden:
        sys.modules["torch"] = None
    try:
        import tensorboardX
        import tensorboardX.event_file_writer
        import tensorboardX.summary
    finally:
        if hidden:
            del sys.modules["torch"]
    return tensorboardX
