"""A fixed slice of ``tests/fuzz_packed.py``, which runs for as long as one likes."""

import resource

from fuzz_packed import fuzz


def test_mutated_packed_files_are_refused_or_read(tmp_path):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    found = fuzz(400, 0, tmp_path)
    assert found["refused"] > 250 and found["read"] > 5
    assert (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024 < 800  # MiB
