"""``ktfx view``: a trace as one page."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ktfx.cli.common import Debug, Json, guarded, print_json, stdout


@guarded
def view(
    directory: Annotated[Path, typer.Argument(metavar="DIR", help="A trace that `ktfx trace` wrote.")],
    output: Annotated[
        Path | None, typer.Option("--output", "-o", metavar="FILE", help="Where the page goes; default DIR/view.html.")
    ] = None,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Write one static HTML page of a trace: every rewrite side by side, graph, partitions, timeline. No network."""
    from ktfx.debug.view import write_page

    path = write_page(directory, output)
    if as_json:
        return print_json({"page": str(path), "bytes": path.stat().st_size})
    stdout().print(f"{path}  ({path.stat().st_size / 1e6:.2f} MB): open it in a browser", soft_wrap=True)
    return None
