"""How long the GPU worked, by CUDA events, asked of the driver's own library: around ONNX Runtime there is no torch.

The driver's streams and contexts are the CUDA runtime's, which ONNX Runtime is built on (CUDA Runtime API,
"Interactions with the CUDA Driver API").
"""

from __future__ import annotations

import ctypes

HANDLE = ctypes.c_void_p


class CudaClock:
    """A stream on the first GPU, and an event before and one after what is done there.

    Raises OSError where the driver refuses. `close` it after all that works on the stream.
    """

    def __init__(self) -> None:
        self._driver = ctypes.CDLL("libcuda.so.1")
        self._device, self._context = ctypes.c_int(), HANDLE()
        self._stream, self._began, self._ended = HANDLE(), HANDLE(), HANDLE()
        self._running = False
        self._do("cuInit", 0)
        self._do("cuDeviceGet", ctypes.byref(self._device), 0)
        self._do("cuDevicePrimaryCtxRetain", ctypes.byref(self._context), self._device)
        self._do("cuCtxSetCurrent", self._context)
        # One that waits for the default stream, which ONNX Runtime copies inputs on.
        self._do("cuStreamCreate", ctypes.byref(self._stream), 0)
        for event in (self._began, self._ended):
            self._do("cuEventCreate", ctypes.byref(event), 0)

    def _do(self, name: str, *arguments: object) -> None:
        status = getattr(self._driver, name)(*arguments)
        if status != 0:
            raise OSError(f"{name} of the NVIDIA driver answers {status}")

    @property
    def stream(self) -> int:
        """The stream's address, which ONNX Runtime and torch call it by."""
        return self._stream.value or 0

    def begin(self) -> None:
        """Mark the beginning of what is launched from now on."""
        self._driver.cuCtxSetCurrent(self._context)  # of this thread, which may not be the one that made it
        self._running = self._driver.cuEventRecord(self._began, self._stream) == 0

    def end(self) -> float | None:
        """Wait for what has been launched since `begin`; returns the GPU's seconds, None where the driver refuses."""
        milliseconds = ctypes.c_float()
        counted = (
            self._running
            and self._driver.cuEventRecord(self._ended, self._stream) == 0
            and self._driver.cuEventSynchronize(self._ended) == 0
            and self._driver.cuEventElapsedTime(ctypes.byref(milliseconds), self._began, self._ended) == 0
        )
        return milliseconds.value / 1e3 if counted else None

    def close(self) -> None:
        """Give back the stream, the events and the hold on the GPU's context."""
        for event in (self._began, self._ended):
            self._driver.cuEventDestroy_v2(event)
        self._driver.cuStreamDestroy_v2(self._stream)
        self._driver.cuDevicePrimaryCtxRelease_v2(self._device)


def cuda_clock() -> CudaClock | None:
    """A clock on the first GPU; None where the driver gives none."""
    try:
        return CudaClock()
    except (OSError, AttributeError):  # the second of a driver that has not all of these
        return None
