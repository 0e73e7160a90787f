"""`emb-provider rerank`: documents in the order of their scores for a query, without a server."""

from __future__ import annotations

import json
from dataclasses import asdict
from typing import TYPE_CHECKING

import click

from emb_model_provider.cli import options
from emb_model_provider.cli.embed import check_texts, load_embedder, read_texts
from emb_model_provider.cli.interrupt import run_until_interrupted
from emb_model_provider.cli.output import out, say

if TYPE_CHECKING:
    from emb_model_provider.model_spec import Precision, Source
    from emb_model_provider.progress import Mode


@click.command()
@click.argument("query")
@click.argument("documents", nargs=-1, required=True, metavar="DOCUMENT|-|@FILE...")
@click.option(
    "--model", "-m", type=options.ModelId(), help="Reranker to use. Default: the first model of the settings."
)
@options.source
@options.revision
@options.precision
@options.progress
@click.option("--top-n", type=click.IntRange(1), help="Number of documents to print. Default: all.")
@click.option("--raw", is_flag=True, help="Print logits, without the activation of the model.")
@click.option("--json", "as_json", is_flag=True, help="Print one object per line: index, score, document.")
def rerank(
    query: str,
    documents: tuple[str, ...],
    model: str | None,
    source: Source | None,
    revision: str | None,
    precision: Precision | None,
    progress: Mode,
    top_n: int | None,
    *,
    raw: bool,
    as_json: bool,
) -> None:
    """Print documents by their scores for a query.

    The best document comes first. Each line is a score and a document, separated by a tab. `-` reads documents from
    stdin and `@FILE` from a file, one per line. The model is downloaded and compiled if necessary, and runs in this
    process: no server is used.

    JSON: {"index", "score", "document"} on each line.
    """
    check_texts(documents)
    texts = list(read_texts(documents))
    if not texts:  # else a model would be downloaded for nothing
        say("There is no document to rerank.")
        return

    def work() -> None:
        with load_embedder(model, source=source, revision=revision, precision=precision, progress=progress) as embedder:
            for found in embedder.rerank(query, texts, top_n=top_n, raw=raw or None):
                out(json.dumps(asdict(found)) if as_json else f"{found.score:.6f}\t{found.document}")

    run_until_interrupted(work, "nothing was printed.")
