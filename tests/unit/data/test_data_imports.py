"""The data room loads quickly: heavy libraries only come in when a format needs them."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path


def test_no_heavy_library_at_import() -> None:
    code = (
        "import sys\n"
        "import fedalign.data.load, fedalign.data.partition, fedalign.data.preferences\n"
        "import fedalign.data.describe\n"
        "heavy = {'torch', 'transformers', 'peft', 'trl', 'ray', 'datasets', 'pyarrow', 'scipy'}\n"
        "print(sorted(heavy & set(sys.modules)))\n"
    )
    root = Path(__file__).parents[3]
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=root
    )
    assert done.stdout.strip() == "[]"
