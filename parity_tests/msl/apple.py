"""A simple model of the time that a launch takes on an Apple GPU. Nothing in it was measured here, or on one of them.

    time = launch cost + bytes / bandwidth

bytes: 128-byte lines that memory must serve. A buffer of at most SHARED_CACHE bytes is served once, because the cache
that all cores share keeps it; of a larger one, every threadgroup fetches its own lines anew.
bandwidth: what Apple states for the chip. Real kernels stay below it, so this is a lower bound, for comparing two ways
to write a kernel. Left out: arithmetic, too few threads to fill the GPU, barriers, latency, the caches' own bandwidth.
"""

from parity_tests.msl.traffic import LINE, BufferTraffic, LaunchReport

# Seconds of GPU time for one more tiny kernel that waits for the one before. Reported, about 5.2 us, from 832 extra
# dispatches a token on an M-series Mac: github.com/antonellof/ferrox/issues/149. On an H200, 3.0 to 3.3 us (FACTS).
LAUNCH = 5e-6
SHARED_CACHE = 1 << 20  # an assumption, well below the last-level cache of each of these chips

# GB/s, Apple's technical specifications. Two figures where the chip is sold with fewer GPU cores.
BANDWIDTH = {
    "M1": 68,
    "M1 Pro": 200,
    "M1 Max": 400,
    "M1 Ultra": 800,
    "M2": 100,
    "M2 Pro": 200,
    "M2 Max": 400,
    "M2 Ultra": 800,
    "M3": 100,
    "M3 Pro": 150,
    "M3 Max, 30 cores": 300,
    "M3 Max": 400,
    "M3 Ultra": 819,
    "M4": 120,
    "M4 Pro": 273,
    "M4 Max, 32 cores": 410,
    "M4 Max": 546,
    "M5": 153,
    "M5 Pro": 307,
    "M5 Max, 32 cores": 460,
    "M5 Max": 614,
}


def memory_bytes(buffer: BufferTraffic) -> int:
    """Bytes of this buffer that memory must serve."""
    return LINE * (buffer.touched_lines if buffer.size <= SHARED_CACHE else buffer.fetched_lines)


def apple_time(report: LaunchReport, chip: str) -> float:
    """Seconds of a launch that was executed in trace mode, on a chip of BANDWIDTH."""
    if chip not in BANDWIDTH:
        raise ValueError(f"chip {chip!r}: one of {', '.join(BANDWIDTH)}")
    if not report.buffers:
        raise ValueError(f"{report.kernel}: a report of fast mode counts no bytes; execute it in trace mode")
    return LAUNCH + sum(memory_bytes(b) for b in report.buffers) / (BANDWIDTH[chip] * 1e9)
