"""A lock for what holds a cache: one user at a time, always in the same thread."""

import threading
from types import TracebackType


class InUseError(RuntimeError):
    """An object was used while it was in use, or in another thread than before: a mistake of the calling program."""


class Exclusive:
    """Context manager around each use of an object, which `name` names in errors.

    MLX does not protect an array that is written in place from a second thread, and waits for the work of the thread
    that asks. So the object belongs to the thread that uses it first. Raises InUseError on entering; `check_thread`
    raises it where a generator goes on.
    """

    def __init__(self, name: str):
        self.name = name
        self._lock = threading.Lock()
        self._thread: threading.Thread | None = None

    def __enter__(self) -> None:
        if not self._lock.acquire(blocking=False):
            raise InUseError(f"{self.name} is in use; let that end, close its generator, or make another object")
        try:
            self._thread = self._thread or threading.current_thread()
            self.check_thread()
        except InUseError:
            self._lock.release()
            raise

    def __exit__(self, *exc: type[BaseException] | BaseException | TracebackType | None) -> None:
        self._lock.release()

    def check_thread(self) -> None:
        here = threading.current_thread()
        if self._thread not in (None, here):
            raise InUseError(
                f"{self.name} belongs to the thread {self._thread.name}, not to {here.name}; make one in each thread"
            )
