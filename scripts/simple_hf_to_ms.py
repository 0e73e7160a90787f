#!/usr/bin/env python3
"""Copy a model from Hugging Face to ModelScope: simple_hf_to_ms.py HF_MODEL MS_MODEL [HF_TOKEN]."""

from __future__ import annotations

import os
import sys
from pathlib import Path

INSTALLED = Path(__file__).resolve().parent.parent / ".venv" / "bin" / "python"
"""The Python of `setup`, if this script is run with another one."""


def main() -> None:
    """Run `emb-provider transfer HF_MODEL MS_MODEL`."""
    if len(sys.argv) not in (3, 4) or sys.argv[1].startswith("-"):
        sys.stderr.write(f"{__doc__}\n")
        sys.exit(0 if sys.argv[1:] in (["-h"], ["--help"]) else 2)
    if len(sys.argv) == 4:
        os.environ["EMB_PROVIDER_HF_TOKEN"] = sys.argv[3]
    try:
        from emb_model_provider.cli.main import main as emb_provider
    except ImportError as error:
        if INSTALLED.exists() and Path(sys.executable) != INSTALLED:
            os.execv(INSTALLED, [str(INSTALLED), *sys.argv])  # noqa: S606 - this script again, with the other Python
        sys.exit(f"{error}. Install this project first: bash scripts/quick_start_transfer.sh setup")
    emb_provider(["transfer", sys.argv[1], sys.argv[2]])


if __name__ == "__main__":
    main()
