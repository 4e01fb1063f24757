"""`farrier serve` with a parrot for an engine, which a prompt with "!" kills; for tests that need a process that dies.

python tests/integration/parrot_server.py DIRECTORY [--hang-in-close] OPTIONS OF farrier serve...
"""

import sys
import threading
import time
from pathlib import Path
from typing import Any

from farrier.agent.cli import main
from farrier.runtime import assembly
from farrier.runtime.tokenizer import Tokenizer
from farrier.targets.engine import Batch
from farrier.targets.engine_dir import TOKENIZER_DIR, write_config
from farrier.targets.errors import EngineError
from tests.integration.parrot import Parrot


class MortalParrot(Parrot):
    def __init__(self, tokenizer: Tokenizer, *, hangs: bool) -> None:
        super().__init__(tokenizer)
        self._deadly = tokenizer.encode("!")[0]
        self._hangs = hangs

    def step(self, batch: Batch) -> Any:
        time.sleep(0.02)
        if self._deadly in batch.token_ids:
            time.sleep(0.5)
            raise EngineError("The parrot was shot; start it again.", code="device_failed")
        return super().step(batch)

    def close(self) -> None:
        if self._hangs:
            threading.Event().wait()


def run(directory: Path, *, hangs: bool) -> None:
    parrot = MortalParrot(Tokenizer.load(directory / TOKENIZER_DIR), hangs=hangs)
    write_config(directory, parrot.config)
    assembly.load_engine = lambda path: parrot
    main()


if __name__ == "__main__":
    hangs_in_close = "--hang-in-close" in sys.argv
    if hangs_in_close:
        sys.argv.remove("--hang-in-close")
    sys.argv.insert(1, "serve")
    run(Path(sys.argv[2]), hangs=hangs_in_close)
