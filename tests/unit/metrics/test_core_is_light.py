"""Weight rules and metrics import neither torch nor scipy."""

from __future__ import annotations

import subprocess
import sys


def test_importing_the_core_loads_no_heavy_library():
    code = (
        "import sys, fedalign.aggregation, fedalign.aggregation.adapters,"
        " fedalign.aggregation.clients, fedalign.metrics.attainable,"
        " fedalign.metrics.pairwise, fedalign.metrics.intervals;"
        " print(sorted({'torch', 'transformers', 'peft', 'trl', 'ray', 'scipy', 'flwr'}"
        " & set(sys.modules)))"
    )
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    )
    assert result.stdout.strip() == "[]"
