"""How fast a memory is, beside its bare matrix products and other people's code: `miras bench`."""

from miras.bench.case import MODES, Case, named_design, with_refresh
from miras.bench.contenders import PEERS, Contender, contenders
from miras.bench.measure import Measurement, Refusal, Results, measure
from miras.bench.show import markdown, plot, table

__all__ = [
    "MODES",
    "PEERS",
    "Case",
    "Contender",
    "Measurement",
    "Refusal",
    "Results",
    "contenders",
    "markdown",
    "measure",
    "named_design",
    "plot",
    "table",
    "with_refresh",
]
