"""The thread that runs an engine core, so that a long step stalls nobody else."""

import threading
from collections import deque
from collections.abc import Callable

from farrier.runtime.core import EngineCore, last_deltas
from farrier.runtime.outputs import Delta
from farrier.runtime.request import Sequence
from farrier.targets.errors import OverloadedError


class EngineThread:
    """Steps `core` as long as there is work, and sleeps when there is none.

    `deliver` gets each step's deltas, in this thread. Every output that was submitted ends with a finished delta,
    whatever happens: abort, engine failure, stop. `max_queue` bounds the outputs that wait.
    """

    def __init__(self, core: EngineCore, deliver: Callable[[list[Delta]], None], max_queue: int) -> None:
        self._core = core
        self._deliver = deliver
        self._max_queue = max_queue
        self._inbox: deque[list[Sequence] | str] = deque()
        """Outputs of a request to add, or the id of one to abort."""
        # Reentrant, because a dropped stream aborts its request wherever garbage collection happens to run.
        self._wake = threading.Condition(threading.RLock())
        self._stopping = False
        self._thread = threading.Thread(target=self._run, name="farrier-engine", daemon=True)

    @property
    def healthy(self) -> bool:
        return self._thread.is_alive() and self._core.failure is None

    def start(self) -> None:
        self._thread.start()

    def submit(self, sequences: list[Sequence]) -> None:
        """Enqueues the outputs of one request. OverloadedError when too many wait or the thread is stopping,
        EngineError when the engine has failed."""
        with self._wake:
            self._core.check_alive()
            if self._stopping:
                raise OverloadedError("The engine is shutting down.")
            waiting = self._core.num_waiting + sum(len(item) for item in self._inbox if isinstance(item, list))
            if waiting >= self._max_queue:
                raise OverloadedError(f"{waiting} outputs wait already, and the queue holds {self._max_queue}.")
            self._inbox.append(sequences)
            self._wake.notify()

    def abort(self, request_id: str) -> None:
        """Ends a request before the next step; nothing happens if it is over."""
        with self._wake:
            self._inbox.append(request_id)
            self._wake.notify()

    def stop(self) -> None:
        """Aborts what is left and waits for the thread; returns after the step under way at the latest."""
        with self._wake:
            self._stopping = True
            self._wake.notify()
        if self._thread.is_alive():
            self._thread.join()

    def _run(self) -> None:
        core = self._core
        try:
            while core.failure is None:
                with self._wake:
                    self._wake.wait_for(lambda: self._inbox or core.has_work or self._stopping)
                    if self._stopping:
                        break
                    deltas = self._take_inbox()
                if core.has_work:
                    deltas += core.step()
                if deltas:
                    self._deliver(deltas)
                if not core.has_work:
                    core.check_idle()
        except Exception as error:
            self._deliver(core.fail(error))
        finally:
            self._close()

    def _take_inbox(self) -> list[Delta]:
        deltas: list[Delta] = []
        while self._inbox:
            item = self._inbox.popleft()
            if isinstance(item, str):
                deltas += self._core.abort(item)
            else:
                self._core.add(item)
        return deltas

    def _close(self) -> None:
        with self._wake:
            self._stopping = True
            never_added = [item for item in self._inbox if isinstance(item, list)]
            self._inbox.clear()
        failure = self._core.failure
        deltas = self._core.abort_all()
        for sequences in never_added:
            deltas += last_deltas(sequences, "abort" if failure is None else "error", failure)
        self._deliver(deltas)
