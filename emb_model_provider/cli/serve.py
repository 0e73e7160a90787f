"""`emb-provider serve`: the service, as `python -m emb_model_provider.main` starts it."""

from __future__ import annotations

import click


@click.command()
def serve() -> None:
    """Start the service. What it serves, and where, is set by EMB_PROVIDER_... variables or .env."""
    from emb_model_provider.main import run

    run()
