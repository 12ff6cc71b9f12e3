"""The CUDA runtime in Python, over host memory, for tests on machines without a GPU.

It keeps the promises that the calls in hcmen/runtime/backends/cuda.py rest on: what is queued on a stream runs when the
stream is waited for and not before; copies go only between a device and a page-locked host allocation, within their
bounds; what is queued during a capture runs only when its graph is launched. What was not given back is counted in
`alive`.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from typing import Any

SUCCESS, INVALID, MEMORY, INVALID_RESOURCE, CAPTURE_INVALIDATED = 0, 1, 2, 400, 901


class FakeCuda:
    """Stands in the place of the loaded libcudart. sm: compute capability. room: bytes of device memory."""

    def __init__(self, sm: int = 87, room: int = 1 << 30, devices: int = 1, error: int = SUCCESS):
        self.sm, self.room, self.devices, self.error = sm, room, devices, error
        self.memory: dict[int, tuple[str, Any]] = {}
        self.streams: dict[int, list[Callable[[], None]]] = {}
        self.capturing: dict[int, list[Callable[[], None]] | None] = {}
        self.graphs: dict[int, list[Callable[[], None]]] = {}
        self.executables: dict[int, list[Callable[[], None]]] = {}
        self.calls: list[str] = []
        self._next = 0x1000

    @property
    def alive(self) -> dict[str, int]:
        """What was made and not given back."""
        counts = {
            "memory": len(self.memory),
            "streams": len(self.streams),
            "graphs": len(self.graphs),
            "executables": len(self.executables),
        }
        return {name: count for name, count in counts.items() if count}

    def __getattribute__(self, name: str) -> Any:
        if name.startswith("cuda"):
            object.__getattribute__(self, "calls").append(name)
        return object.__getattribute__(self, name)

    # --- for the fake TensorRT --------------------------------------------------------------------------------------

    def queue(self, stream: int, work: Callable[[], None]) -> None:
        """Puts `work` on a stream, or into the graph that is being captured on it."""
        captured = self.capturing.get(stream)
        (self.streams[stream] if captured is None else captured).append(work)

    def on_device(self, address: int, size: int) -> Any:
        """The `size` bytes of device memory at `address`."""
        kind, block = self._block(address, size)
        assert kind == "device", f"{address:#x} is {kind} memory"
        return (ctypes.c_uint8 * size).from_buffer(block, address - ctypes.addressof(block))

    def _block(self, address: int, size: int) -> tuple[str, Any]:
        for start, (kind, block) in self.memory.items():
            if start <= address and address + size <= start + len(block):
                return kind, block
        raise AssertionError(f"{size} bytes at {address:#x} are in no allocation")

    def _handle(self) -> int:
        self._next += 0x10
        return self._next

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

    def cudaDriverGetVersion(self, version: Any) -> int:
        version._obj.value = 12080
        return SUCCESS

    def cudaRuntimeGetVersion(self, version: Any) -> int:
        version._obj.value = 12060
        return SUCCESS

    def cudaDeviceGetAttribute(self, value: Any, attribute: int, device: int) -> int:
        value._obj.value = {75: self.sm // 10, 76: self.sm % 10}[attribute]
        return SUCCESS

    def cudaMemGetInfo(self, free: Any, total: Any) -> int:
        used = sum(len(block) for kind, block in self.memory.values() if kind == "device")
        free._obj.value, total._obj.value = self.room - used, self.room
        return SUCCESS

    def _allocate(self, pointer: Any, size: int, kind: str) -> int:
        block = (ctypes.c_uint8 * size)()
        ctypes.memset(block, 0xA5, size)  # what was never written must not look like an answer
        self.memory[ctypes.addressof(block)] = (kind, block)
        pointer._obj.value = ctypes.addressof(block)
        return SUCCESS

    def cudaMalloc(self, pointer: Any, size: int) -> int:
        used = sum(len(block) for kind, block in self.memory.values() if kind == "device")
        return MEMORY if used + size > self.room else self._allocate(pointer, size, "device")

    def cudaHostAlloc(self, pointer: Any, size: int, flags: int) -> int:
        return self._allocate(pointer, size, "host")

    def _free(self, address: int, expected: str) -> int:
        kind, _ = self.memory.pop(address)
        assert kind == expected
        return SUCCESS

    def cudaFree(self, address: int) -> int:
        return self._free(address, "device")

    def cudaFreeHost(self, address: int) -> int:
        return self._free(address, "host")

    def cudaMemcpyAsync(self, target: int, source: int, size: int, kind: int, stream: int) -> int:
        kinds = {1: ("device", "host"), 2: ("host", "device")}[kind]
        assert tuple(self._block(address, size)[0] for address in (target, source)) == kinds
        self.queue(stream, lambda: ctypes.memmove(target, source, size) and None)
        return SUCCESS

    def cudaStreamCreateWithFlags(self, stream: Any, flags: int) -> int:
        stream._obj.value = self._handle()
        self.streams[stream._obj.value] = []
        return SUCCESS

    def cudaStreamSynchronize(self, stream: int) -> int:
        assert self.capturing.get(stream) is None, "a wait breaks the capture"
        work, self.streams[stream] = self.streams[stream], []
        for task in work:
            task()
        return SUCCESS

    def cudaStreamDestroy(self, stream: int) -> int:
        del self.streams[stream]
        return SUCCESS

    def cudaStreamBeginCapture(self, stream: int, mode: int) -> int:
        assert self.capturing.get(stream) is None
        self.capturing[stream] = []
        return SUCCESS

    def cudaStreamEndCapture(self, stream: int, graph: Any) -> int:
        captured, self.capturing[stream] = self.capturing[stream], None
        graph._obj.value = self._handle()
        self.graphs[graph._obj.value] = captured or []
        return SUCCESS

    def cudaGraphInstantiateWithFlags(self, executable: Any, graph: Any, flags: int) -> int:
        executable._obj.value = self._handle()
        self.executables[executable._obj.value] = list(self.graphs[graph.value])
        return SUCCESS

    def cudaGraphLaunch(self, executable: int, stream: int) -> int:
        for task in self.executables[executable]:
            self.queue(stream, task)
        return SUCCESS

    def cudaGraphExecDestroy(self, executable: int) -> int:
        del self.executables[executable]
        return SUCCESS

    def cudaGraphDestroy(self, graph: int) -> int:
        del self.graphs[graph]
        return SUCCESS
