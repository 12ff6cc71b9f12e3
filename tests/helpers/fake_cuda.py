"""The CUDA runtime in Python, over host memory, for tests on machines without a GPU.

It keeps the promises that the calls in hcmen/runtime/backends/cuda.py rest on: what is queued on a stream runs when the
stream is waited for and not before; copies go only between a device and a page-locked host allocation, within their
bounds; what is queued during a capture runs only when its graph is launched. What was not given back is counted in
`alive`.
"""

from __future__ import annotations

import ctypes
from collections import Counter
from collections.abc import Callable
from typing import Any

Work = list[Callable[[], None]]
SUCCESS, MEMORY = 0, 2
_GIVEN_BACK = {
    "cudaFree": "device",
    "cudaFreeHost": "host",
    "cudaStreamDestroy": "stream",
    "cudaGraphDestroy": "graph",
    "cudaGraphExecDestroy": "executable",
}


class FakeCuda:
    """Stands in the place of the loaded libcudart. sm: compute capability. room: bytes of device memory."""

    def __init__(self, sm: int = 87, room: int = 1 << 30, devices: int = 1, error: int = SUCCESS):
        self.sm, self.room, self.devices, self.error = sm, room, devices, error
        self.things: dict[int, tuple[str, Any]] = {}
        """Address or handle -> what it is: memory, or the work of a stream or graph."""
        self.capturing: dict[int, Work | None] = {}
        self.calls: list[str] = []

    @property
    def alive(self) -> dict[str, int]:
        """What was made and not given back, by kind."""
        return dict(Counter(kind for kind, _ in self.things.values()))

    def __getattribute__(self, name: str) -> Any:
        if name.startswith("cuda"):
            object.__getattribute__(self, "calls").append(name)
        if name in _GIVEN_BACK:
            return lambda handle: self._give_back(handle, _GIVEN_BACK[name])
        return object.__getattribute__(self, name)

    def _give_back(self, handle: int, expected: str) -> int:
        assert self.things.pop(handle)[0] == expected
        return SUCCESS

    def _make(self, place: Any, kind: str, thing: Any) -> int:
        handle = ctypes.addressof(thing) if kind in ("device", "host") else 16 * len(self.calls)
        self.things[handle], place._obj.value = (kind, thing), handle
        return SUCCESS

    def _used(self) -> int:
        return sum(len(block) for kind, block in self.things.values() if kind == "device")

    def _block(self, address: int, size: int) -> tuple[str, Any]:
        for start, (kind, block) in self.things.items():
            if kind in ("device", "host") and start <= address and address + size <= start + len(block):
                return kind, block
        raise AssertionError(f"{size} bytes at {address:#x} are in no allocation")

    # --- for the fake TensorRT --------------------------------------------------------------------------------------

    def queue(self, stream: int, work: Callable[[], None]) -> None:
        """Puts `work` on a stream, or into the graph that is being captured on it."""
        captured = self.capturing.get(stream)
        (self.things[stream][1] if captured is None else captured).append(work)

    def on_device(self, address: int, size: int) -> Any:
        """The `size` bytes of device memory at `address`."""
        kind, block = self._block(address, size)
        assert kind == "device", f"{address:#x} is {kind} memory"
        return (ctypes.c_uint8 * size).from_buffer(block, address - ctypes.addressof(block))

    # --- the runtime ------------------------------------------------------------------------------------------------

    def cudaGetErrorName(self, code: int) -> bytes:
        return {2: b"cudaErrorMemoryAllocation", 900: b"cudaErrorStreamCaptureUnsupported"}.get(code, b"cudaErrorFake")

    def cudaGetErrorString(self, code: int) -> bytes:
        return f"error {code}".encode()

    def cudaGetLastError(self) -> int:
        return SUCCESS

    def cudaGetDeviceCount(self, count: Any) -> int:
        count._obj.value = self.devices
        return self.error

    def cudaDriverGetVersion(self, version: Any, found: int = 12080) -> int:
        version._obj.value = found
        return SUCCESS

    def cudaRuntimeGetVersion(self, version: Any) -> int:
        return self.cudaDriverGetVersion(version, 12060)

    def cudaDeviceGetAttribute(self, value: Any, attribute: int, device: int) -> int:
        return self.cudaDriverGetVersion(value, {75: self.sm // 10, 76: self.sm % 10}[attribute])

    def cudaMemGetInfo(self, free: Any, total: Any) -> int:
        free._obj.value, total._obj.value = self.room - self._used(), self.room
        return SUCCESS

    def cudaMalloc(self, pointer: Any, size: int) -> int:
        return MEMORY if self._used() + size > self.room else self.cudaHostAlloc(pointer, size, 0, "device")

    def cudaHostAlloc(self, pointer: Any, size: int, flags: int, kind: str = "host") -> int:
        # What was never written must not look like an answer.
        return self._make(pointer, kind, (ctypes.c_uint8 * size).from_buffer_copy(b"\xa5" * size))

    def cudaMemcpyAsync(self, target: int, source: int, size: int, kind: int, stream: int) -> int:
        kinds = {1: ("device", "host"), 2: ("host", "device")}[kind]
        assert tuple(self._block(address, size)[0] for address in (target, source)) == kinds
        self.queue(stream, lambda: ctypes.memmove(target, source, size) and None)
        return SUCCESS

    def cudaStreamCreateWithFlags(self, stream: Any, flags: int) -> int:
        return self._make(stream, "stream", [])

    def cudaStreamSynchronize(self, stream: int) -> int:
        assert self.capturing.get(stream) is None, "a wait breaks the capture"
        work = list(self.things[stream][1])
        self.things[stream][1].clear()
        for task in work:
            task()
        return SUCCESS

    def cudaStreamBeginCapture(self, stream: int, mode: int) -> int:
        assert self.capturing.get(stream) is None
        self.capturing[stream] = []
        return SUCCESS

    def cudaStreamEndCapture(self, stream: int, graph: Any) -> int:
        captured, self.capturing[stream] = self.capturing[stream], None
        return self._make(graph, "graph", captured)

    def cudaGraphInstantiateWithFlags(self, executable: Any, graph: Any, flags: int) -> int:
        return self._make(executable, "executable", list(self.things[graph.value][1]))

    def cudaGraphLaunch(self, executable: int, stream: int) -> int:
        for task in self.things[executable][1]:
            self.queue(stream, task)
        return SUCCESS
