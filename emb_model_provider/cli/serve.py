"""`emb-provider serve`: the service, as `python -m emb_model_provider.main` starts it."""

from __future__ import annotations

import click


@click.command()
@click.option(
    "--supervise",
    is_flag=True,
    help="Keep the port open in a small process, and start the service again when it crashes or hangs "
    "(as EMB_PROVIDER_SUPERVISE=true).",
)
def serve(*, supervise: bool) -> None:
    """Start the service. What it serves, and where, is set by EMB_PROVIDER_... variables or .env."""
    from emb_model_provider.main import run

    run(supervise=supervise)
