"""What it means when the operating system refuses memory, addresses or mappings, and what to do about it."""

from __future__ import annotations

import errno
import os
import resource
from pathlib import Path

from vattention.errors import DriverError, OutOfMemoryError
from vattention.memory import budget

# EFAULT is how populating a page ends when the file can get no memory for it.
_SHORTAGES = (errno.ENOMEM, errno.EFAULT, errno.ENOSPC)


def refusal(operation: str, error: OSError, nbytes: int) -> DriverError | OutOfMemoryError:
    """The error for a call that asked for `nbytes` of physical memory."""
    if error.errno not in _SHORTAGES:
        return DriverError(operation, error.errno or 0, error.strerror or str(error))
    return OutOfMemoryError(
        nbytes,
        budget.memory_info().available_nbytes,
        f"the system has no memory for the KV cache ({operation}: {error.strerror}); lower kv_memory or stop other "
        "programs",
    )


def mapping_refusal(nbytes: int, error: OSError) -> DriverError | OutOfMemoryError:
    """The error for mapping pages that exist already, which costs no memory but kernel mappings."""
    if error.errno != errno.ENOMEM:
        return refusal("mmap", error, nbytes)
    return OutOfMemoryError(
        nbytes, 0, "this process has no more kernel mappings; raise the system's vm.max_map_count (sysctl)"
    )


def reservation_refusal(nbytes: int, error: OSError) -> DriverError | OutOfMemoryError:
    """The error for reserving `nbytes` of addresses."""
    if error.errno != errno.ENOMEM:
        return refusal("reserve", error, nbytes)
    limit, _ = resource.getrlimit(resource.RLIMIT_AS)
    if limit == resource.RLIM_INFINITY:
        return OutOfMemoryError(
            nbytes, 0, "the system has no such range of addresses; lower max_num_seqs or max_model_len"
        )
    used = int(Path("/proc/self/statm").read_text().split()[0]) * os.sysconf("SC_PAGE_SIZE")
    return OutOfMemoryError(
        nbytes,
        limit - used,
        "the limit on addresses (ulimit -v) leaves no room to reserve the KV cache's range; addresses cost no "
        "memory, so lift it (ulimit -v unlimited), or lower max_num_seqs or max_model_len",
    )
