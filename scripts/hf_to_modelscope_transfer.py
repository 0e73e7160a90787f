#!/usr/bin/env python3
"""Copy a model from Hugging Face to ModelScope: `emb-provider transfer` with the options of the guide.

See docs/HF-to-ModelScope-Transfer.md. Other options of `emb-provider transfer` are passed on.
"""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

INSTALLED = Path(__file__).resolve().parent.parent / ".venv" / "bin" / "python"
"""The Python of `setup`, if this script is run with another one."""


def main() -> None:
    """Parse the options of the guide and run the transfer."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("--hf-model", required=True, metavar="ID", help="model on Hugging Face, owner/name")
    parser.add_argument(
        "--ms-model", required=True, metavar="ORG/NAME", help="model on ModelScope, created if necessary"
    )
    parser.add_argument("--hf-token", metavar="T", help="token for private or gated models; better: set HF_TOKEN")
    parser.add_argument("--commit-message", metavar="M", help="default: Mirror of owner/name@commit")
    parser.add_argument(
        "--verify-only", action="store_true", help="transfer nothing: check the access, compare the files"
    )
    parser.add_argument("--log-level", choices=["DEBUG", "INFO", "WARNING", "ERROR"])
    options, more = parser.parse_known_args()
    arguments = ["transfer", options.hf_model, options.ms_model, *more]
    if options.log_level is not None:
        arguments += ["--log-level", options.log_level]
    if options.commit_message is not None:
        arguments += ["--commit-message", options.commit_message]
    if options.verify_only:
        arguments.append("--verify-only")
    if options.hf_token:
        os.environ["EMB_PROVIDER_HF_TOKEN"] = options.hf_token
    try:
        from emb_model_provider.cli.main import main as emb_provider
    except ImportError as error:
        if INSTALLED.exists() and Path(sys.executable) != INSTALLED:
            os.execv(INSTALLED, [str(INSTALLED), *sys.argv])  # noqa: S606 - this script again, with the other Python
        sys.exit(f"{error}. Install this project first: bash scripts/quick_start_transfer.sh setup")
    emb_provider(arguments)


if __name__ == "__main__":
    main()
