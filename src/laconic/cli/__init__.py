"""The laconic command, one short file a verb."""

from laconic.cli._app import app as app
from laconic.cli.compress import compress as _compress
from laconic.cli.export import export as _export
from laconic.cli.inspect import inspect as _inspect
from laconic.cli.measure import measure as _measure
from laconic.cli.methods import methods as _methods
from laconic.cli.report import report as _report
from laconic.cli.resume import resume as _resume
from laconic.cli.run import run as _run
from laconic.cli.specialize import specialize as _specialize

VERBS = (
    _compress, _inspect, _measure, _export, _specialize, _run, _resume, _report, _methods,
)  # fmt: skip
for _verb in VERBS:
    app.command()(_verb)


def main() -> None:
    """The entry point of the `laconic` command."""
    app()
