"""`python -m emb_model_provider` is `emb-provider`, for environments whose scripts are not on PATH."""

from emb_model_provider.cli.main import main

main(prog_name="emb-provider")
