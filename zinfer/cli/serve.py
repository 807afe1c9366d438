"""`zinfer serve`.  In: a folder.  Out: a server until a signal; on stdout where it listens, on stderr what it does."""

from __future__ import annotations

import json
from typing import Any

import click

from zinfer.cli.options import engine_options, settings_of
from zinfer.serving.access import check_binding
from zinfer.serving.extra import need_extra
from zinfer.serving.threads import settings_beside


@click.command()
@click.argument("model", required=False)
@click.option(
    "--host", metavar="ADDRESS", help="Default 127.0.0.1; any other than a loopback one needs a key."
)
@click.option("--port", type=int, help="Default 8080; 0: a free one, which is printed.")
@click.option("--students", type=int, help="Of a group: how many answer at most (default: all).")
@click.option("--teacher", help="Of a group: who answers where it is not sure; may exceed its memory.")
@click.option("--defer-below", type=float, metavar="P", help="Not sure: less confident than this (0 to 1).")
@click.option("--objective-ms", type=float, help="Of a group: what 99 of 100 answers may take (default 100).")
@click.option("--adapt/--no-adapt", default=None, help="Under load fewer students answer (default on).")
@click.option(
    "--grace", type=float, metavar="SECONDS", help="To answer what was taken, at the end (default 30)."
)
@click.option("--exact/--no-exact", default=None, help="A text's result depends on nothing but the text.")
@click.option("--json", "as_json", is_flag=True, help="Say where it listens as one JSON object.")
@engine_options
def serve(
    model: str | None,
    host: str | None,
    port: int | None,
    students: int | None,
    teacher: str | None,
    defer_below: float | None,
    objective_ms: float | None,
    adapt: bool | None,
    grace: float | None,
    as_json: bool,
    **options: Any,
) -> None:
    """Answer requests over HTTP with MODEL: an encoder's folder or store, or a group of students (default: the
    bundled one).

    The key is ZINFER_SERVE_API_KEY.  POST /predict and /embed take Text Embeddings Inference's requests and
    {"texts": [...]}; GET /health, /ready, /info, /metrics, /openapi.json.  SIGTERM answers what was taken, then ends.
    """
    more = {
        "serve.host": host,
        "serve.port": port,
        "serve.objective_ms": objective_ms,
        "serve.adapt": adapt,
        "serve.grace_s": grace,
    }
    settings = settings_of(model, more=more, **options).settings
    check_binding(settings.serve)
    need_extra()
    settings = settings_beside(settings)
    from zinfer.classifier import Classifier
    from zinfer.serving.server import run_server

    def opened() -> Classifier:
        return Classifier(
            model, students=students, teacher=teacher, defer_below=defer_below, settings=settings
        )

    def ready(about: dict[str, Any]) -> None:
        line = f"serving {about['model']} at {about['url']}"
        click.echo(json.dumps({"ready": True} | about) if as_json else line)

    run_server(opened, settings, say=lambda line: click.echo(line, err=True), ready=ready)
